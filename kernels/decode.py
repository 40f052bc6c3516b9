"""What the k-bit kernels share: packed weights to exact fp32 numbers, in registers.

    4 bits   value = code[nibble] * scale(block)     a word of 32 bits holds eight nibbles, its byte i elements 2i, 2i+1
    8 bits   value = byte * (absmax[row] * fp32(1 / 127))

The table of sixteen codes lies across the lanes of a warp, code[i] in lanes i and i + 16, and a look-up is a warp
shuffle: one shift and one SHFL per weight, against nine instructions for a table in shared memory and twenty-seven for
a tree of selects (sm_89). No shared memory is touched and, because the hardware uses only the low four bits of the
index, none are masked. Shuffles issue at a quarter of the rate of additions, which is what four additions would cost;
a byte permutation (PRMT) needs five instructions per weight of exact fp32, each at half rate.

A nested scale is a product and a sum that are both rounded: the kernels that include this file are compiled with
enable_fp_fusion=False, and write tl.fma where they mean one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.quant.int8 import PER_CODE
from peft_fast.quant.weight import QuantizedWeight

# Inline assembly is neither interpreted nor AMD's: there, a load from the table in memory.
SHUFFLE = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
INT8_PER_CODE = tl.constexpr(PER_CODE)

# $0..$7 the codes of a word's elements in their order, $8 the word, $9 the address of the table. c = 0x101f is a
# segment of 16 lanes: j = (lane & 16) | (index & 15). ptxas computes `table` once for all words of a thread. Every lane
# of the warp must arrive here: nothing in these kernels branches on a thread's own data.
_LOOK_UP = tl.constexpr(
    """{
    .reg .b32 lane, table, index;
    .reg .b64 address;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 15;
    mad.wide.u32 address, lane, 4, $9;
    ld.global.nc.b32 table, [address];
    """
    + "\n".join(
        # Element 2i is the high nibble of byte i: element e starts at bit 4 * (e ^ 1).
        f"shr.b32 index, $8, {4 * (e ^ 1)}; shfl.sync.idx.b32 ${e}, table, index, 0x101f, -1;"
        for e in range(8)
    )
    + "}"
)
_CONSTRAINTS = tl.constexpr("=f,=f,=f,=f,=f,=f,=f,=f,r,l")


def pointers(weight: QuantizedWeight) -> tuple[Tensor | None, ...]:
    """The six tensors that every k-bit kernel takes first: data, absmax, code, nested absmax, nested code, offset."""
    nested = weight.nested
    rest = (nested.absmax, nested.code, nested.offset) if nested else (None, None, None)
    return (weight.data, weight.absmax, weight.code, *rest)


def is_aligned(weight: QuantizedWeight) -> bool:
    """Whether the data of a 4-bit weight can be read as whole words: not in an odd view of a buffer, nor at an odd end.
    Bytes are read one by one otherwise."""
    return weight.data.data_ptr() % 4 == 0 and weight.data.numel() % 4 == 0


@triton.jit
def load_words(data_ptr, word, end, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    """int32 like `word`, which counts from data_ptr, where `end` bytes lie; 0 beyond. EVEN: all lie inside."""
    if ALIGNED:
        return tl.load(data_ptr.to(tl.pointer_type(tl.int32)) + word, mask=None if EVEN else word * 4 < end)
    packed = tl.zeros(word.shape, tl.int32)
    for i in tl.static_range(4):
        byte = word * 4 + i
        packed |= tl.load(data_ptr + byte, mask=byte < end, other=0).to(tl.int32) << (8 * i)
    return packed


@triton.jit
def look_up(words, code_ptr):
    """float32 [*words.shape, 2, 2, 2]: the codes of the eight nibbles of each word, in the order of the elements, all
    in the thread that holds the word."""
    if SHUFFLE:
        f = tl.float32
        e0, e1, e2, e3, e4, e5, e6, e7 = tl.inline_asm_elementwise(
            _LOOK_UP, _CONSTRAINTS, [words, code_ptr.to(tl.int64)], (f, f, f, f, f, f, f, f), is_pure=True, pack=1
        )
    else:
        e0, e1 = tl.load(code_ptr + (words >> 4 & 15)), tl.load(code_ptr + (words & 15))
        e2, e3 = tl.load(code_ptr + (words >> 12 & 15)), tl.load(code_ptr + (words >> 8 & 15))
        e4, e5 = tl.load(code_ptr + (words >> 20 & 15)), tl.load(code_ptr + (words >> 16 & 15))
        e6, e7 = tl.load(code_ptr + (words >> 28 & 15)), tl.load(code_ptr + (words >> 24 & 15))
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.join(even, odd)


@triton.jit
def load_scales(
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, group, inside, NESTED_G: tl.constexpr
):
    """float32 like `block`: the scales of these blocks, and 0 or the offset where they are not `inside`. `group` is
    block // NESTED_G, or one number for all. NESTED_G = 0: plain scales."""
    scale = tl.load(absmax_ptr + block, mask=inside, other=None if inside is None else 0)
    if NESTED_G:
        scale = tl.load(nested_code_ptr + scale.to(tl.int32))
        scale *= tl.load(nested_absmax_ptr + group)
        scale += tl.load(offset_ptr)
    return scale
