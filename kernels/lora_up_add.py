"""LoRA's up projection, added to the base layer's output in the same pass, and its backward, for up to three adapters.

    forward    y_j[M, N_j] += bias_j[N_j] + scale_j * s_j[M, R_j] @ B_j[N_j, R_j].T          in place
    backward   ds_j[M, R_j] = scale_j * dy_j[M, N_j] @ B_j         dB_j[N_j, R_j] = scale_j * dy_j.T @ s_j

The s_j lie side by side in one s [M, sum R_j], and so do the ds_j: what lora_down.py gives and takes. The forward reads
y once and writes it once; s @ B.T never reaches memory. The backward reads dy once for both outputs: a program owns
columns of one dy and walks down some of its rows. It keeps its dB in registers, and leaves a partial dB for these rows
and partial ds for these columns, which a second stage sums in fixed order. B may be fp32 under a 16-bit y: its tiles
are rounded in registers. fp32 accumulation, one rounding on store; dB is written in B's dtype. The same in plain torch:
reference.py.

Several adapters share a launch and nothing else: each program belongs to one of them, and takes the branch of a kernel
that has its pointers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, tiles
from .launch import Plan, planned
from .reduce import sum_both, sum_partials_of
from .tiles import cdiv, in_one_launch, input_precision, layout, rows, thrice, warps

SLAB = 8192  # rows of dy per launch of the backward: bounds what is left in ds, SLAB * R * 4 bytes for every BLOCK_N
# columns of dy: 15 MB for N = 14336, R = 16


@triton.jit
def up_tile(
    s_ptr, b_ptr, scale, m, n, M, N, R, stride_s_m, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * s @ B.T in fp32: rows m [BLOCK_M, 1], columns n [BLOCK_N]"""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
        s = tl.load(s_ptr + m * stride_s_m + r, mask=(m < M) & (r < R), other=0.0)
        b = tl.load(b_ptr + n[:, None] * stride_b_n + r, mask=(n[:, None] < N) & (r < R), other=0.0)
        acc = tl.dot(s, tl.trans(b.to(s.dtype)), acc, input_precision=PRECISION)
    return acc * tl.cast(scale, tl.float32)


@triton.jit
def _add_up(
    y_ptr, s_ptr, b_ptr, bias_ptr, scale, M, N, R, stride_y_m, stride_s_m, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y += bias + scale * s @ B.T; nothing beyond N"""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    acc = up_tile(s_ptr, b_ptr, scale, m, n, M, N, R, stride_s_m, stride_b_n, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M) & (n[None, :] < N)
    y_ptrs = y_ptr + m * stride_y_m + n[None, :]
    tl.store(y_ptrs, tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32) + acc, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _lora_up_add_fwd_kernel(
    y0_ptr, y1_ptr, y2_ptr, s_ptr, b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr,
    scale0, scale1, scale2, M, N0, N1, N2, R0, R1, R2,
    stride_y0_m, stride_y1_m, stride_y2_m, stride_s_m, stride_b0_n, stride_b1_n, stride_b2_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    COUNT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one y, which the third axis of the grid tells."""
    adapter = tl.program_id(2)
    if adapter == 0:
        _add_up(
            y0_ptr, s_ptr, b0_ptr, bias0_ptr, scale0, M, N0, R0, stride_y0_m, stride_s_m, stride_b0_n,
            BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
    if COUNT > 1:  # noqa: SIM102  this is a condition at compile time
        if adapter == 1:
            _add_up(
                y1_ptr, s_ptr + R0, b1_ptr, bias1_ptr, scale1, M, N1, R1, stride_y1_m, stride_s_m, stride_b1_n,
                BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
    if COUNT > 2:  # noqa: SIM102
        if adapter == 2:
            _add_up(
                y2_ptr, s_ptr + R0 + R1, b2_ptr, bias2_ptr, scale2, M, N2, R2, stride_y2_m, stride_s_m, stride_b2_n,
                BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip


@triton.jit
def _up_backward(
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, scale, start, end, r0, M, N, R, stride_dy_m, stride_s_m, stride_b_n,
    stride_ds_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of dy, its rows from start to end, one tile of R. ds goes to ds_ptr[program, M, R], dB [N, R] to
    db_ptr; nothing beyond N"""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    r = r0 + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    of_b = (n[:, None] < N) & (r < R)
    factor = tl.cast(scale, tl.float32)
    ds_ptr += tl.program_id(0).to(tl.int64) * M * stride_ds_m
    db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    b = tl.load(b_ptr + n[:, None] * stride_b_n + r, mask=of_b, other=0.0).to(s_ptr.dtype.element_ty)
    for m0 in range(start, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
        dy = tl.load(dy_ptr + m * stride_dy_m + n[None, :], mask=(m < M) & (n[None, :] < N), other=0.0)
        if NEEDS_DS:
            ds = tl.dot(dy, b, input_precision=PRECISION) * factor
            tl.store(ds_ptr + m * stride_ds_m + r, ds, mask=(m < M) & (r < R))
        if NEEDS_DB:
            s = tl.load(s_ptr + m * stride_s_m + r, mask=(m < M) & (r < R), other=0.0)
            db = tl.dot(tl.trans(dy), s, db, input_precision=PRECISION)
    if NEEDS_DB:
        tl.store(db_ptr + n[:, None].to(tl.int64) * R + r, db * factor, mask=of_b)


@triton.jit(do_not_specialize=["M", "numel", "rows_per_split", "rank_tiles"])
def _lora_up_bwd_kernel(
    dy0_ptr, dy1_ptr, dy2_ptr, s_ptr, b0_ptr, b1_ptr, b2_ptr, ds_ptr, db_ptr,
    scale0, scale1, scale2, M, numel, N0, N1, N2, R0, R1, R2, rows_per_split, rank_tiles,
    stride_dy0_m, stride_dy1_m, stride_dy2_m, stride_s_m, stride_b0_n, stride_b1_n, stride_b2_n, stride_ds_m,
    offset1, offset2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, COUNT: tl.constexpr,
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of one dy, rows_per_split rows, one tile of R. The dB_j go to db_ptr[split, numel],
    one after another; ds_1 begins at offset1, ds_2 at offset2."""
    split, adapter = (tl.program_id(1) // rank_tiles).to(tl.int64), tl.program_id(2)
    r0, n0 = (tl.program_id(1) % rank_tiles) * BLOCK_R, tl.program_id(0) * BLOCK_N
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, M)
    db_ptr += split * numel
    if (adapter == 0) & (n0 < N0):
        _up_backward(
            dy0_ptr, s_ptr, b0_ptr, ds_ptr, db_ptr, scale0, start, end, r0, M, N0, R0, stride_dy0_m, stride_s_m,
            stride_b0_n, stride_ds_m, BLOCK_M, BLOCK_N, BLOCK_R, NEEDS_DS, NEEDS_DB, PRECISION,
        )  # fmt: skip
    if COUNT > 1:
        db_ptr += tl.cast(N0, tl.int64) * R0
        if (adapter == 1) & (n0 < N1):
            _up_backward(
                dy1_ptr, s_ptr + R0, b1_ptr, ds_ptr + offset1, db_ptr, scale1, start, end, r0, M, N1, R1, stride_dy1_m,
                stride_s_m, stride_b1_n, stride_ds_m, BLOCK_M, BLOCK_N, BLOCK_R, NEEDS_DS, NEEDS_DB, PRECISION,
            )  # fmt: skip
    if COUNT > 2:
        db_ptr += tl.cast(N1, tl.int64) * R1
        if (adapter == 2) & (n0 < N2):
            _up_backward(
                dy2_ptr, s_ptr + R0 + R1, b2_ptr, ds_ptr + offset2, db_ptr, scale2, start, end, r0, M, N2, R2,
                stride_dy2_m, stride_s_m, stride_b2_n, stride_ds_m, BLOCK_M, BLOCK_N, BLOCK_R, NEEDS_DS, NEEDS_DB,
                PRECISION,
            )  # fmt: skip


@planned
def _forward_plan(
    M: int, widths: tuple[int, ...], ranks: tuple[int, ...], distances: tuple[int, ...], scale: tuple[float, ...],
    itemsize: int, aligned: bool, precision: str,
) -> Plan:  # fmt: skip
    """distances: of the rows of s, of each y, of each B."""
    config, count = configs.lora_up_forward(max(ranks), itemsize), len(ranks)
    of_s, of_y, of_B = distances[0], distances[1 : count + 1], distances[count + 1 :]
    return Plan(
        _lora_up_add_fwd_kernel, (cdiv(M, config["BLOCK_M"]), cdiv(max(widths), config["BLOCK_N"]), count),
        (*thrice(scale, 1.0), M, *thrice(widths, 0), *thrice(ranks, 0), *thrice(of_y, of_y[0]), of_s,
         *thrice(of_B, of_B[0])),
        COUNT=count, PRECISION=precision, num_warps=warps(aligned), enable_fp_fusion=True, **config,
    )  # fmt: skip


def lora_up_add_group_(
    y: Sequence[Tensor], s: Tensor, B: Sequence[Tensor], scale: Sequence[float], bias: Sequence[Tensor | None]
) -> None:
    """y_j [M, N_j] += bias_j + scale_j * s_j @ B_j.T, in place, for s [M, sum R_j]. The rows of y_j must be dense."""
    assert all(t.stride(1) == 1 for t in y)
    s, B = rows(s), [rows(b) for b in B]
    M, shapes, itemsize = s.shape[0], [b.shape for b in B], y[0].element_size()
    widths, ranks = tuple([N for N, _ in shapes]), tuple([R for _, R in shapes])
    if M == 0 or not any(widths):
        return
    if len(y) > 1 and not in_one_launch(itemsize, layout(*y)[1]):
        for one in zip(y, s.split(ranks, dim=1), B, scale, bias):
            lora_up_add_(*one)
        return
    bias = [None if b is None else b.contiguous() for b in bias]
    distances, aligned = layout(*y, *B)
    launch = _forward_plan(
        M, widths, ranks, (s.stride(0), *distances), tuple(scale), itemsize, aligned, input_precision()
    )
    launch(*thrice(y, y[0]), s, *thrice(B, B[0]), *thrice(bias, None))


def lora_up_group_backward(
    dy: Sequence[Tensor],
    s: Tensor,
    B: Sequence[Tensor],
    scale: Sequence[float],
    needs_ds: bool = True,
    needs_dB: bool = True,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """ds [M, sum R_j] in the dtype of dy, and dB_j [N_j, R_j] in that of B_j, None where they are not needed."""
    dy, s, B = [rows(t) for t in dy], rows(s), [rows(b) for b in B]
    M, ranks = s.shape[0], [b.shape[1] for b in B]
    ds = dy[0].new_empty(M, sum(ranks)) if needs_ds else None
    if M == 0 or not any(b.numel() for b in B):
        return None if ds is None else ds.zero_(), [b.new_zeros(b.shape) if needs_dB else None for b in B]
    sums: list[Tensor] = []
    for start in range(0, M, SLAB):
        some_s, some_ds = _slab(s, start), None if ds is None else _slab(ds, start)
        some_dy = [_slab(t, start) for t in dy]
        of_ds, partial, columns = _first_stage(some_dy, some_s, B, tuple(scale), some_ds, needs_dB)
        like, before = B if start + SLAB >= M else [partial[0]], sums[0] if sums else None
        if some_ds is not None and of_ds.dim() == 3:
            sums = sum_both(of_ds, some_ds, columns, ranks, partial, like if needs_dB else [partial], before)
        elif needs_dB:
            sums = sum_partials_of(partial, like, before)
    return ds, list(sums) if needs_dB else [None] * len(B)


def _slab(t: Tensor, start: int) -> Tensor:
    return t if t.shape[0] <= SLAB else t[start : start + SLAB]


class _FirstStage(NamedTuple):
    """It leaves partials of the dB_j [splits, numel], and of the ds_j [sum(columns), M, largest R_j], or ds itself."""

    columns: tuple[int, ...]  # programs along each dy
    splits: int  # of M
    launch: Plan


@planned
def _first_stage_plan(
    M: int, widths: tuple[int, ...], ranks: tuple[int, ...], distances: tuple[int, ...], scale: tuple[float, ...],
    itemsize: int, aligned: bool, needs_ds: bool, needs_dB: bool, precision: str,
) -> _FirstStage:  # fmt: skip
    """distances: of the rows of s, of ds where it is needed, of each B, of each dy. aligned: the dy."""
    config, count = configs.lora_up_backward(max(ranks), itemsize, aligned), len(ranks)
    columns, rank_tiles = tuple([cdiv(N, config["BLOCK_N"]) for N in widths]), cdiv(max(ranks), config["BLOCK_R"])
    splits, rows_per_split = cdiv(M, config["BLOCK_M"]), config["BLOCK_M"]
    if needs_dB:
        splits, rows_per_split = configs.split_rows(M, config["BLOCK_M"], sum(columns))
    of_s, of_ds, of_B, of_dy = distances[0], distances[1], distances[2 : count + 2], distances[count + 2 :]
    offsets = [ranks[0], sum(ranks[:2])]
    numel = sum([N * R for N, R in zip(widths, ranks)])
    if not needs_ds:
        of_ds = numel  # not read
    elif any(programs != 1 for programs in columns):
        of_ds, offsets = max(ranks), [programs * M * max(ranks) for programs in (columns[0], sum(columns[:2]))]
    launch = Plan(
        _lora_up_bwd_kernel, (max(columns), splits * rank_tiles, count),
        (*thrice(scale, 1.0), M, numel, *thrice(widths, 0), *thrice(ranks, 0), rows_per_split, rank_tiles,
         *thrice(of_dy, of_dy[0]), of_s, *thrice(of_B, of_B[0]), of_ds, *offsets),
        COUNT=count, NEEDS_DS=needs_ds, NEEDS_DB=needs_dB, PRECISION=precision, enable_fp_fusion=True, **config,
    )  # fmt: skip
    return _FirstStage(columns, splits, launch)


def _first_stage(
    dy: list[Tensor], s: Tensor, B: list[Tensor], scale: tuple[float, ...], ds: Tensor | None, needs_dB: bool
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(ds [M, sum R_j], or partials of the ds_j; partials of the dB_j; columns): see _FirstStage."""
    M, shapes = s.shape[0], [b.shape for b in B]
    widths, ranks = tuple([N for N, _ in shapes]), tuple([R for _, R in shapes])
    of_dy, aligned = layout(*dy)
    distances = (s.stride(0), 0 if ds is None else ds.stride(0), *[b.stride(0) for b in B], *of_dy)
    columns, splits, launch = _first_stage_plan(
        M, widths, ranks, distances, scale, s.element_size(), aligned, ds is not None, needs_dB, input_precision()
    )
    numel = sum([N * R for N, R in shapes])
    partial = torch.empty((splits if needs_dB else 0, numel), dtype=torch.float32, device=s.device)
    of_ds = partial if ds is None else ds
    # With one program along each dy there is nothing to add. A dy without columns has none: its ds is a sum of nothing.
    if ds is not None and any(programs != 1 for programs in columns):
        of_ds = torch.empty((sum(columns), M, max(ranks)), dtype=torch.float32, device=s.device)
    launch(*thrice(dy, dy[0]), s, *thrice(B, B[0]), of_ds, partial)
    return of_ds, partial, columns


def lora_up_add_(y: Tensor, s: Tensor, B: Tensor, scale: float, bias: Tensor | None = None) -> None:
    """y [M, N] += bias + scale * s @ B.T, in place. The rows of y must be dense."""
    lora_up_add_group_([y], s, [B], [scale], [bias])


def lora_up_backward(
    dy: Tensor, s: Tensor, B: Tensor, scale: float, needs_ds: bool = True, needs_dB: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """ds [M, R] in dy's dtype and dB [N, R] in B's, each None where it is not needed."""
    ds, (dB,) = lora_up_group_backward([dy], s, [B], [scale], needs_ds, needs_dB)
    return ds, dB


def why_not(dtype: torch.dtype) -> str | None:
    """The reason these kernels cannot take y of this dtype, or None where they can. Shapes and strides are free."""
    return tiles.why_not("y", dtype)
