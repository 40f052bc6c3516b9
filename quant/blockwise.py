"""4-bit quantisation and its inverse in plain torch: the specification, and the path of machines without Triton.

Both directions work through the weight in chunks of whole blocks: the fp32 temporaries never reach the size of the
weight.
"""

import torch
from torch import Tensor

from .codebooks import codebook, dynamic_map
from .weight import BLOCKSIZES, DTYPES, QUANT_TYPES, NestedScales, QuantizedWeight

# Elements per chunk on a CPU: temporaries of 1 MiB. Chunks of 2**14 took 2.7 times as long, of 2**20 the same.
# On a GPU one chunk is everything: there launches cost more than cache misses.
CPU_CHUNK = 1 << 18

TINY = 1e-38  # stands for the scale of a block of zeros


def _chunk_elements(device: torch.device, blocksize: int, total: int) -> int:
    return max(CPU_CHUNK, blocksize) if device.type == "cpu" else max(total, blocksize)


def block_scales(weight: QuantizedWeight) -> Tensor:
    """float32 [blocks]: the scale of every block. Nested scales take two fp32 roundings, product then sum."""
    if weight.nested is None:
        return weight.absmax
    nested = weight.nested
    scales = nested.code[weight.absmax.to(torch.int32)]
    blocks = scales.numel()
    per_block = nested.absmax.repeat_interleave(nested.blocksize)[:blocks]
    return scales.mul_(per_block).add_(nested.offset)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The weight [N, K] in `dtype` (default: its own): fp32 code * scale, rounded once. Into `out` [N, K], if given.

    A byte holds two elements, so one look-up in a table of 256 pairs decodes both. Decoding 4096 x 4096 nibble by
    nibble takes two to four times as long on a CPU (450 ms against 122 to 197, 2 threads).
    """
    assert weight.code is not None
    N, K = weight.shape
    total, G = N * K, weight.blocksize
    if out is None:
        out = torch.empty(N, K, dtype=dtype or weight.dtype, device=weight.device)
    flat = out.view(-1)
    scales = block_scales(weight)
    pairs = torch.cartesian_prod(weight.code, weight.code).view(torch.int64).flatten()  # two fp32 seen as one int64
    step = _chunk_elements(weight.device, G, total)
    for start in range(0, total, step):
        stop = min(start + step, total)
        indices = weight.data[start // 2 : (stop + 1) // 2].to(torch.int32)
        values = pairs.index_select(0, indices).view(torch.float32)[: stop - start]
        _scale_blocks(values, scales[start // G : -(-stop // G)], G)
        flat[start:stop] = values
    return out


def _scale_blocks(values: Tensor, scales: Tensor, blocksize: int) -> None:
    """values *= its block's scale, in place; the last block may be short."""
    whole = values.numel() // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(scales[:whole, None])
    values[whole * blocksize :].mul_(scales[whole:])


def quantize(
    weight: Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """Quantise `weight` [N, K] (fp32, fp16 or bf16) to 4 bits, in blocks of `blocksize` with one scale each.

    `double_quant` quantises the scales too (QLoRA, section 3). `dtype` is what the result dequantises to, by default
    the weight's own. Bytes and scales are those that bitsandbytes stores, with one exception: where a nested scale lies
    within 1e-5 of the middle between two codes, its CPU library, which rounds by table, takes the farther one in about
    one case in a thousand (tests/test_quant.py).
    Raises ValueError for a weight that is not a finite matrix, and for arguments out of range.
    """
    check_arguments(quant_type, blocksize)
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise ValueError(f"weight must be [N, K] in fp32, fp16 or bf16, got {tuple(weight.shape)} {weight.dtype}")
    flat, total, G = weight.detach().reshape(-1), weight.numel(), blocksize
    code = codebook(quant_type, weight.device)
    data = torch.empty((total + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-total // G), dtype=torch.float32, device=weight.device)
    step = _chunk_elements(weight.device, G, total)
    for start in range(0, total, step):
        stop = min(start + step, total)
        nibbles, scales = _quantize_chunk(flat[start:stop].float(), code, G)
        data[start // 2 : (stop + 1) // 2] = (nibbles[0::2] << 4) | nibbles[1::2]
        absmax[start // G : -(-stop // G)] = scales
    if not bool(absmax.isfinite().all()):
        raise ValueError("weight holds inf or NaN, which 4 bits cannot store: check the checkpoint it came from")
    shape, dtype = (weight.shape[0], weight.shape[1]), dtype or weight.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    if not double_quant:
        return QuantizedWeight(data, absmax, code, shape, G, quant_type, dtype)
    absmax, nested = _quantize_scales(absmax)
    return QuantizedWeight(data, absmax, code, shape, G, quant_type, dtype, nested)


def check_arguments(quant_type: str, blocksize: int) -> None:
    """ValueError where `quantize` would refuse them."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")


def _quantize_chunk(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """fp32 values -> (nibbles uint8, an even number of them; scales fp32 [blocks])."""
    whole = values.numel() // blocksize * blocksize
    blocks, rest = values[:whole].view(-1, blocksize), values[whole:]
    scales = blocks.abs().amax(dim=1)
    # A block of zeros has scale 0: the smallest normal number in its place keeps 0 / scale at 0.
    normed = (blocks * (1.0 / scales.clamp(min=TINY))[:, None]).view(-1)
    if rest.numel():
        # Divided, not multiplied by the reciprocal, as bitsandbytes does for a short block: they differ in ties.
        last = rest.abs().amax().clamp(min=TINY)
        scales, normed = torch.cat([scales, last[None]]), torch.cat([normed, rest / last])
    padded = torch.nn.functional.pad(normed, (0, normed.numel() % 2))  # an odd end is padded with the code of zero
    return nearest(padded.clamp_(-1, 1), code).to(torch.uint8), scales


def nearest(values: Tensor, code: Tensor) -> Tensor:
    """int32: the index into `code` (any order) of the entry nearest to each value; a tie goes to the lower entry."""
    order = torch.argsort(code)
    ascending = code[order]
    rank = torch.bucketize(values, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
    return order.to(torch.int32)[rank]


def _quantize_scales(absmax: Tensor) -> tuple[Tensor, NestedScales]:
    """fp32 scales [blocks] -> (uint8 [blocks], the nested scales that decode them)."""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())  # the mean of no scales would be NaN
    blocks, G = absmax.numel(), 256
    centred = torch.nn.functional.pad(absmax - offset, (0, -blocks % G)).view(-1, G)
    outer = centred.abs().amax(dim=1)
    code = dynamic_map(absmax.device)
    normed = (centred / outer.clamp(min=TINY)[:, None]).view(-1)[:blocks]
    return nearest(normed, code).to(torch.uint8), NestedScales(outer, code, offset, G)
