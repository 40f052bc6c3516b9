"""LoRA for a batch whose rows belong to different adapters, in plain torch: the specification of lora_multi.py.

T adapters with ranks R_t, A_t [R_t, K] and B_t [N, R_t]; the rows of adapter t are a segment of x [M, K] (segments.py).

    s[m, :R_t]  = c_t * (mask_t * x)[m] @ A_t.T                     lora_down_multi            m in segment t
    y[m]       += scale_t * s[m, :R_t] @ B_t.T                      lora_up_add_multi_
    ds[m, :R_t] = scale_t * dy[m] @ B_t
    dB_t        = scale_t * dy[segment t].T @ s[segment t]          lora_up_multi_backward
    dA_t        = c_t * ds[segment t].T @ (mask_t * x)[segment t]
    dx[m]      += c_t * mask_t * (ds[m, :R_t] @ A_t)                lora_down_multi_backward

The row that a mask is a function of is the row within the segment: what the others in the batch are changes nothing.
s is [M, largest R_t]; what lies beyond an adapter's rank, and in rows of no adapter, is never read.

Segments of equal length whose adapters have equal rank, scale and dropout go through one batched product: a decoding
step of 64 adapters takes two products and not 128 (64 rows, K = N = 256, R = 16, fp32, one thread of an EPYC: 145 us
with the stacking of A and B, against 430 us one by one and 2 ms as HF PEFT does it).
"""

import functools
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import dropout
from .segments import Bucket, Constant, Drop, Segments, buckets, kept_tables, places

# Of a factor. Copying larger ones side by side, anew in every call, takes longer than multiplying one by one: 64 of
# rank 16 in fp32, one thread of an EPYC, 0.3 against 0.7 ms with 256 columns, 1.8 against 1.5 ms with 2048.
STACKED_BYTES = 1 << 16


def lora_down_multi(x: Tensor, A: Sequence[Tensor], segments: Segments, drop: Drop) -> Tensor:
    """s [M, largest R_t] in x's dtype."""
    found, R = _buckets(segments, A, 0, drop.p), largest_rank(A, 0)
    is_result = _is_whole(found, segments) and A[found[0].members[0]].shape[0] == R
    s = None if is_result else x.new_zeros(x.shape[0], R)
    for bucket in found:
        weights = _stacked(A, bucket, x.dtype).transpose(1, 2)  # [G, K, R]
        rows, c = _kept(_take(x, segments, bucket), bucket, drop)
        part = _product(rows, weights, c)
        if s is None:
            return part.flatten(0, 1)
        _put(s, segments, bucket, part)
    assert s is not None
    return s


def lora_up_add_multi_(y: Tensor, s: Tensor, B: Sequence[Tensor], scale: Sequence[float], segments: Segments) -> None:
    """y [M, N] += scale_t * s @ B_t.T, in place, in the rows of each adapter t."""
    for bucket in _buckets(segments, B, 1, scale):
        weights = _stacked(B, bucket, s.dtype).transpose(1, 2)  # [G, R, N]
        part = _take(s, segments, bucket, weights.shape[1])
        _add(y, segments, bucket, part, weights, scale[bucket.members[0]])


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
    ds = dy.new_zeros(dy.shape[0], s.shape[1]) if needs_ds else None
    flat, dB = _gradients(B, needs_dB)
    for bucket in _buckets(segments, B, 1, scale):
        rows, factor = _take(dy, segments, bucket), scale[bucket.members[0]]
        if ds is not None:
            _put(ds, segments, bucket, _product(rows, _stacked(B, bucket, dy.dtype), factor))
        if needs_dB:
            R = B[bucket.members[0]].shape[1]
            grads = _product(rows.transpose(1, 2), _take(s, segments, bucket, R), factor)
            for t, grad in zip(bucket.members, grads):
                dB[t].copy_(grad)
    return ds, flat


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
    flat, dA = _gradients(A, needs_dA)
    for bucket in _buckets(segments, A, 0, drop.p):
        part = _take(ds, segments, bucket, A[bucket.members[0]].shape[0])
        mask, c = _masks(bucket, x.shape[1], drop)
        if needs_dA:
            rows = _take(x, segments, bucket)
            rows = rows if mask is None else torch.where(mask, rows, 0)
            for t, grad in zip(bucket.members, _product(part.transpose(1, 2), rows, c)):
                dA[t].copy_(grad)
        if dx is None:
            continue
        weights = _stacked(A, bucket, ds.dtype)
        if mask is None:
            _add(dx, segments, bucket, part, weights, c)
        else:
            change = torch.where(mask, _product(part, weights, c), 0)
            _put(dx, segments, bucket, _take(dx, segments, bucket) + change)
    return flat


class Stacks(NamedTuple):
    """Constant factors of adapters whose rows are a batch as it comes, as many of each: one product for all A, one for
    all B."""

    A: Tensor  # [T, K, R]
    B: Tensor  # [T, R, N]
    scale: float


def stacks_of(
    A: Constant, B: Constant, scale: Sequence[float], segments: Segments, dtype: torch.dtype
) -> Stacks | None:
    """None where one product does not do."""
    if not A or not any(segments.lengths):
        return None
    each = [_buckets(segments, factors, dim, also) for factors, dim, also in ((A, 0, (0.0,) * len(A)), (B, 1, scale))]
    if not all(_is_whole(found, segments) for found in each):
        return None
    of_A, of_B = (_stacked(factors, found[0], dtype).mT for factors, found in zip((A, B), each))
    return Stacks(of_A, of_B, scale[each[0][0].members[0]])


def lora_add_at_once_(y: Tensor, x: Tensor, stacks: Stacks) -> None:
    """y [M, N] += scale * x [M, K] @ A_t.T @ B_t.T, in place: what lora_down_multi and lora_up_add_multi_ do."""
    T = len(stacks.A)
    s = _product(x.view(T, -1, x.shape[1]), stacks.A, 1.0)
    _add_product(y.view(T, -1, y.shape[1]), s, stacks.B, stacks.scale)


def lora_multi(
    x: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: Sequence[float],
    segments: Segments,
    drop: Drop,
) -> Tensor:
    """What the adapters add to the base layer's output [M, N], one adapter after the other, under torch's own autograd:
    the truth."""
    y = x.new_zeros(x.shape[0], B[0].shape[0] if B else 0)
    for t, (start, length) in enumerate(zip(segments.starts, segments.lengths)):
        rows = torch.arange(start, start + length, device=x.device)
        if segments.order is not None:
            rows = segments.order[start : start + length].long()
        own = x[rows]
        if drop.p[t]:
            assert drop.keys is not None
            mask = dropout.mask(drop.keys[t], length, x.shape[1], drop.p[t])
            own = dropout.correction(drop.p[t]) * torch.where(mask, own, 0)
        y = y.index_put((rows,), scale[t] * own @ A[t].to(x.dtype).t() @ B[t].to(x.dtype).t())
    return y


def largest_rank(factors: Sequence[Tensor], dim: int) -> int:
    def found() -> int:
        return max((factor.shape[dim] for factor in factors), default=0)

    return factors.keep(("rank", dim), found) if isinstance(factors, Constant) else found()


def _gradients(factors: Sequence[Tensor], needed: bool) -> tuple[Tensor | None, list[Tensor]]:
    """Zeros for all gradients, and each one's part of them. Factors of several dtypes: in the widest."""
    if not needed:
        return None, []
    dtype = functools.reduce(torch.promote_types, (f.dtype for f in factors))
    flat = torch.zeros(sum(f.numel() for f in factors), dtype=dtype, device=factors[0].device)
    return flat, separated(flat, factors)


def separated(flat: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Views of what lies one behind the other, in the shapes of the factors."""
    parts = flat.split([f.numel() for f in factors])
    return [part.view(f.shape) for part, f in zip(parts, factors)]


def _buckets(segments: Segments, factors: Sequence[Tensor], dim: int, also: Sequence[float]) -> list[Bucket]:
    """`also`: a number of each adapter that those of a bucket have in common too; for A it is always p, for B scale."""

    constant = isinstance(factors, Constant)

    def found() -> list[Bucket]:
        kinds = (_kind(f, f.shape[dim], number, t, constant) for t, (f, number) in enumerate(zip(factors, also)))
        return buckets(segments.lengths, tuple(kinds))

    return factors.keep(segments.lengths, found) if isinstance(factors, Constant) else found()


def _is_whole(found: list[Bucket], segments: Segments) -> bool:
    """Whether there is one bucket, and its rows are the batch as it comes."""
    return (
        len(found) == 1 and segments.order is None and len(found[0].members) * found[0].length == segments.M
    )  # fmt: skip


def _kind(factor: Tensor, R: int, number: float, adapter: int, constant: bool) -> tuple | None:
    """What adapters of one bucket have in common; None for one of rank 0. Large ones share no bucket."""
    if not R:
        return None
    small = constant or factor.nbytes <= STACKED_BYTES
    return R, factor.dtype, number, None if small else adapter


def _stacked(factors: Sequence[Tensor], bucket: Bucket, dtype: torch.dtype) -> Tensor:
    """[G, ...] in `dtype`: a copy for several, which costs less than their products one by one."""
    if len(bucket.members) == 1:
        return factors[bucket.members[0]].to(dtype)[None]
    if isinstance(factors, Constant):
        return factors.keep((bucket.members, dtype, bucket.length == 1), lambda: _stack(factors, bucket, dtype))
    own = [factors[t] for t in bucket.members]
    return torch.stack(own, out=_scratch((len(own), *own[0].shape), own[0])).to(dtype)


def _stack(factors: Sequence[Tensor], bucket: Bucket, dtype: torch.dtype) -> Tensor:
    """To be kept, in the layout that products read fastest: terms before columns, but for A in 16 bits in torch.bmm
    (64 adapters of rank 16, one thread of an EPYC, nothing in a cache, us: A [4096, 16] in bf16 1546 and as it is 726,
    in fp32 669 and 782; B [16, 4096] 858 and 1838, 767 and 704)."""
    own = [factors[t] for t in bucket.members]
    columns, terms = own[0].shape
    as_it_is = dtype.itemsize == 2 and columns < terms
    if as_it_is and not (bucket.length == 1 and _pays(len(own), terms, columns, own[0].device, dtype)):
        return torch.stack(own).to(dtype)
    return torch.stack([factor.t() for factor in own]).to(dtype).mT


_of_thread = threading.local()


def _scratch(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for a stack, which is used before the next one is made: the last one's, where that is large enough. Fresh
    memory costs more than the copy (a page fault for every 4 KB)."""
    if isinstance(like, FakeTensor):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    size = math.prod(shape)
    kept = vars(_of_thread).setdefault("scratch", {})
    if (like.device, like.dtype) not in kept or kept[like.device, like.dtype].numel() < size:
        with torch.inference_mode(False):  # a tensor made there could not be written to elsewhere
            kept[like.device, like.dtype] = torch.empty(size, dtype=like.dtype, device=like.device)
    return kept[like.device, like.dtype][:size].view(shape)


def _rows_of(segments: Segments, bucket: Bucket, device: torch.device) -> slice | Tensor:
    """Where the bucket's rows are in the batch: without an index where they lie one behind the other."""
    if bucket.is_consecutive:
        start = bucket.first[0]
        rows = slice(start, start + len(bucket.members) * bucket.length)
        return rows if segments.order is None else segments.order[rows]
    own = places(bucket, device)
    return own if segments.order is None else segments.order[own]


def _take(t: Tensor, segments: Segments, bucket: Bucket, columns: int | None = None) -> Tensor:
    """[G, length, columns] of t [M, ...]; a view where there need be no copy."""
    rows = _rows_of(segments, bucket, t.device)
    own = t[rows] if isinstance(rows, slice) else t.index_select(0, rows)
    return own[:, :columns].unflatten(0, (len(bucket.members), bucket.length))


def _put(t: Tensor, segments: Segments, bucket: Bucket, values: Tensor) -> None:
    """values [G, length, columns] into the bucket's rows of t."""
    rows = _rows_of(segments, bucket, t.device)
    if isinstance(rows, slice):
        t[rows, : values.shape[2]] = values.flatten(0, 1)
    elif values.shape[2] == t.shape[1]:
        t.index_copy_(0, rows.long(), values.flatten(0, 1))
    else:
        t[:, : values.shape[2]].index_copy_(0, rows.long(), values.flatten(0, 1))


def _add(t: Tensor, segments: Segments, bucket: Bucket, a: Tensor, b: Tensor, factor: float) -> None:
    """t[rows of the bucket] += factor * a [G, length, R] @ b [G, R, columns], rounded once."""
    rows = _take(t, segments, bucket)
    if isinstance(_rows_of(segments, bucket, t.device), slice):  # a view
        _add_product(rows, a, b, factor)
    else:
        _put(t, segments, bucket, torch.baddbmm(rows, a, b, alpha=factor))


def _add_product(t: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """t [G, ...] += factor * a @ b"""
    if len(a) == 1:
        t[0].addmm_(a[0], b[0], alpha=factor)
    elif _is_summed(a, b):
        t.add_(_sums(a, b), alpha=factor)
    else:
        t.baddbmm_(a, b, alpha=factor)


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a @ b [G, ...] with one rounding."""
    if len(a) == 1 and factor == 1.0:
        return torch.mm(a[0], b[0])[None]
    if factor == 1.0 and _is_summed(a, b):
        return _sums(a, b)
    return torch.bmm(a, b) if factor == 1.0 else torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)


# Elements of a stack from which sums of its rows are quicker than torch.bmm. One thread of an EPYC, nothing in a cache,
# 64 adapters of rank 16, us, torch.bmm in its better layout / sums: in fp32 A [256, 16] 78 / 69, B [16, 256] 79 / 40,
# A [4096, 16] 837 / 580, B 648 / 555; in bf16 79 / 47, 137 / 31, 682 / 512, 891 / 413. 8 adapters, 256 wide: in fp32 A
# 10 / 14, in bf16 24 / 12. Rows of fewer than 4 columns are slower: of one, 11 / 70.
SUMMED = {torch.float32: 1 << 17, torch.bfloat16: 1 << 13, torch.float16: 1 << 13}
SUMMED_COLUMNS = 4


def _pays(G: int, terms: int, columns: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one row's products with [G, terms, columns] are taken by _sums."""
    most = torch.iinfo(torch.int32).max
    return device.type == "cpu" and columns >= SUMMED_COLUMNS and SUMMED.get(dtype, most) <= G * terms * columns <= most


def _is_summed(a: Tensor, b: Tensor) -> bool:
    """For a [G, length, terms] @ b [G, terms, columns]."""
    G, terms, columns = b.shape
    if a.shape[1] != 1 or a.dtype != b.dtype or not b.is_contiguous():
        return False
    return _pays(G, terms, columns, b.device, b.dtype)


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """a [G, 1, terms] @ b [G, terms, columns] as sums of rows of b with the weights in a, in fp32 as a product: what an
    embedding bag is, which reads b once and in order."""
    G, terms, columns = b.shape
    rows, starts = _bags(G, terms)
    return torch.embedding_bag(b.view(-1, columns), rows, starts, False, 0, False, a.reshape(-1))[0].unsqueeze(1)


@kept_tables(maxsize=8)
def _bags(G: int, terms: int) -> tuple[Tensor, Tensor]:
    """int32 [G * terms] and [G]: each row once, and where the rows of each sum begin."""
    rows = torch.arange(G * terms, dtype=torch.int32)
    return rows, rows[::terms].contiguous()


def _masks(bucket: Bucket, K: int, drop: Drop) -> tuple[Tensor | None, float]:
    """bool [G, length, K], or None where nothing is dropped, and c."""
    p = drop.p[bucket.members[0]]
    if not p:
        return None, 1.0
    assert drop.keys is not None
    masks = [dropout.mask(drop.keys[t], bucket.length, K, p) for t in bucket.members]
    return torch.stack(masks), dropout.correction(p)


def _kept(rows: Tensor, bucket: Bucket, drop: Drop) -> tuple[Tensor, float]:
    mask, c = _masks(bucket, rows.shape[2], drop)
    return (rows if mask is None else torch.where(mask, rows, 0)), c
