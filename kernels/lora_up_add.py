"""LoRA's up projection, added to the base layer's output in the same pass, and its backward.

    forward    y[M, N] += bias[N] + scale * s[M, R] @ B[N, R].T          in place
    backward   ds[M, R] = scale * dy[M, N] @ B         dB[N, R] = scale * dy.T @ s

The forward reads y once and writes it once; s @ B.T never reaches memory. The backward reads dy once for both outputs:
a program owns rows of dy, keeps its ds in registers and leaves a partial dB, which a second stage sums in fixed order.
B may be fp32 under a 16-bit y: its tiles are rounded in registers. fp32 accumulation, one rounding on store; dB is
written in B's dtype. The same in plain torch: reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, tiles
from .reduce import sum_partials
from .tiles import input_precision, rows, warps

SLAB = 8192  # rows of dy per launch of the backward: bounds its workspace at SLAB / BLOCK_M * N * R * 4 bytes,
# 59 MB for N = 14336, R = 16


@triton.jit(do_not_specialize=["M"])
def _lora_up_add_fwd_kernel(
    y_ptr, s_ptr, b_ptr, bias_ptr,
    scale, M, N, R,
    stride_y_m, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
        s = tl.load(s_ptr + m * R + r, mask=(m < M) & (r < R), other=0.0)
        b = tl.load(b_ptr + n[:, None] * stride_b_n + r, mask=(n[:, None] < N) & (r < R), other=0.0)
        acc = tl.dot(s, tl.trans(b.to(s.dtype)), acc, input_precision=PRECISION)
    acc *= tl.cast(scale, tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M) & (n[None, :] < N)
    y_ptrs = y_ptr + m * stride_y_m + n[None, :]
    tl.store(y_ptrs, tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32) + acc, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _lora_up_bwd_kernel(
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr,
    scale, M, N, R,
    stride_dy_m, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of dy, one tile of R. dB goes to db_ptr[program, N, R]."""
    program = tl.program_id(0).to(tl.int64)
    m = program * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    factor = tl.cast(scale, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    s = tl.load(s_ptr + m * R + r, mask=(m < M) & (r < R), other=0.0)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        dy = tl.load(dy_ptr + m * stride_dy_m + n[None, :], mask=(m < M) & (n[None, :] < N), other=0.0)
        of_b = (n[:, None] < N) & (r < R)
        if NEEDS_DS:
            b = tl.load(b_ptr + n[:, None] * stride_b_n + r, mask=of_b, other=0.0).to(dy.dtype)
            acc = tl.dot(dy, b, acc, input_precision=PRECISION)
        if NEEDS_DB:
            db = tl.dot(tl.trans(dy), s, input_precision=PRECISION) * factor
            tl.store(db_ptr + (program * N + n[:, None]) * R + r, db, mask=of_b)
    if NEEDS_DS:
        tl.store(ds_ptr + m * R + r, acc * factor, mask=(m < M) & (r < R))


def lora_up_add_(y: Tensor, s: Tensor, B: Tensor, scale: float, bias: Tensor | None = None) -> None:
    """y [M, N] += bias + scale * s @ B.T, in place. The rows of y must be dense."""
    assert y.stride(1) == 1
    (M, N), R, B = y.shape, B.shape[1], rows(B)
    if y.numel() == 0:
        return
    bias = None if bias is None else bias.contiguous()
    config = configs.lora_up_forward(R, y.element_size())
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"]))
    _lora_up_add_fwd_kernel[grid](
        y, s.contiguous(), B, bias, scale, M, N, R, y.stride(0), B.stride(0),
        HAS_BIAS=bias is not None, PRECISION=input_precision(), num_warps=warps(y, B), enable_fp_fusion=True, **config,
    )  # fmt: skip


def lora_up_backward(
    dy: Tensor, s: Tensor, B: Tensor, scale: float, needs_ds: bool = True, needs_dB: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """ds [M, R] in dy's dtype and dB [N, R] in B's, each None where it is not needed."""
    dy, s, B = rows(dy), s.contiguous(), rows(B)
    (M, N), R = dy.shape, B.shape[1]
    ds = dy.new_empty(M, R) if needs_ds else None
    dB: Tensor | None = None
    config = configs.lora_up_backward(R, dy.element_size())
    for start in range(0, M, SLAB):
        slab = slice(start, min(start + SLAB, M))
        programs = triton.cdiv(slab.stop - start, config["BLOCK_M"])
        partial = torch.empty((programs if needs_dB else 0, N, R), dtype=torch.float32, device=dy.device)
        _lora_up_bwd_kernel[(programs, triton.cdiv(R, config["BLOCK_R"]))](
            dy[slab], s[slab], B, partial if ds is None else ds[slab], partial,
            scale, slab.stop - start, N, R, dy.stride(0), B.stride(0),
            NEEDS_DS=needs_ds, NEEDS_DB=needs_dB, PRECISION=input_precision(),
            num_warps=warps(dy), enable_fp_fusion=True, **config,
        )  # fmt: skip
        if needs_dB:
            last = slab.stop == M
            dB = sum_partials(partial, B.dtype if last else torch.float32, start=dB)
    if not needs_dB:
        return ds, None
    return ds, B.new_zeros(B.shape) if dB is None else dB


def why_not(dtype: torch.dtype) -> str | None:
    """The reason these kernels cannot take y of this dtype, or None where they can. Shapes and strides are free."""
    return tiles.why_not("y", dtype)
