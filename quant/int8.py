"""8-bit weights as LLM.int8 stores them (arXiv 2208.07339): one signed byte an element, one scale a row.

Only the weight: activations stay in floating point, so a product is as accurate as these weights allow. (bitsandbytes'
own forward quantises the activations too, except for columns with outliers.)
"""

import torch
from torch import Tensor

from .blockwise import CPU_CHUNK
from .weight import DTYPES, INT8, QuantizedWeight

PER_CODE = 1 / 127  # absmax[n] * PER_CODE, rounded to fp32, is the value of code 1 in row n


def quantize(weight: Tensor, dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Quantise `weight` [N, K] (fp32, fp16 or bf16) row by row; `dtype` is what the result dequantises to, by default
    the weight's own. The bytes are bitsandbytes': it rounds the weight to fp16 first.

    Raises ValueError for inf and NaN, also where a value exceeds fp16's largest, 65504.
    """
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise ValueError(f"weight must be [N, K] in fp32, fp16 or bf16, got {tuple(weight.shape)} {weight.dtype}")
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    half = weight.detach().half()
    if not bool(half.isfinite().all()):
        raise ValueError("weight holds inf, NaN or a value beyond fp16's 65504, which int8 cannot store: check it")
    N, K = weight.shape
    absmax = half.abs().amax(dim=1).float() if K else half.new_zeros(N, dtype=torch.float32)
    # A row of zeros has scale 0 and codes 0.
    factor = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    data = torch.round(half.float() * factor[:, None]).to(torch.int8)
    return QuantizedWeight(data.view(-1), absmax, None, (N, K), K, INT8, dtype)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The weight [N, K] in `dtype` (default: its own): fp32 code * scale, rounded once. Into `out` [N, K], if given."""
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    (N, K), scales = weight.shape, (weight.absmax * PER_CODE)[:, None]
    data = weight.data.view(N, K)
    # The product is taken in fp32 and rounded once into `out`; on a CPU torch first widens both factors in memory.
    step = N if weight.device.type != "cpu" else max(1, CPU_CHUNK // max(K, 1))
    for start in range(0, N, max(step, 1)):
        rows = slice(start, start + step)
        torch.mul(data[rows], scales[rows], out=out[rows])
    return out
