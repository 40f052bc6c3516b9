"""Scales of adapters: numbers, or tensors of one element once prepare_model_for_compiled_hotswap was called, so that a
compiled model takes another scale without being compiled again."""

import torch
from torch import Tensor


def folded(B: Tensor, scale: float | Tensor) -> tuple[Tensor, float]:
    """(B, scale) as the ops take them, the scale as a number: one that is a tensor is multiplied into B, in fp32."""
    if isinstance(scale, Tensor):
        return B.to(torch.promote_types(B.dtype, torch.float32)) * scale, 1.0
    return B, scale
