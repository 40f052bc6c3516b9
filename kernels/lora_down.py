"""LoRA's down projection with dropout inside, and its backward, for up to three adapters that share x.

    forward    s_j[M, R_j]  = c_j * (mask_j * x)[M, K] @ A_j[R_j, K].T          side by side in one s [M, sum R_j]
    backward   dA_j[R_j, K] = c_j * ds_j.T @ (mask_j * x)        dx[M, K] += sum_j c_j * mask_j * (ds_j @ A_j)

x is read once for all of them, in the backward dx is read and written once. The masks are functions of (key, row,
column): they are made where they are used, in forward and again in backward, and never stored. A may be fp32 under a
16-bit x: its tiles are rounded in registers, so neither x nor A is copied. fp32 accumulation, one rounding on store; dA
is written in A's dtype. No atomics: where K (few tokens) or M (backward) is split among programs, their partial sums
are added in a second stage, in fixed order. The same in plain torch: reference.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, dropout, tiles
from .launch import Plan, planned
from .reduce import sum_partials, sum_partials_of
from .tiles import MOST, cdiv, dropout_mask, in_one_launch, input_precision, layout, rows, thrice, warps


@triton.jit
def _kept(x, key_ptr, m, k0, K, threshold, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr):
    """x with the mask of this key"""
    if DROPOUT:
        pairs = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        x = tl.where(dropout_mask(key_ptr, m, pairs, (K + 1) // 2, threshold), x, 0.0)
    return x


@triton.jit
def _add_product(
    acc, x, a_ptr, stride_a_r, R, key_ptr, threshold, m, k0, K, r0,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_R] + (mask * x) @ A.T"""
    r, k = r0 + tl.arange(0, BLOCK_R)[:, None], k0 + tl.arange(0, BLOCK_K)[None, :]
    a = tl.load(a_ptr + r * stride_a_r + k, mask=(r < R) & (k < K), other=0.0).to(x.dtype)
    x = _kept(x, key_ptr, m, k0, K, threshold, BLOCK_K, DROPOUT)
    return tl.dot(x, tl.trans(a), acc, input_precision=PRECISION)


@triton.jit
def _store(s_ptr, acc, c, m, M, stride_s_m, r0, R, BLOCK_R: tl.constexpr):
    r = r0 + tl.arange(0, BLOCK_R)[None, :]
    tl.store(s_ptr + m * stride_s_m + r, acc * tl.cast(c, tl.float32), mask=(m < M) & (r < R))


@triton.jit(do_not_specialize=["M", "steps_per_split"])
def _lora_down_fwd_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, s_ptr, key0_ptr, key1_ptr, key2_ptr,
    M, K, R0, R1, R2, steps_per_split,
    threshold0, threshold1, threshold2, c0, c1, c2,
    stride_x_m, stride_a0_r, stride_a1_r, stride_a2_r, stride_s_m,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    COUNT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows, one tile of every rank, steps_per_split tiles of K, to s_ptr[split]."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    r0 = tl.program_id(1) * BLOCK_R
    split = tl.program_id(2)
    acc0 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    start = split * steps_per_split * BLOCK_K
    for k0 in range(start, tl.minimum(start + steps_per_split * BLOCK_K, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
        x = tl.load(x_ptr + m * stride_x_m + k, mask=(m < M) & (k < K), other=0.0)
        acc0 = _add_product(
            acc0, x, a0_ptr, stride_a0_r, R0, key0_ptr, threshold0, m, k0, K, r0, BLOCK_K, BLOCK_R, DROPOUT, PRECISION
        )
        if COUNT > 1:
            acc1 = _add_product(
                acc1, x, a1_ptr, stride_a1_r, R1, key1_ptr, threshold1, m, k0, K, r0, BLOCK_K, BLOCK_R, DROPOUT,
                PRECISION,
            )  # fmt: skip
        if COUNT > 2:
            acc2 = _add_product(
                acc2, x, a2_ptr, stride_a2_r, R2, key2_ptr, threshold2, m, k0, K, r0, BLOCK_K, BLOCK_R, DROPOUT,
                PRECISION,
            )  # fmt: skip
    s_ptr += split.to(tl.int64) * M * stride_s_m
    _store(s_ptr, acc0, c0, m, M, stride_s_m, r0, R0, BLOCK_R)
    if COUNT > 1:
        _store(s_ptr + R0, acc1, c1, m, M, stride_s_m, r0, R1, BLOCK_R)
    if COUNT > 2:
        _store(s_ptr + R0 + R1, acc2, c2, m, M, stride_s_m, r0, R2, BLOCK_R)


@triton.jit
def _add_dA(
    acc, ds_ptr, stride_ds_m, R, x, key_ptr, threshold, m, M, k0, K, r0,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_R, BLOCK_K] + ds.T @ (mask * x)"""
    r = r0 + tl.arange(0, BLOCK_R)[None, :]
    ds = tl.load(ds_ptr + m * stride_ds_m + r, mask=(m < M) & (r < R), other=0.0)
    x = _kept(x, key_ptr, m, k0, K, threshold, BLOCK_K, DROPOUT)
    return tl.dot(tl.trans(ds), x, acc, input_precision=PRECISION)


@triton.jit
def _dx(
    ds_ptr, stride_ds_m, R, a_ptr, stride_a_r, key_ptr, threshold, c, m, M, k0, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_K]: c * mask * (ds @ A), over all of R"""
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    part = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        ds = tl.load(ds_ptr + m * stride_ds_m + r[None, :], mask=(m < M) & (r[None, :] < R), other=0.0)
        a = tl.load(a_ptr + r[:, None] * stride_a_r + k, mask=(r[:, None] < R) & (k < K), other=0.0)
        part = tl.dot(ds, a.to(ds.dtype), part, input_precision=PRECISION)
    return _kept(part * tl.cast(c, tl.float32), key_ptr, m, k0, K, threshold, BLOCK_K, DROPOUT)


@triton.jit
def _store_dA(da_ptr, acc, c, r0, R, k0, K, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    r, k = r0 + tl.arange(0, BLOCK_R)[:, None], k0 + tl.arange(0, BLOCK_K)[None, :]
    tl.store(da_ptr + r.to(tl.int64) * K + k, acc * tl.cast(c, tl.float32), mask=(r < R) & (k < K))


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _lora_down_bwd_kernel(
    ds_ptr, x_ptr, a0_ptr, a1_ptr, a2_ptr, dx_ptr, da_ptr, key0_ptr, key1_ptr, key2_ptr,
    M, K, R0, R1, R2, rows_per_split,
    threshold0, threshold1, threshold2, c0, c1, c2,
    stride_ds_m, stride_x_m, stride_a0_r, stride_a1_r, stride_a2_r, stride_dx_m,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, COUNT: tl.constexpr,
    NEEDS_DA: tl.constexpr, NEEDS_DX: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K columns, rows_per_split rows. dA goes to da_ptr[split, R0 + R1 + R2, K], one tile of every
    rank per program; dx needs the sum over all ranks, so with several tiles the two are computed by separate launches.
    """
    k0 = tl.program_id(0) * BLOCK_K
    split = tl.program_id(1).to(tl.int64)
    r0 = tl.program_id(2) * BLOCK_R
    k = k0 + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
    acc0 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    acc1 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    acc2 = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    start = split * rows_per_split
    for m0 in range(start, tl.minimum(start + rows_per_split, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
        inside = (m < M) & (k < K)
        if NEEDS_DA:
            x = tl.load(x_ptr + m * stride_x_m + k, mask=inside, other=0.0)
            acc0 = _add_dA(
                acc0, ds_ptr, stride_ds_m, R0, x, key0_ptr, threshold0, m, M, k0, K, r0, BLOCK_K, BLOCK_R, DROPOUT,
                PRECISION,
            )  # fmt: skip
            if COUNT > 1:
                acc1 = _add_dA(
                    acc1, ds_ptr + R0, stride_ds_m, R1, x, key1_ptr, threshold1, m, M, k0, K, r0, BLOCK_K, BLOCK_R,
                    DROPOUT, PRECISION,
                )  # fmt: skip
            if COUNT > 2:
                acc2 = _add_dA(
                    acc2, ds_ptr + R0 + R1, stride_ds_m, R2, x, key2_ptr, threshold2, m, M, k0, K, r0, BLOCK_K, BLOCK_R,
                    DROPOUT, PRECISION,
                )  # fmt: skip
        if NEEDS_DX:
            dx_ptrs = dx_ptr + m * stride_dx_m + k
            dx = tl.load(dx_ptrs, mask=inside, other=0.0).to(tl.float32)
            dx += _dx(
                ds_ptr, stride_ds_m, R0, a0_ptr, stride_a0_r, key0_ptr, threshold0, c0, m, M, k0, K, BLOCK_M, BLOCK_K,
                BLOCK_R, DROPOUT, PRECISION,
            )  # fmt: skip
            if COUNT > 1:
                dx += _dx(
                    ds_ptr + R0, stride_ds_m, R1, a1_ptr, stride_a1_r, key1_ptr, threshold1, c1, m, M, k0, K, BLOCK_M,
                    BLOCK_K, BLOCK_R, DROPOUT, PRECISION,
                )  # fmt: skip
            if COUNT > 2:
                dx += _dx(
                    ds_ptr + R0 + R1, stride_ds_m, R2, a2_ptr, stride_a2_r, key2_ptr, threshold2, c2, m, M, k0, K,
                    BLOCK_M, BLOCK_K, BLOCK_R, DROPOUT, PRECISION,
                )  # fmt: skip
            tl.store(dx_ptrs, dx, mask=inside)
    if NEEDS_DA:
        da_ptr += split * (R0 + R1 + R2) * K
        _store_dA(da_ptr, acc0, c0, r0, R0, k0, K, BLOCK_K, BLOCK_R)
        if COUNT > 1:
            _store_dA(da_ptr + tl.cast(R0, tl.int64) * K, acc1, c1, r0, R1, k0, K, BLOCK_K, BLOCK_R)
        if COUNT > 2:
            _store_dA(da_ptr + tl.cast(R0 + R1, tl.int64) * K, acc2, c2, r0, R2, k0, K, BLOCK_K, BLOCK_R)


@planned
def _forward_plan(
    M: int, K: int, ranks: tuple[int, ...], distances: tuple[int, ...], p: tuple[float, ...], itemsize: int,
    aligned: bool, precision: str,
) -> tuple[int, Plan]:  # fmt: skip
    """(splits of K, the launch). distances: of the rows of x and of each A."""
    config = configs.lora_down_forward(max(ranks), itemsize, len(ranks))
    grid = cdiv(M, config["BLOCK_M"]), cdiv(max(ranks), config["BLOCK_R"])
    splits, steps = configs.split_lora_down(M, K, config["BLOCK_K"], grid[0] * grid[1])
    numbers = (M, K, *thrice(ranks, 0), steps, *_dropout(p), distances[0], *thrice(distances[1:], distances[1]))
    return splits, Plan(
        _lora_down_fwd_kernel, (*grid, splits), (*numbers, sum(ranks)),
        COUNT=len(ranks), DROPOUT=any(p), PRECISION=precision, num_warps=warps(aligned), enable_fp_fusion=True,
        **config,
    )  # fmt: skip


def lora_down_group(x: Tensor, A: Sequence[Tensor], p: Sequence[float], key: Sequence[Tensor | None]) -> Tensor:
    """s [M, sum R_j] in x's dtype from x [M, K] and up to three A_j [R_j, K]; key_j int32 [2] where p_j > 0."""
    x, A = rows(x), [rows(a) for a in A]
    (M, K), ranks, itemsize = x.shape, tuple([a.shape[0] for a in A]), x.element_size()
    if M == 0:
        return x.new_empty(0, sum(ranks))
    distances, aligned = layout(x, *A)
    if len(A) > 1 and not in_one_launch(itemsize, aligned):
        return torch.cat([lora_down(x, *adapter) for adapter in zip(A, p, key)], dim=1)
    splits, launch = _forward_plan(M, K, ranks, distances, tuple(p), itemsize, aligned, input_precision())
    if splits == 1:
        s = x.new_empty(M, sum(ranks))
    else:
        s = torch.empty((splits, M, sum(ranks)), dtype=torch.float32, device=x.device)
    launch(x, *thrice(A, A[0]), s, *_keys(key))
    return s if splits == 1 else sum_partials(s, x.dtype)


class _Backward(NamedTuple):
    """Splits of M, and the launches: one, or with ranks of more than one tile dA's and dx's."""

    splits: int
    launches: tuple[Plan, ...]


@planned
def _backward_plan(
    M: int, K: int, ranks: tuple[int, ...], distances: tuple[int, ...], p: tuple[float, ...], itemsize: int,
    aligned: bool, narrows: bool, needs_dA: bool, needs_dx: bool, capability: int, precision: str,
) -> _Backward:  # fmt: skip
    """distances: of the rows of ds, x, dx and of each A. narrows: an A is wider than x."""
    config = configs.lora_down_backward(capability, max(ranks), itemsize, len(ranks), aligned, needs_dx, narrows)
    columns, rank_tiles = cdiv(K, config["BLOCK_K"]), cdiv(max(ranks), config["BLOCK_R"])
    splits, rows_per_split = configs.split_rows(M, config["BLOCK_M"], columns)
    of_ds, of_x, of_dx, *of_A = distances
    numbers = (M, K, *thrice(ranks, 0), rows_per_split, *_dropout(p), of_ds, of_x, *thrice(of_A, of_A[0]))
    passes = [(needs_dA, needs_dx)] if rank_tiles == 1 else [(needs_dA, False), (False, needs_dx)]
    launches = [
        Plan(
            _lora_down_bwd_kernel, (columns, splits, rank_tiles if dA else 1), (*numbers, of_dx if needs_dx else 0),
            COUNT=len(ranks), NEEDS_DA=dA, NEEDS_DX=dx, DROPOUT=any(p), PRECISION=precision,
            num_warps=warps(aligned), enable_fp_fusion=True, **config,
        )
        for dA, dx in passes
        if dA or dx
    ]  # fmt: skip
    return _Backward(splits, tuple(launches))


def lora_down_group_backward(
    ds: Tensor,
    x: Tensor,
    A: Sequence[Tensor],
    p: Sequence[float],
    key: Sequence[Tensor | None],
    dx: Tensor | None = None,
    needs_dA: bool = True,
) -> list[Tensor | None]:
    """dA_j [R_j, K] in the dtype of A_j, None where they are not needed; the adapters' part is added to dx [M, K], in
    place, if given. ds [M, sum R_j]."""
    assert dx is None or dx.stride(1) == 1
    x, A, ds = rows(x), [rows(a) for a in A], rows(ds)
    (M, K), ranks, itemsize = x.shape, tuple([a.shape[0] for a in A]), x.element_size()
    if M == 0 or K == 0:
        return [a.new_zeros(a.shape) if needs_dA else None for a in A]
    if len(A) > 1 and not in_one_launch(itemsize, layout(x, *A)[1]):
        adapters = zip(ds.split(ranks, dim=1), A, p, key)
        return [lora_down_backward(ds_j, x, a, q, k, dx, needs_dA) for ds_j, a, q, k in adapters]
    distances, aligned = layout(x, x if dx is None else dx, *A)
    plan = _backward_plan(
        M, K, ranks, (ds.stride(0), *distances), tuple(p), itemsize, aligned,
        any(a.element_size() > itemsize for a in A), needs_dA, dx is not None, configs.capability(x.device),
        input_precision(),
    )  # fmt: skip
    whole = plan.splits == 1 and len(A) == 1  # nothing to add, and nothing beside it
    dtype = A[0].dtype if whole else torch.float32
    partial = torch.empty((plan.splits if needs_dA else 0, sum(ranks), K), dtype=dtype, device=x.device)
    for launch in plan.launches:
        launch(ds, x, *thrice(A, A[0]), x if dx is None else dx, partial, *_keys(key))
    if not needs_dA:
        return [None] * len(A)
    return [partial[0]] if whole else list(sum_partials_of(partial, A))


def _keys(key: Sequence[Tensor | None]) -> list[Tensor | None]:
    """One without dropout is given another's key, and by `_dropout` a threshold of 0, which drops nothing."""
    given = [k for k in key if k is not None]
    return [given[0] if k is None else k for k in thrice(key, None)] if given else [None] * MOST


def _dropout(p: tuple[float, ...]) -> tuple[float, ...]:
    """Three thresholds and three corrections"""
    p = (*p, 0.0, 0.0)[:3]
    return (*[dropout.threshold(q) for q in p], *[dropout.correction(q) for q in p])


def lora_down(x: Tensor, A: Tensor, p: float = 0.0, key: Tensor | None = None) -> Tensor:
    """s [M, R] in x's dtype from x [M, K] and A [R, K]; `key` int32 [2] where p > 0."""
    return lora_down_group(x, [A], [p], [key])


def lora_down_backward(
    ds: Tensor,
    x: Tensor,
    A: Tensor,
    p: float = 0.0,
    key: Tensor | None = None,
    dx: Tensor | None = None,
    needs_dA: bool = True,
) -> Tensor | None:
    """dA [R, K] in A's dtype, None where it is not needed; LoRA's part is added to dx [M, K], in place, if given."""
    return lora_down_group_backward(ds, x, [A], [p], [key], dx, needs_dA)[0]


def why_not(dtype: torch.dtype) -> str | None:
    """The reason these kernels cannot take x of this dtype, or None where they can. Shapes and strides are free."""
    return tiles.why_not("x", dtype)
