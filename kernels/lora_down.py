"""LoRA's down projection with dropout inside, and its backward.

    forward    s[M, R]  = c * (mask * x)[M, K] @ A[R, K].T
    backward   dA[R, K] = c * ds.T @ (mask * x)        dx[M, K] += c * mask * (ds @ A)

The mask is a function of (key, row, column): it is made where it is used, in forward and again in backward, and never
stored. A may be fp32 under a 16-bit x: its tiles are rounded in registers, so neither x nor A is copied. fp32
accumulation, one rounding on store; dA is written in A's dtype. No atomics: where M is split among programs, their
partial dA's are summed in a second stage, in fixed order. The same in plain torch: reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, dropout, tiles
from .reduce import sum_partials
from .tiles import dropout_mask, input_precision, rows, warps

PROGRAMS = 256  # how many programs the backward aims at, about two per SM of the cards we know; not device dependent,
# so that the order of the sums, and with it every bit of the result, is the same on all of them


@triton.jit(do_not_specialize=["M"])
def _lora_down_fwd_kernel(
    x_ptr, a_ptr, s_ptr, key_ptr,
    M, K, R, threshold, c,
    stride_x_m, stride_a_r,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    r0 = tl.program_id(1) * BLOCK_R
    r = r0 + tl.arange(0, BLOCK_R)[:, None]  # [BLOCK_R, 1]
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
        x = tl.load(x_ptr + m * stride_x_m + k, mask=(m < M) & (k < K), other=0.0)
        if DROPOUT:
            pairs = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            x = tl.where(dropout_mask(key_ptr, m, pairs, (K + 1) // 2, threshold), x, 0.0)
        a = tl.load(a_ptr + r * stride_a_r + k, mask=(r < R) & (k < K), other=0.0).to(x.dtype)
        acc = tl.dot(x, tl.trans(a), acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= tl.cast(c, tl.float32)
    r = r0 + tl.arange(0, BLOCK_R)[None, :]
    tl.store(s_ptr + m * R + r, acc, mask=(m < M) & (r < R))


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _lora_down_bwd_kernel(
    ds_ptr, x_ptr, a_ptr, dx_ptr, da_ptr, key_ptr,
    M, K, R, rows_per_split, threshold, c,
    stride_x_m, stride_a_r, stride_dx_m,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    NEEDS_DA: tl.constexpr, NEEDS_DX: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K columns, rows_per_split rows. dA goes to da_ptr[split, R, K], one tile of R per program;
    dx needs the sum over all of R, so with several tiles the two are computed by separate launches."""
    k0 = tl.program_id(0) * BLOCK_K
    split = tl.program_id(1).to(tl.int64)
    r0 = tl.program_id(2) * BLOCK_R
    k = k0 + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
    scale = tl.cast(c, tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    start = split * rows_per_split
    for m0 in range(start, tl.minimum(start + rows_per_split, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
        inside = (m < M) & (k < K)
        if DROPOUT:
            pairs = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            keep = dropout_mask(key_ptr, m, pairs, (K + 1) // 2, threshold)
        if NEEDS_DA:
            r = r0 + tl.arange(0, BLOCK_R)
            ds = tl.load(ds_ptr + m * R + r[None, :], mask=(m < M) & (r[None, :] < R), other=0.0)
            x = tl.load(x_ptr + m * stride_x_m + k, mask=inside, other=0.0)
            if DROPOUT:
                x = tl.where(keep, x, 0.0)
            acc = tl.dot(tl.trans(ds), x, acc, input_precision=PRECISION)
        if NEEDS_DX:
            part = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for first in range(0, R, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                ds = tl.load(ds_ptr + m * R + r[None, :], mask=(m < M) & (r[None, :] < R), other=0.0)
                a = tl.load(a_ptr + r[:, None] * stride_a_r + k, mask=(r[:, None] < R) & (k < K), other=0.0)
                part = tl.dot(ds, a.to(ds.dtype), part, input_precision=PRECISION)
            if DROPOUT:
                part = tl.where(keep, part * scale, 0.0)
            dx = tl.load(dx_ptr + m * stride_dx_m + k, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + m * stride_dx_m + k, dx + part, mask=inside)
    if NEEDS_DA:
        r = r0 + tl.arange(0, BLOCK_R)[:, None]
        tl.store(da_ptr + (split * R + r) * K + k, acc * scale, mask=(r < R) & (k < K))


def lora_down(x: Tensor, A: Tensor, p: float = 0.0, key: Tensor | None = None) -> Tensor:
    """s [M, R] in x's dtype from x [M, K] and A [R, K]; `key` int32 [2] where p > 0."""
    x, A = rows(x), rows(A)
    (M, K), R = x.shape, A.shape[0]
    s = x.new_empty(M, R)
    if M:
        config = configs.lora_down_forward(R, x.element_size())
        _lora_down_fwd_kernel[(triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(R, config["BLOCK_R"]))](
            x, A, s, key, M, K, R, dropout.threshold(p), dropout.correction(p), x.stride(0), A.stride(0),
            DROPOUT=p > 0, PRECISION=input_precision(), num_warps=warps(x, A), enable_fp_fusion=True, **config,
        )  # fmt: skip
    return s


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
    assert dx is None or dx.stride(1) == 1
    x, A, ds = rows(x), rows(A), ds.contiguous()
    (M, K), R = x.shape, A.shape[0]
    if M == 0:
        return A.new_zeros(A.shape) if needs_dA else None
    config = configs.lora_down_backward(R, x.element_size())
    columns = triton.cdiv(K, config["BLOCK_K"])
    steps = triton.cdiv(M, config["BLOCK_M"])
    splits = min(steps, triton.cdiv(PROGRAMS, columns))
    rows_per_split = triton.cdiv(steps, splits) * config["BLOCK_M"]
    splits = triton.cdiv(M, rows_per_split)
    partial = torch.empty((splits, R, K), dtype=A.dtype if splits == 1 else torch.float32, device=x.device)
    rank_tiles = triton.cdiv(R, config["BLOCK_R"])
    together = rank_tiles == 1
    for dA_pass, dx_pass in [(needs_dA, dx is not None)] if together else [(needs_dA, False), (False, dx is not None)]:
        if dA_pass or dx_pass:
            _lora_down_bwd_kernel[(columns, splits, rank_tiles if dA_pass else 1)](
                ds, x, A, x if dx is None else dx, partial, key,
                M, K, R, rows_per_split, dropout.threshold(p), dropout.correction(p),
                x.stride(0), A.stride(0), 0 if dx is None else dx.stride(0),
                NEEDS_DA=dA_pass, NEEDS_DX=dx_pass, DROPOUT=p > 0, PRECISION=input_precision(),
                num_warps=warps(x, A, x if dx is None else dx), enable_fp_fusion=True, **config,
            )  # fmt: skip
    if not needs_dA:
        return None
    return partial[0] if splits == 1 else sum_partials(partial, A.dtype)


def why_not(dtype: torch.dtype) -> str | None:
    """The reason these kernels cannot take x of this dtype, or None where they can. Shapes and strides are free."""
    return tiles.why_not("x", dtype)
