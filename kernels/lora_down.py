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

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, dropout, tiles
from .reduce import sum_partials, sum_partials_of
from .tiles import dropout_mask, in_one_launch, input_precision, rows, strides, thrice, warps


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


def lora_down_group(x: Tensor, A: Sequence[Tensor], p: Sequence[float], key: Sequence[Tensor | None]) -> Tensor:
    """s [M, sum R_j] in x's dtype from x [M, K] and up to three A_j [R_j, K]; key_j int32 [2] where p_j > 0."""
    x, A = rows(x), [rows(a) for a in A]
    (M, K), ranks = x.shape, [a.shape[0] for a in A]
    if M == 0:
        return x.new_empty(0, sum(ranks))
    if not in_one_launch(x, A):
        return torch.cat([lora_down(x, *adapter) for adapter in zip(A, p, key)], dim=1)
    config = configs.lora_down_forward(max(ranks), x.element_size(), len(A))
    grid = triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(max(ranks), config["BLOCK_R"])
    splits, steps = configs.split_lora_down(M, K, config["BLOCK_K"], grid[0] * grid[1])
    s = torch.empty((splits, M, sum(ranks)), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    keys, thresholds, corrections = _dropout(p, key)
    _lora_down_fwd_kernel[(*grid, splits)](
        x, *thrice(A, A[0]), s, *keys, M, K, *thrice(ranks, 0), steps, *thresholds, *corrections,
        x.stride(0), *strides(A), s.stride(1),
        COUNT=len(A), DROPOUT=any(p), PRECISION=input_precision(), num_warps=warps(x, *A), enable_fp_fusion=True,
        **config,
    )  # fmt: skip
    return s[0] if splits == 1 else sum_partials(s, x.dtype)


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
    (M, K), ranks = x.shape, [a.shape[0] for a in A]
    if M == 0 or K == 0:
        return [a.new_zeros(a.shape) if needs_dA else None for a in A]
    if not in_one_launch(x, A):
        adapters = zip(ds.split(ranks, dim=1), A, p, key)
        return [lora_down_backward(ds_j, x, a, q, k, dx, needs_dA) for ds_j, a, q, k in adapters]
    threads = warps(x, *A, x if dx is None else dx)
    config = configs.lora_down_backward(
        x.device, max(ranks), x.element_size(), len(A), aligned=threads == 4, needs_dx=dx is not None,
        narrows=any(a.element_size() > x.element_size() for a in A),
    )  # fmt: skip
    columns, steps = triton.cdiv(K, config["BLOCK_K"]), triton.cdiv(M, config["BLOCK_M"])
    splits = min(steps, triton.cdiv(configs.PROGRAMS["lora_backward"], columns))
    rows_per_split = triton.cdiv(steps, splits) * config["BLOCK_M"]
    splits = triton.cdiv(M, rows_per_split)
    whole = splits == 1 and len(A) == 1  # nothing to add, and nothing beside it
    dtype = A[0].dtype if whole else torch.float32
    partial = torch.empty((splits if needs_dA else 0, sum(ranks), K), dtype=dtype, device=x.device)
    keys, thresholds, corrections = _dropout(p, key)
    rank_tiles = triton.cdiv(max(ranks), config["BLOCK_R"])
    together = rank_tiles == 1
    for dA_pass, dx_pass in [(needs_dA, dx is not None)] if together else [(needs_dA, False), (False, dx is not None)]:
        if dA_pass or dx_pass:
            _lora_down_bwd_kernel[(columns, splits, rank_tiles if dA_pass else 1)](
                ds, x, *thrice(A, A[0]), x if dx is None else dx, partial, *keys,
                M, K, *thrice(ranks, 0), rows_per_split, *thresholds, *corrections,
                ds.stride(0), x.stride(0), *strides(A),
                0 if dx is None else dx.stride(0),
                COUNT=len(A), NEEDS_DA=dA_pass, NEEDS_DX=dx_pass, DROPOUT=any(p), PRECISION=input_precision(),
                num_warps=threads, enable_fp_fusion=True, **config,
            )  # fmt: skip
    if not needs_dA:
        return [None] * len(A)
    return [partial[0]] if whole else list(sum_partials_of(partial, A))


def _dropout(p: Sequence[float], key: Sequence[Tensor | None]) -> tuple[list, list[int], list[float]]:
    """Keys, thresholds and corrections as the kernels take them. One without dropout is given another's key and a
    threshold of 0, which drops nothing."""
    any_key = next((k for k in key if k is not None), None)
    keys = [any_key if k is None else k for k in thrice(key, None)]
    return keys, [dropout.threshold(q) for q in thrice(p, 0.0)], [dropout.correction(q) for q in thrice(p, 0.0)]


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
