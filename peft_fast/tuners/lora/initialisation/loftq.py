"""LoftQ (arXiv 2310.08659, algorithm 1): factors that make up for the base weight's quantisation.

    Q = quantise(W - B A),   B A = the best of rank r for W - Q,   and again from there

The base weight becomes Q, in floating point: quantising it again gives the same codes.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from peft_fast import ops
from peft_fast.quant import blockwise, int8
from peft_fast.quant.weight import QuantizedWeight

from .start import Start

BLOCKSIZE = 64


def loftq(weight: Tensor, r: int, scale: float, config: dict[str, Any]) -> Start:
    """weight [N, K] -> A [R, K], B [N, R], and Q. `config`: loftq_bits and loftq_iter."""
    warn_of_scale(scale)
    bits, steps = config.get("loftq_bits", 4), config.get("loftq_iter", 1)
    quantized = _quantize(weight, bits)
    A, B = best_factors(weight - ops.dequantize(quantized, weight.dtype), r)
    for _ in range(steps - 1):
        quantized = _quantize(weight - B @ A, bits)
        A, B = best_factors(weight - ops.dequantize(quantized, weight.dtype), r)
    return Start(A, B, replaced=quantized)


def warn_of_scale(scale: float) -> None:
    if scale != 1:
        warnings.warn(
            f"LoftQ's factors make up for quantisation at a scale of 1, as in peft, and this adapter's is {scale}: set "
            "lora_alpha = r, or with use_rslora sqrt(r)",
            stacklevel=3,
        )


def best_factors(difference: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A [R, K], B [N, R]) with the product closest to `difference` [N, K], the singular values' roots in both."""
    U, S, Vh = torch.linalg.svd(difference, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def _quantize(weight: Tensor, bits: int) -> QuantizedWeight:
    weight = weight.float()
    return int8.quantize(weight) if bits == 8 else blockwise.quantize(weight, "nf4", BLOCKSIZE, double_quant=False)
