"""DoRA's magnitudes (arXiv 2402.09353): every column of a linear layer's output times a number of its own.

    forward    y[M, N]  = z[M, N] * factor[N] + bias[N]
    backward   dz[M, N] = dy * factor              dfactor[N] = sum over M of dy * z

The backward reads dy and z once for both outputs: a program owns a slab of rows of some columns, and leaves its part of
the sum, which a second stage adds in fixed order. fp32 inside, one rounding on store, no tensor cores: it runs on every
GPU that Triton knows. The same in plain torch: reference_dora.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import Plan, planned
from .reduce import sum_partials
from .tiles import cdiv, rows

FORWARD = dict(BLOCK=1024, num_warps=4, enable_fp_fusion=True)  # elements of a row, as in glu.py
# 16 elements a thread of two matrices: 16 bytes a load where they are 16 bits wide. A slab of 64 rows leaves a sum of
# 1/64 of dy's elements, in fp32: a hundredth of what the pass reads and writes.
BACKWARD = dict(BLOCK_M=8, BLOCK_N=256, STEPS=8, num_warps=4, enable_fp_fusion=True)


@triton.jit
def _scale_columns_fwd_kernel(
    z_ptr, factor_ptr, bias_ptr, y_ptr,
    N, stride_z_m,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, per_row = tl.program_id(0), tl.cdiv(N, BLOCK)  # along a row first: no axis of the grid is short for M
    m, n = (program // per_row).to(tl.int64), (program % per_row) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(z_ptr + m * stride_z_m + n, mask=n < N, other=0.0).to(tl.float32)
    y *= tl.load(factor_ptr + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, y, mask=n < N)


@triton.jit(do_not_specialize=["M"])
def _scale_columns_bwd_kernel(
    dy_ptr, z_ptr, factor_ptr, dz_ptr, partial_ptr,
    M, N, stride_dy_m, stride_z_m,
    NEEDS_DZ: tl.constexpr, NEEDS_DFACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: STEPS * BLOCK_M rows of BLOCK_N columns. Its part of dfactor goes to partial_ptr[program, N]."""
    slab = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    factor = tl.load(factor_ptr + n, mask=n < N, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(STEPS):
        m = (slab * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
        inside = (m < M) & (n < N)
        dy = tl.load(dy_ptr + m * stride_dy_m + n, mask=inside, other=0.0).to(tl.float32)
        if NEEDS_DFACTOR:
            total += dy * tl.load(z_ptr + m * stride_z_m + n, mask=inside, other=0.0).to(tl.float32)
        if NEEDS_DZ:
            tl.store(dz_ptr + m * N + n, dy * factor, mask=inside)
    if NEEDS_DFACTOR:
        tl.store(partial_ptr + slab * N + n, tl.sum(total, axis=0)[None, :], mask=n < N)


def scale_columns(z: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [M, N] = z * factor + bias in z's dtype; factor [N] in fp32. The rows of z may lie apart."""
    z, (M, N) = rows(z), z.shape
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        _forward_plan(M, N, z.stride(0), bias is not None)(z, factor.contiguous(), bias, y)
    return y


@planned
def _forward_plan(M: int, N: int, of_z: int, has_bias: bool) -> Plan:
    grid = (M * cdiv(N, FORWARD["BLOCK"]),)
    return Plan(_scale_columns_fwd_kernel, grid, (N, of_z), HAS_BIAS=has_bias, **FORWARD)


def scale_columns_backward(
    dy: Tensor, z: Tensor, factor: Tensor, needs_dz: bool = True, needs_dfactor: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dz [M, N] in dy's dtype and dfactor [N] in fp32, each None where it is not needed."""
    dy, z, factor, (M, N) = rows(dy), rows(z), factor.contiguous(), dy.shape
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format) if needs_dz else None
    slabs = _slabs(M)
    partial = factor.new_empty((slabs, 1, N)) if needs_dfactor else None
    if dy.numel() and (needs_dz or needs_dfactor):
        launch = _backward_plan(M, N, dy.stride(0), z.stride(0), needs_dz, needs_dfactor)
        launch(dy, z, factor, dz, partial)
    return dz, None if partial is None else sum_partials(partial, torch.float32)[0]


@planned
def _backward_plan(M: int, N: int, of_dy: int, of_z: int, needs_dz: bool, needs_dfactor: bool) -> Plan:
    grid = _slabs(M), cdiv(N, BACKWARD["BLOCK_N"])
    constants = dict(NEEDS_DZ=needs_dz, NEEDS_DFACTOR=needs_dfactor, **BACKWARD)
    return Plan(_scale_columns_bwd_kernel, grid, (M, N, of_dy, of_z), **constants)


def _slabs(M: int) -> int:
    return cdiv(M, BACKWARD["BLOCK_M"] * BACKWARD["STEPS"])


def why_not(dtype: torch.dtype, factor_dtype: torch.dtype) -> str | None:
    """The reason these kernels cannot take z and factor of these dtypes, or None. Shapes and strides are free."""
    if factor_dtype != torch.float32:
        return f"factor is {factor_dtype}, the kernels take float32"
    return tiles.why_not("z", dtype)
