"""LoRA for a batch whose rows belong to different adapters, each with a rank, a scale and a dropout of its own.

    s[m, :R_t]  = c_t * (mask_t * x)[m, K] @ A_t[R_t, K].T          m in segment t: the rows of adapter t
    y[m, N]    += scale_t * s[m, :R_t] @ B_t[N, R_t].T              in place
    ds[m, :R_t] = scale_t * dy[m] @ B_t          dB_t = scale_t * dy[segment].T @ s[segment]
    dA_t        = c_t * ds[segment].T @ (mask_t * x)[segment]       dx[m] += c_t * mask_t * (ds[m, :R_t] @ A_t)

Three kernels, each for A and for B: to the rank (`_down`), from it (`_up`, which adds), and the sums over a segment's
rows that are gradients (`_gram`, which writes zeros for an empty segment). In them C is K or N, the columns of x, y or
their gradients. What differs between A [R, C] and B [C, R] is the order of their two strides.

The adapters lie where they are, in as many tensors: a table has their addresses, ranks, thresholds and factors, so that
the number of launches does not depend on how many there are. Rows are read through `order`, nobody sorts or copies x. A
program of `_down` and `_up` has up to BLOCK_M rows of one adapter, so an adapter with no more rows than that is read
once. Ranks are not padded in memory; columns of s beyond R_t, and rows of no adapter, are neither written nor read. The
row of a mask is the row within the segment. No atomics: partial sums along K are added in a second stage, in fixed
order. fp32 accumulation, one rounding on store. The same in plain torch: reference_multi.py.

Source of the layout: SGMV of Punica (arXiv 2310.18547, section 4), in SGLang's form of segments cut into chunks; its
backward is ours.
"""

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, dropout, tiles
from .launch import Plan, planned
from .reduce import sum_partials
from .segments import Constant, Drop, Groups, Segments, starts_of
from .tiles import cdiv, dropout_mask, input_precision, rows

TRITON_TYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# The columns of a table, int64 [T, 5].
ADDRESS, RANK, OFFSET, THRESHOLD, NUMBER, WIDTH = (tl.constexpr(i) for i in range(6))


@triton.jit
def _rank_and_number(table_ptr, t):
    """(R_t, the factor of its products), a float whose 32 bits an int64 keeps"""
    row = table_ptr + t * WIDTH
    number = tl.load(row + NUMBER).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.load(row + RANK).to(tl.int32), number


@triton.jit
def _piece(blocks_ptr, order_ptr, BLOCK_M: tl.constexpr):
    """(adapter, its rows in the batch [BLOCK_M, 1], which of them there are, the rows in the segment)"""
    piece = blocks_ptr + tl.program_id(0) * 4
    i = tl.arange(0, BLOCK_M)[:, None]
    count = tl.load(piece + 2)
    m = _in_batch(order_ptr, tl.load(piece + 1), i, count)
    return tl.load(piece).to(tl.int64), m, i < count, (tl.load(piece + 3) + i).to(tl.int64)


@triton.jit
def _in_batch(order_ptr, first, i, count):
    """int64: where in the batch rows `first` + i of `order` are; some row for those from `count` on"""
    if order_ptr is None:
        m = first + tl.minimum(i, count - 1)
    else:
        m = tl.load(order_ptr + first + i, mask=i < count, other=0)
    return m.to(tl.int64)


@triton.jit
def _factor(
    stack_ptr, table_ptr, t, r, R, columns, C, TYPE: tl.constexpr, OF_B: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """[BLOCK_R, BLOCK_C] of A_t [R, C] or B_t [C, R]; r [BLOCK_R, 1], columns [1, BLOCK_C]. Where they lie is in the
    table, or they lie one behind the other from stack_ptr on. ALIGNED: they begin at multiples of 16 bytes and all
    ranks are multiples of 8: 16 bytes of a row can be read at once."""
    if stack_ptr is None:
        address = tl.load(table_ptr + t * WIDTH + ADDRESS)
        if ALIGNED:
            address = tl.multiple_of(address, 16)
        factor_ptr = address.to(tl.pointer_type(TYPE))
    else:
        begin = tl.load(table_ptr + t * WIDTH + OFFSET) * C
        if ALIGNED:
            begin = tl.multiple_of(begin, 8)
        factor_ptr = stack_ptr + begin
    if OF_B:
        stride = (R // 8) * 8 if ALIGNED else R
        place = columns.to(tl.int64) * stride + r
    else:
        place = r.to(tl.int64) * C + columns
    return tl.load(factor_ptr + place, mask=(r < R) & (columns < C), other=0.0)


@triton.jit
def _kept(x, table_ptr, keys_ptr, t, own_rows, c0, C, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr):
    """x [BLOCK_M, BLOCK_C] with the mask of this adapter's key"""
    if DROPOUT:
        threshold = tl.load(table_ptr + t * WIDTH + THRESHOLD).to(tl.int32)
        pairs = c0 // 2 + tl.arange(0, BLOCK_C // 2)[None, :]
        x = tl.where(dropout_mask(keys_ptr + t * 2, own_rows, pairs, (C + 1) // 2, threshold), x, 0.0)
    return x


@triton.jit(do_not_specialize=["M", "steps_per_split"])
def _lora_down_multi_kernel(
    x_ptr, s_ptr, order_ptr, blocks_ptr, stack_ptr, table_ptr, keys_ptr,
    M, C, stride_x_m, stride_s_m, steps_per_split,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr, OF_B: tl.constexpr,
    ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a piece of a segment, a tile of the rank, steps_per_split tiles of x's columns; to s_ptr[split]."""
    t, m, inside, own_rows = _piece(blocks_ptr, order_ptr, BLOCK_M)
    R, number = _rank_and_number(table_ptr, t)
    r0 = tl.program_id(1) * BLOCK_R
    if r0 < R:
        split = tl.program_id(2)
        r = r0 + tl.arange(0, BLOCK_R)
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        start = split * steps_per_split * BLOCK_C
        for c0 in range(start, tl.minimum(start + steps_per_split * BLOCK_C, C), BLOCK_C):
            columns = c0 + tl.arange(0, BLOCK_C)[None, :]
            x = tl.load(x_ptr + m * stride_x_m + columns, mask=inside & (columns < C), other=0.0)
            x = _kept(x, table_ptr, keys_ptr, t, own_rows, c0, C, BLOCK_C, DROPOUT)
            factor = _factor(stack_ptr, table_ptr, t, r[:, None], R, columns, C, TYPE, OF_B, ALIGNED)
            acc = tl.dot(x, tl.trans(factor.to(x.dtype)), acc, input_precision=PRECISION)
        s_ptr += split.to(tl.int64) * M * stride_s_m
        tl.store(s_ptr + m * stride_s_m + r[None, :], acc * number, mask=inside & (r[None, :] < R))


@triton.jit
def _lora_up_multi_kernel(
    y_ptr, s_ptr, order_ptr, blocks_ptr, stack_ptr, table_ptr, keys_ptr,
    C, stride_y_m, stride_s_m,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr, OF_B: tl.constexpr,
    ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a piece of a segment, a tile of y's columns, all of the rank."""
    t, m, inside, own_rows = _piece(blocks_ptr, order_ptr, BLOCK_M)
    R, number = _rank_and_number(table_ptr, t)
    if R > 0:
        c0 = tl.program_id(1) * BLOCK_C
        columns = c0 + tl.arange(0, BLOCK_C)[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            s = tl.load(s_ptr + m * stride_s_m + r[None, :], mask=inside & (r[None, :] < R), other=0.0)
            factor = _factor(stack_ptr, table_ptr, t, r[:, None], R, columns, C, TYPE, OF_B, ALIGNED)
            acc = tl.dot(s, factor.to(s.dtype), acc, input_precision=PRECISION)
        acc = _kept(acc * number, table_ptr, keys_ptr, t, own_rows, c0, C, BLOCK_C, DROPOUT)
        y_ptrs, of_y = y_ptr + m * stride_y_m + columns, inside & (columns < C)
        tl.store(y_ptrs, tl.load(y_ptrs, mask=of_y, other=0.0).to(tl.float32) + acc, mask=of_y)


@triton.jit
def _lora_gram_multi_kernel(
    u_ptr, v_ptr, out_ptr, order_ptr, starts_ptr, table_ptr, keys_ptr,
    C, stride_u_m, stride_v_m,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, OF_B: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one adapter's gradient, number * u[segment].T @ (mask * v)[segment], which is [R, C] for A
    and its transpose for B. The gradients lie one behind the other in out."""
    t = tl.program_id(0).to(tl.int64)
    R, number = _rank_and_number(table_ptr, t)
    r0 = tl.program_id(2) * BLOCK_R
    if r0 < R:
        c0 = tl.program_id(1) * BLOCK_C
        columns = c0 + tl.arange(0, BLOCK_C)[None, :]
        r = r0 + tl.arange(0, BLOCK_R)
        first, end = tl.load(starts_ptr + t), tl.load(starts_ptr + t + 1)
        acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for row in range(first, end, BLOCK_M):
            i = tl.arange(0, BLOCK_M)[:, None]
            inside = i < end - row
            m = _in_batch(order_ptr, row, i, end - row)
            u = tl.load(u_ptr + m * stride_u_m + r[None, :], mask=inside & (r[None, :] < R), other=0.0)
            v = tl.load(v_ptr + m * stride_v_m + columns, mask=inside & (columns < C), other=0.0)
            v = _kept(v, table_ptr, keys_ptr, t, (row - first + i).to(tl.int64), c0, C, BLOCK_C, DROPOUT)
            acc = tl.dot(tl.trans(u), v, acc, input_precision=PRECISION)
        out_ptr += tl.load(table_ptr + t * WIDTH + OFFSET) * C
        rank = r.to(tl.int64)[:, None]
        place = columns * tl.cast(R, tl.int64) + rank if OF_B else rank * C + columns
        tl.store(out_ptr + place, acc * number, mask=(rank < R) & (columns < C))


@dataclass
class Factors:
    """The A_t, or the B_t, of a launch: what the kernels are told of them."""

    tensors: list[Tensor]  # whose addresses are in the table: they have to live
    stack: Tensor | None  # or they are all in this one
    of_b: bool
    ranks: tuple[int, ...]
    table: Tensor
    aligned: bool
    keys: Tensor | None = None

    @staticmethod
    def apart(tensors: Sequence[Tensor], of_b: bool, numbers: Sequence[float], drop: Drop | None) -> "Factors":
        """Each A_t [R_t, C], or B_t [C, R_t], in a tensor of its own."""
        own = [t.contiguous() for t in tensors]
        ranks, addresses = tuple(t.shape[int(of_b)] for t in own), tuple(t.data_ptr() for t in own)
        thresholds = tuple(dropout.threshold(p) for p in drop.p) if drop else (0,) * len(own)
        aligned = all(a % 16 == 0 for a in addresses) and all(rank % 8 == 0 for rank in ranks)
        table = _table(addresses, ranks, thresholds, tuple(numbers), own[0].device)
        return Factors(own, None, of_b, ranks, table, aligned)

    @staticmethod
    def stacked(stack: Tensor, of_b: bool, number: float) -> "Factors":
        """[T, R, C], or [T, C, R], in one tensor: the table is the same wherever that lies."""
        T, R = stack.shape[0], stack.shape[1 + of_b]
        stack, ranks, nothing = stack.contiguous(), (R,) * T, (0,) * T
        table = _table(nothing, ranks, nothing, (number,) * T, stack.device)
        return Factors([], stack, of_b, ranks, table, stack.data_ptr() % 16 == 0 and R % 8 == 0)

    @property
    def dtype(self) -> torch.dtype:
        return (self.tensors[0] if self.stack is None else self.stack).dtype

    @property
    def settings(self) -> tuple[tuple[str, Any], ...]:
        kept = self.keys is not None
        return ("TYPE", TRITON_TYPE[self.dtype]), ("OF_B", self.of_b), ("ALIGNED", self.aligned), ("DROPOUT", kept)


def _of_A(A: Sequence[Tensor], drop: Drop) -> Factors:
    def make() -> Factors:
        return Factors.apart(A, False, [dropout.correction(p) for p in drop.p], drop)

    factors = A.keep("factors", make) if isinstance(A, Constant) else make()
    factors.keys = drop.keys if any(drop.p) else None
    return factors


def _of_B(B: Sequence[Tensor], scale: Sequence[float]) -> Factors:
    def make() -> Factors:
        return Factors.apart(B, True, scale, None)

    return B.keep("factors", make) if isinstance(B, Constant) else make()


@functools.lru_cache(maxsize=4096)
def _table(
    addresses: tuple[int, ...],
    ranks: tuple[int, ...],
    thresholds: tuple[int, ...],
    numbers: tuple[float, ...],
    device: torch.device,
) -> Tensor:
    """int64 [T, WIDTH] on the device. It has addresses, not values, so it stays right while weights change, and a model
    whose weights stay where they are copies it once; CUDA graphs that were captured with it use this memory."""
    bits = [struct.unpack("i", struct.pack("f", number))[0] for number in numbers]
    columns = (addresses, ranks, starts_of(ranks)[:-1], thresholds, bits)
    return torch.tensor(columns, dtype=torch.int64).t().contiguous().to(device, non_blocking=True)


def lora_down_multi(x: Tensor, A: Sequence[Tensor], segments: Segments, drop: Drop) -> Tensor:
    """s [M, largest R_t] in x's dtype."""
    return down(rows(x), _of_A(A, drop), segments)


def lora_up_add_multi_(y: Tensor, s: Tensor, B: Sequence[Tensor], scale: Sequence[float], segments: Segments) -> None:
    """y [M, N] += scale_t * s @ B_t.T, in place, in the rows of each adapter t."""
    up(y, rows(s), _of_B(B, scale), segments)


def lora_up_multi_backward(
    dy: Tensor,
    s: Tensor,
    B: Sequence[Tensor],
    scale: Sequence[float],
    segments: Segments,
    needs_ds: bool = True,
    needs_dB: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """ds [M, largest R_t] in dy's dtype and the dB_t [N, R_t] in B's, one behind the other, each None where it is not
    needed."""
    dy, factors = rows(dy), _of_B(B, scale)
    ds = down(dy, factors, segments) if needs_ds else None
    return ds, gram(rows(s), dy, factors, segments, factors.dtype) if needs_dB else None


def lora_down_multi_backward(
    ds: Tensor,
    x: Tensor,
    A: Sequence[Tensor],
    segments: Segments,
    drop: Drop,
    dx: Tensor | None = None,
    needs_dA: bool = True,
) -> Tensor | None:
    """The dA_t [R_t, K] in A's dtype, one behind the other, None where they are not needed; the adapters' part is added
    to dx [M, K], in place, if given."""
    factors = _of_A(A, drop)
    if dx is not None:
        up(dx, rows(ds), factors, segments)
    return gram(rows(ds), rows(x), factors, segments, factors.dtype) if needs_dA else None


def down(x: Tensor, factors: Factors, segments: Segments | Groups) -> Tensor:
    """To the rank: number_t * (mask_t * x) @ A_t.T, or @ B_t, in the rows of each adapter t: [M, largest R_t] in the
    dtype of x [M, C], whose rows must be dense. What belongs to no adapter, or lies beyond R_t, is undefined."""
    (M, C), largest = x.shape, max(factors.ranks)
    config = configs.lora_down_multi(segments.longest, largest, x.element_size(), factors.aligned)
    pieces = segments.cut(config["BLOCK_M"], x.device)
    constants = (*factors.settings, *config.items())
    splits, launch = _down_plan(len(pieces), M, C, largest, x.stride(0), input_precision(), constants)
    s = torch.empty((splits, M, largest), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if len(pieces) and largest:
        launch(x, s, segments.order, pieces, factors.stack, factors.table, factors.keys)
    return s[0] if splits == 1 else sum_partials(s, x.dtype)


@planned
def _down_plan(
    pieces: int, M: int, C: int, largest: int, of_x: int, precision: str, constants: tuple[tuple[str, Any], ...]
) -> tuple[int, Plan]:
    """(splits of C, the launch)"""
    tile = dict(constants)
    tiles_of_rank = cdiv(largest, tile["BLOCK_R"])
    splits, steps = configs.split("lora_down_multi", C, tile["BLOCK_C"], pieces * tiles_of_rank)
    return splits, Plan(
        _lora_down_multi_kernel, (pieces, tiles_of_rank, splits), (M, C, of_x, largest, steps),
        PRECISION=precision, enable_fp_fusion=True, **tile,
    )  # fmt: skip


def up(y: Tensor, s: Tensor, factors: Factors, segments: Segments | Groups) -> None:
    """From the rank: y [M, C] += number_t * mask_t * s[:, :R_t] @ A_t, or @ B_t.T, in each adapter's rows, in place."""
    assert y.stride(1) == 1
    config = configs.lora_up_multi(segments.longest, max(factors.ranks), y.element_size(), factors.aligned)
    pieces, C = segments.cut(config["BLOCK_M"], y.device), y.shape[1]
    if len(pieces) and max(factors.ranks):
        constants = (*factors.settings, *config.items())
        launch = _up_plan(len(pieces), C, y.stride(0), s.stride(0), input_precision(), constants)
        launch(y, s, segments.order, pieces, factors.stack, factors.table, factors.keys)


@planned
def _up_plan(pieces: int, C: int, of_y: int, of_s: int, precision: str, constants: tuple[tuple[str, Any], ...]) -> Plan:
    tile = dict(constants)
    return Plan(
        _lora_up_multi_kernel, (pieces, cdiv(C, tile["BLOCK_C"])), (C, of_y, of_s),
        PRECISION=precision, enable_fp_fusion=True, **tile,
    )  # fmt: skip


def gram(u: Tensor, v: Tensor, factors: Factors, segments: Segments | Groups, dtype: torch.dtype) -> Tensor:
    """The gradients number_t * u[segment t, :R_t].T @ (mask_t * v)[segment t], or their transposes for B_t, one behind
    the other: [sum of R_t * C] in `dtype`, for v [M, C]; zeros for an empty segment."""
    C, largest = v.shape[1], max(factors.ranks)
    config = configs.lora_gram_multi(largest, v.element_size())
    out = torch.empty(sum(factors.ranks) * C, dtype=dtype, device=v.device)
    if out.numel():
        settings = ("OF_B", factors.of_b), ("DROPOUT", factors.keys is not None)
        constants = (*settings, *config.items())
        launch = _gram_plan(len(factors.ranks), largest, C, u.stride(0), v.stride(0), input_precision(), constants)
        launch(u, v, out, segments.order, segments.starts_on(v.device), factors.table, factors.keys)
    return out


@planned
def _gram_plan(
    T: int, largest: int, C: int, of_u: int, of_v: int, precision: str, constants: tuple[tuple[str, Any], ...]
) -> Plan:
    tile = dict(constants)
    return Plan(
        _lora_gram_multi_kernel, (T, cdiv(C, tile["BLOCK_C"]), cdiv(largest, tile["BLOCK_R"])), (C, of_u, of_v),
        PRECISION=precision, enable_fp_fusion=True, **tile,
    )  # fmt: skip


def why_not(dtype: torch.dtype, adapters: tuple[torch.dtype, ...] = ()) -> str | None:
    """The reason these kernels cannot take x of this dtype with factors of those, or None where they can."""
    if len(set(adapters)) > 1:
        return f"the adapters of one layer have several dtypes, {', '.join(sorted(map(str, set(adapters))))}"
    return next((why for d in (dtype, *adapters[:1]) if (why := tiles.why_not("x", d))), None)
