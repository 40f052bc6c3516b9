"""What two or more kernels share: device functions, tile sizes, the rule for fp32 products."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.quant.weight import DTYPES


@triton.jit
def dropout_mask(key_ptr, rows, pairs, PAIRS, threshold):
    """int1 [BLOCK_M, 2 * BLOCK_PAIRS], True where kept: the twin of dropout.mask, which explains it.

    rows: int64 [BLOCK_M, 1]; pairs: int32 [1, BLOCK_PAIRS], column // 2; PAIRS: ceil(K / 2).
    """
    first = rows * PAIRS
    key0 = tl.load(key_ptr).to(tl.uint32, bitcast=True) + (first >> 32).to(tl.uint32) * 0x85EBCA6B
    key1 = tl.load(key_ptr + 1).to(tl.uint32, bitcast=True)
    x = (first.to(tl.uint32) + pairs.to(tl.uint32)) * 0x9E3779B1 + key0
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ key1
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return tl.interleave((x & 0xFFFF).to(tl.int32), (x >> 16).to(tl.int32)) >= threshold


def cdiv(length: int, block: int) -> int:
    """How many blocks cover the length. triton.cdiv, for use inside kernels too, takes 1.6 us on the host."""
    return -(-length // block)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1, without the 1.5 us of triton.next_power_of_2."""
    return 1 << (n - 1).bit_length()


def input_precision() -> str:
    """How tl.dot multiplies fp32: "tf32" where the user allows it to torch's own matmul, else "ieee"."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def rank_block(R: int, itemsize: int) -> int:
    """The tile along R: a power of two, at least the 16 that tl.dot needs. Larger ranks take several tiles: wider ones
    spill registers in the backward kernels, fp32 ones sooner (bench/compile.py)."""
    return min(max(16, power_of_2(R)), 64 if itemsize == 2 else 16)


def rows(t: Tensor) -> Tensor:
    """The matrix itself where its rows are dense, however far apart they lie; else a copy."""
    return t if t.stride(1) == 1 else t.contiguous()


def why_not(name: str, dtype: torch.dtype) -> str | None:
    """The reason the kernels cannot take a tensor of this dtype, or None where they can."""
    return None if dtype in DTYPES else f"{name} is {dtype}, the kernels take float32, float16 and bfloat16"


def layout(*tensors: Tensor) -> tuple[tuple[int, ...], bool]:
    """(How far apart the rows of each matrix lie, whether all rows of all start at multiples of 16 elements.)"""
    distances, bits = [], 0
    for tensor in tensors:
        distance = tensor.stride(0)
        distances.append(distance)
        bits |= distance | tensor.data_ptr()
    return tuple(distances), bits % 16 == 0


def warps(aligned: bool) -> int:
    """For matrices as `layout` has found them. Triton loads what is not aligned element by element and keeps an address
    for each: spread over 8 warps they fit the registers."""
    return 4 if aligned else 8


MOST = 3  # adapters in one launch, as many as q, k and v have: kernels have that many pointers of each kind


def thrice(values: Sequence, filler: object) -> list:
    """The values, and `filler` for each of the MOST that is missing."""
    return [*values, *[filler] * (MOST - len(values))]


def in_one_launch(itemsize: int, aligned: bool) -> bool:
    """Whether several adapters may share a launch: they need the registers that tiles of fp32, or the addresses of
    single elements, take too."""
    return itemsize == 2 and aligned
