"""W[N, K] = code[nibble] * scale(block), rounded once from fp32: 4-bit weights back to numbers, in one launch.

Nested scales are decoded inside, so nothing is written but W (bitsandbytes takes three launches and a fp32 copy of the
scales). Bit-exact with quant/blockwise.py: a nested scale is a product and a sum that are both rounded, which is why
the kernel is compiled without contraction to FMA. The sixteen codes sit in registers and are looked up with tl.gather:
14.5 SASS instructions per weight in all, to bf16 on sm_89 (bench/results/compile.csv).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.quant.weight import QuantizedWeight

from . import tiles

BLOCK = 4096  # elements per program: 16 bytes of codes per thread; a multiple of every quantisation block


@triton.jit
def _dequantize_kernel(
    data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr,
    numel, blocks,
    G: tl.constexpr, NESTED_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements, BLOCK // G whole quantisation blocks. NESTED_G = 0: plain scales."""
    program = tl.program_id(0).to(tl.int64)
    byte = program * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    packed = tl.load(data_ptr + byte, mask=byte < (numel + 1) // 2, other=0).to(tl.int32)
    code = tl.load(code_ptr + tl.arange(0, 16))
    values = tl.interleave(tl.gather(code, packed >> 4, 0), tl.gather(code, packed & 15, 0))  # [BLOCK]

    block = program * (BLOCK // G) + tl.arange(0, BLOCK // G)
    scale = tl.load(absmax_ptr + block, mask=block < blocks, other=0)
    if NESTED_G:
        scale = tl.load(nested_code_ptr + scale.to(tl.int32))
        scale = scale * tl.load(nested_absmax_ptr + block // NESTED_G, mask=block < blocks, other=0.0)
        scale = scale + tl.load(offset_ptr)
    values = (values.reshape(BLOCK // G, G) * scale[:, None]).reshape(BLOCK)

    element = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + element, values, mask=element < numel)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [N, K] in `dtype` (default: its own)."""
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    nested = weight.nested
    rest = (nested.absmax, nested.code, nested.offset) if nested else (None, None, None)
    if out.numel():
        _dequantize_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            weight.data, weight.absmax, weight.code, *rest, out, out.numel(), weight.absmax.numel(),
            G=weight.blocksize, NESTED_G=nested.blocksize if nested else 0, BLOCK=BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def why_not(dtype: torch.dtype) -> str | None:
    """The reason this kernel cannot write this dtype, or None where it can."""
    return tiles.why_not("the output", dtype)
