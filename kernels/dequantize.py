"""W[N, K] = code * scale(block), rounded once from fp32: k-bit weights back to numbers, in one launch.

Nested scales are decoded inside, so nothing is written but W (bitsandbytes takes three launches and a fp32 copy of the
scales). Bit-exact with quant/blockwise.py and quant/int8.py: both roundings of a nested scale, no contraction to FMA.

A thread reads a word of eight weights and writes their sixteen bytes, both coalesced, so nothing passes through shared
memory. NF4 to bf16 in nested blocks of 64 takes 5.4 to 5.8 SASS instructions per weight, all of the kernel counted, on
sm_80 to sm_120 (bench/results/compile). The same in plain torch: reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.quant.weight import QuantizedWeight

from . import configs, decode, tiles
from .launch import Plan, planned
from .tiles import cdiv


@triton.jit
def _dequantize_kernel(
    data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr,
    numel, blocks,
    G: tl.constexpr, NESTED_G: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements, BLOCK // G whole blocks. EVEN: every program is full, no masks."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    end = numel - first
    # "Contiguous by 1" keeps Triton from giving a thread four words in a row, whose 64 bytes it would have to
    # redistribute through shared memory before they can be stored coalesced.
    word = tl.max_contiguous(tl.arange(0, BLOCK // 8), 1)
    words = decode.load_words(data_ptr + first // 2, word, None if EVEN else word * 8 < end, (end + 1) // 2, ALIGNED)
    codes = decode.look_up(words, code_ptr)

    block0 = first // G
    block = word // (G // 8)
    inside = None if EVEN else block < blocks - block0
    outer = 0.0
    if NESTED_G:
        if NESTED_G % (BLOCK // G) == 0:  # as a rule: all blocks of the program share one nested scale
            outer = tl.load(nested_absmax_ptr + block0 // NESTED_G)
        else:
            group = (block0 + block) // NESTED_G
            outer = tl.load(nested_absmax_ptr + group, mask=inside, other=None if EVEN else 0.0)
    scale = decode.load_scales(
        absmax_ptr + block0, nested_code_ptr, offset_ptr, block, outer, inside, NESTED_G > 0
    )  # fmt: skip
    values = (codes.reshape(BLOCK // 8, 8) * scale[:, None]).reshape(BLOCK)

    element = tl.arange(0, BLOCK)
    tl.store(out_ptr + first + element, values, mask=None if EVEN else element < end)


@triton.jit
def _dequantize_int8_kernel(
    data_ptr, absmax_ptr, out_ptr,
    N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: a tile [BLOCK_N, BLOCK_K]; WIDTH elements make the 16 bytes that a thread stores at once. Rows count
    along the first axis of the grid, the others end at 65,535."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.max_contiguous(tl.arange(0, BLOCK_K), WIDTH)[None, :]
    inside = (n[:, None] < N) & (k < K)
    element = n[:, None].to(tl.int64) * K + k
    codes = tl.load(data_ptr + element, mask=inside).to(tl.float32)
    scale = tl.load(absmax_ptr + n, mask=n < N, other=0.0) * decode.INT8_PER_CODE
    tl.store(out_ptr + element, codes * scale[:, None], mask=inside)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The weight [N, K] in `dtype` (default: its own); into `out`, contiguous, if given."""
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    assert out.is_contiguous()
    assert out.shape == weight.shape
    N, K = weight.shape
    if out.numel() == 0:
        return out
    if weight.bits == 8:
        _int8_plan(N, K, out.element_size())(weight.data, weight.absmax, out)
    else:
        nested = weight.nested.blocksize if weight.nested else 0
        facts = (weight.absmax.numel(), weight.blocksize, nested, decode.is_aligned(weight))
        _plan(N * K, *facts, configs.capability(out.device))(*decode.pointers(weight), out)
    return out


@planned
def _int8_plan(N: int, K: int, itemsize: int) -> Plan:
    config = configs.dequantize_int8(K)
    grid = cdiv(N, config["BLOCK_N"]), cdiv(K, config["BLOCK_K"])
    return Plan(_dequantize_int8_kernel, grid, (N, K), WIDTH=16 // itemsize, enable_fp_fusion=False, **config)


@planned
def _plan(numel: int, blocks: int, blocksize: int, nested: int, aligned: bool, cc: int) -> Plan:
    config = configs.dequantize(cc, numel)
    return Plan(
        _dequantize_kernel, (cdiv(numel, config["BLOCK"]),), (numel, blocks),
        G=blocksize, NESTED_G=nested, ALIGNED=aligned, EVEN=numel % config["BLOCK"] == 0,
        enable_fp_fusion=False, **config,
    )  # fmt: skip


def why_not(dtype: torch.dtype) -> str | None:
    """The reason this kernel cannot write this dtype, or None where it can."""
    return tiles.why_not("the output", dtype)
