"""What the k-bit kernels share: packed weights to exact fp32 numbers, in registers.

    4 bits   value = code[nibble] * scale(block)     a word of 32 bits holds eight nibbles, its byte i elements 2i, 2i+1
    8 bits   value = byte * (absmax[row] * fp32(1 / 127))

The table of sixteen codes lies across the lanes of a warp, code[i] in lanes i and i + 16, and a look-up is a warp
shuffle: one shift and one SHFL per weight. No shared memory is touched and, because the hardware uses only the low four
bits of the index, none are masked. (tl.gather, whose table lies in shared memory, made the whole dequantisation more
than twice as long, which is 5.84 instructions per weight on sm_89: results/compile.) Shuffles issue at a quarter of the
rate of additions, which is what four additions would cost; a byte permutation (PRMT) needs five instructions per weight
of exact fp32, each at half rate.

A nested scale is a product and a sum that are both rounded: the kernels that include this file are compiled with
enable_fp_fusion=False, and write tl.fma where they mean one.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.quant.int8 import PER_CODE
from peft_fast.quant.weight import Format, QuantizedWeight

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


MAX_K = 1 << 24  # columns: a tile of 128 rows then spans no more than 2**31 elements


def pointers(weight: QuantizedWeight) -> tuple[Tensor | None, ...]:
    """The six tensors that every k-bit kernel takes first: data, absmax, code, nested absmax, nested code, offset."""
    nested = weight.nested
    rest = (nested.absmax, nested.code, nested.offset) if nested else (None, None, None)
    return (weight.data, weight.absmax, weight.code, *rest)


def is_aligned(weight: QuantizedWeight) -> bool:
    """Whether the data can be read eight weights at a time: not in an odd view of a buffer, nor, in 4 bits, at an odd
    end, nor, in 8 bits, from rows that begin at odd addresses. Bytes are read one by one otherwise."""
    if weight.bits == 8:
        return weight.data.data_ptr() % 8 == 0 and weight.shape[1] % 8 == 0
    return weight.data.data_ptr() % 4 == 0 and weight.data.numel() % 4 == 0


def why_not(fmt: Format) -> str | None:
    """The reason `tile` cannot address a weight of this shape, or None where it can."""
    return f"K is {fmt.K}, offsets within a tile need 32 bits up to {MAX_K}" if fmt.K > MAX_K else None


def tile_constants(fmt: Format, aligned: bool, BLOCK_N: int, BLOCK_K: int) -> dict:
    """What `tile` needs to know at compile time. UNIT: neighbours in a row that surely share a scale; for int8, that
    can be loaded at once. aligned: `is_aligned` of the weight."""
    even = fmt.N % BLOCK_N == 0 and fmt.K % BLOCK_K == 0
    if fmt.bits == 8:
        return dict(G=0, NESTED_G=0, UNIT=8 if aligned else 1, ALIGNED=aligned, EVEN=even and aligned)
    unit = math.gcd(fmt.K, fmt.blocksize, BLOCK_K)
    return dict(G=fmt.blocksize, NESTED_G=fmt.nested_blocksize, UNIT=unit, ALIGNED=aligned, EVEN=even)


@triton.jit
def load_words(data_ptr, word, inside, end, ALIGNED: tl.constexpr):
    """int32 like `word`, which counts from data_ptr: the words that are `inside` (None: all), of which the last may be
    short: `end` bytes lie there."""
    if ALIGNED:
        return tl.load(data_ptr.to(tl.pointer_type(tl.int32)) + word, mask=inside, other=None if inside is None else 0)
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
def unpack_bytes(words):
    """float32 [*words.shape, 2, 2, 2]: the eight signed bytes of each int64, in the order in memory."""
    low, high = words.to(tl.int32), (words >> 32).to(tl.int32)
    even = tl.join(tl.join(low << 24, high << 24), tl.join(low << 8, high << 8))
    odd = tl.join(tl.join(low << 16, high << 16), tl.join(low, high))
    return (tl.join(even, odd) >> 24).to(tl.float32)


@triton.jit
def load_scales(absmax_ptr, nested_code_ptr, offset_ptr, block, outer, inside, NESTED: tl.constexpr):
    """float32 like `block`: the scales of these blocks, finite where they are not `inside` (None: all are).

    outer: the nested absmax of each, or one that they share.
    """
    scale = tl.load(absmax_ptr + block, mask=inside, other=None if inside is None else 0)
    if NESTED:
        scale = tl.load(nested_code_ptr + scale.to(tl.int32))
        scale *= outer
        scale += tl.load(offset_ptr)
    return scale


@triton.jit
def tile(
    data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    n0, k0, N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    G: tl.constexpr, NESTED_G: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_K]: the exact weights of rows n0.. and columns k0.., finite numbers beyond N and K.

    G = 0: int8. UNIT and the rest: `tile_constants`. EVEN: the tile lies inside.
    """
    row = tl.arange(0, BLOCK_N)[:, None]  # within the tile
    inside_n = None if EVEN else n0 + row < N
    # 64 bits only for the tile's first element: within a tile 32 are enough (MAX_K), and half the registers.
    first = tl.cast(n0, tl.int64) * K + k0
    if G == 0:
        scale = tl.load(absmax_ptr + n0 + row, mask=inside_n, other=None if EVEN else 0.0) * INT8_PER_CODE
        if UNIT == 8:
            # Eight codes a load, as for 4 bits, whatever layout the consumer asks for.
            k = tl.max_contiguous(tl.arange(0, BLOCK_K // 8), 1)[None, :]
            inside = None if EVEN else inside_n & (k0 + k * 8 < K)
            data_ptr = data_ptr.to(tl.pointer_type(tl.int64)) + first // 8
            codes = unpack_bytes(tl.load(data_ptr + (row * (K // 8) + k), mask=inside, other=None if EVEN else 0))
        else:
            k = tl.arange(0, BLOCK_K)[None, :]
            codes = tl.load(data_ptr + first + (row * K + k), mask=inside_n & (k0 + k < K), other=0).to(tl.float32)
        values = codes.reshape(BLOCK_N, BLOCK_K) * scale
    else:
        unit = tl.arange(0, BLOCK_K // UNIT)[None, :] * UNIT
        block0 = first // G
        block = (row * K + unit + (first % G).to(tl.int32)) // G
        inside = None if EVEN else inside_n & (k0 + unit < K)
        outer = 0.0
        if NESTED_G:
            group = ((block0 % NESTED_G).to(tl.int32) + block) // NESTED_G
            outer = tl.load(
                nested_absmax_ptr + block0 // NESTED_G + group, mask=inside, other=None if EVEN else 0.0
            )  # fmt: skip
        scale = load_scales(
            absmax_ptr + block0, nested_code_ptr, offset_ptr, block, outer, inside, NESTED_G > 0
        )  # fmt: skip
        if UNIT % 8 == 0:
            # Contiguous by 1: a thread's words lie apart, and its neighbours hold what lies between, as in dequantize.
            k = tl.max_contiguous(tl.arange(0, BLOCK_K // 8), 1)[None, :]
            inside = None if EVEN else inside_n & (k0 + k * 8 < K)
            end = (tl.cast(N, tl.int64) * K - first) // 2
            codes = look_up(load_words(data_ptr + first // 2, row * (K // 8) + k, inside, end, ALIGNED), code_ptr)
        else:  # rows that begin within a word, or even within a byte
            k = tl.arange(0, BLOCK_K)[None, :]
            element = row * K + k + (first % 2).to(tl.int32)
            inside = None if EVEN else inside_n & (k0 + k < K)
            byte = tl.load(data_ptr + first // 2 + element // 2, mask=inside, other=None if EVEN else 0)
            codes = tl.load(code_ptr + tl.where(element % 2 == 0, byte >> 4, byte & 15).to(tl.int32))
        values = (codes.reshape(BLOCK_N, BLOCK_K // UNIT, UNIT) * scale[:, :, None]).reshape(BLOCK_N, BLOCK_K)
    return values
