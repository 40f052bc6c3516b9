"""W'[N, K] = code * scale(block) + scale * B[N, R] @ A[R, K], rounded once: the adapter merged on the way out.

For the price of a dequantisation every product with W' includes LoRA. The sum is taken in fp32 on the exact weight: an
update below half an ulp of W would be lost if W were rounded first. A and B may be fp32 under a 16-bit W': their tiles
are rounded in registers, as for every other product. Optionally the 2-norms of the rows of the unrounded sum (DoRA,
arXiv 2402.09353, section 4.1): partial sums of squares per tile, added by a second stage in fixed order, no atomics.

Compiled without contraction, so that code * scale is rounded to fp32 before the sum. The same in plain torch:
reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.quant.weight import Format, QuantizedWeight

from . import configs, decode, tiles
from .launch import Plan, planned
from .reduce import sum_partials
from .tiles import cdiv, input_precision, layout, rows


@triton.jit
def _dequantize_merge_kernel(
    data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    a_ptr, b_ptr, out_ptr, squares_ptr,
    scale, N, K, R,
    stride_a_r, stride_b_n,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    G: tl.constexpr, NESTED_G: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    NEEDS_NORMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of W'. squares_ptr[program_id(0), N]: the tile's share of the squared norms."""
    k0, n0 = tl.program_id(0) * BLOCK_K, tl.program_id(1) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N, 1]
    k = k0 + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
    dtype = out_ptr.dtype.element_ty
    delta = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        b = tl.load(b_ptr + n.to(tl.int64) * stride_b_n + r[None, :], mask=(n < N) & (r[None, :] < R), other=0.0)
        a = tl.load(a_ptr + r[:, None].to(tl.int64) * stride_a_r + k, mask=(r[:, None] < R) & (k < K), other=0.0)
        delta = tl.dot(b.to(dtype), a.to(dtype), delta, input_precision=PRECISION)
    weight = decode.tile(
        data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
        n0, k0, N, K, BLOCK_N, BLOCK_K, G, NESTED_G, UNIT, ALIGNED, EVEN,
    )  # fmt: skip
    merged = weight + delta * tl.cast(scale, tl.float32)
    inside = None if EVEN else (n < N) & (k < K)
    tl.store(out_ptr + n.to(tl.int64) * K + k, merged, mask=inside)
    if NEEDS_NORMS:
        counted = merged if EVEN else tl.where(k < K, merged, 0.0)
        row = n0 + tl.arange(0, BLOCK_N)
        tl.store(squares_ptr + tl.program_id(0).to(tl.int64) * N + row, tl.sum(counted * counted, axis=1), mask=row < N)


def dequantize_merge(
    weight: QuantizedWeight, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype, needs_norms: bool = False
) -> tuple[Tensor, Tensor | None]:
    """W' [N, K] in `dtype` from A [R, K] and B [N, R]; and, if asked for, its rows' 2-norms, float32 [N]."""
    A, B = rows(A), rows(B)
    (N, K), R = weight.shape, A.shape[0]
    out = torch.empty(N, K, dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out, torch.zeros(N, device=weight.device) if needs_norms else None
    columns, launch = _plan(
        weight.format, decode.is_aligned(weight), R, (A.stride(0), B.stride(0)), scale, out.element_size(),
        K % 16 == 0 and layout(A)[1], needs_norms, input_precision(),
    )  # fmt: skip
    squares = torch.empty(columns, N, dtype=torch.float32, device=weight.device) if needs_norms else None
    launch(*decode.pointers(weight), A, B, out, squares)
    return out, None if squares is None else sum_partials(squares[:, None], torch.float32, root=True)[0]


@planned
def _plan(
    fmt: Format, whole_words: bool, R: int, distances: tuple[int, int], scale: float, itemsize: int, aligned: bool,
    needs_norms: bool, precision: str,
) -> tuple[int, Plan]:  # fmt: skip
    """(programs along K, the launch). distances: of the rows of A and B; aligned: A and W'."""
    config = configs.dequantize_merge(itemsize, aligned)
    columns = cdiv(fmt.K, config["BLOCK_K"])
    return columns, Plan(
        _dequantize_merge_kernel, (columns, cdiv(fmt.N, config["BLOCK_N"])),
        (scale, fmt.N, fmt.K, R, *distances),
        **decode.tile_constants(fmt, whole_words, config["BLOCK_N"], config["BLOCK_K"]),
        NEEDS_NORMS=needs_norms, PRECISION=precision, enable_fp_fusion=False, **config,
    )  # fmt: skip


def why_not(fmt: Format, dtype: torch.dtype) -> str | None:
    """The reason this kernel cannot write W' in this dtype, or None where it can. Strides are free, N and K odd too."""
    return tiles.why_not("W'", dtype) or decode.why_not(fmt)
