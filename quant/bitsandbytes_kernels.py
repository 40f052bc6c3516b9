"""bitsandbytes' own code for 4-bit weights, where it wins: its C++ dequantisation on a CPU, its fused product on a GPU.

Only where it is loaded already (a model with its layers loads it), and only where it is right: up to version 0.50 its
CPU code takes the wrong scales where 16 divides K and the block size does not (tests/test_quant.py shows it).
"""

import sys

import torch
from torch import Tensor

from .weight import DTYPES, Format, QuantizedWeight


def is_loaded() -> bool:
    return "bitsandbytes" in sys.modules


def _why_not(op: str, fmt: Format) -> str | None:
    if not is_loaded() or not hasattr(torch.ops.bitsandbytes, op):
        return f"bitsandbytes is not loaded, or has no {op} (0.50 has)"
    if fmt.bits != 4:
        return "the weight has 8 bits"
    if fmt.K % fmt.blocksize:
        return f"K = {fmt.K} is no multiple of the block size {fmt.blocksize}"
    if fmt.nested_blocksize not in (0, 256):
        return f"its nested scales come in blocks of 256, not {fmt.nested_blocksize}"
    return None


def why_not_dequantize(fmt: Format, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason not to dequantise with bitsandbytes, or None: a CPU, whole blocks in a row, a float dtype."""
    if device.type != "cpu":
        return "on a GPU ours takes one launch, bitsandbytes three"
    if dtype not in DTYPES:
        return f"it does not write {dtype}"
    if fmt.blocksize >= 2048:
        return "it has no C++ for blocks of 2048 and more"
    return _why_not("dequantize_4bit", fmt)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`, bit for bit what blockwise.dequantize gives."""
    lib, scales = torch.ops.bitsandbytes, weight.absmax
    if weight.nested is not None:
        inner = weight.nested
        scales = lib.dequantize_blockwise(scales, inner.absmax, inner.code, inner.blocksize, torch.float32)
        scales += inner.offset
    return lib.dequantize_4bit(
        weight.data.view(-1, 1), scales, weight.blocksize, weight.quant_type, weight.shape, dtype
    )


def why_not_matmul(fmt: Format, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason not to multiply with bitsandbytes' fused kernel, or None: a GPU, 16-bit x; fp16 only on a T4."""
    if device.type != "cuda":
        return "it has one for GPUs only"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it multiplies {dtype} without tensor cores"
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "before sm_80 it has tensor cores for float16 only"
    return _why_not("gemm_4bit", fmt)


def matmul(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias, in x's dtype, decoded inside the product."""
    absmax, rest = weight.absmax, {}
    if weight.nested is not None:
        inner = weight.nested
        absmax, rest = (
            inner.absmax,
            dict(absmax_8bit=weight.absmax, absmax_code=inner.code, absmax_offset=inner.offset.view(())),
        )
    return torch.ops.bitsandbytes.gemm_4bit(
        x, weight.data.view(-1, 1), weight.shape, absmax, weight.blocksize, weight.quant_type, bias=bias, **rest
    )
