"""LoRA-GA (arXiv 2407.05000): the adapter starts along the largest singular vectors of the weight's gradient G, so that
its first steps are those of full fine-tuning.

    G = U S V^T,   A and B take r of the first 2 r each, and the base weight loses scale * B A

preprocess_loraga (tuners/lora/loraga.py) leaves the gradient at the layer.
"""

from typing import Any

import torch
from torch import Tensor

from .start import Start

GRADIENT = "_peft_loraga_grad"


def lora_ga(layer: Any, weight: Tensor, r: int, scale: float, config: Any, fan_in_fan_out: bool) -> Start:
    """weight [N, K] -> A [R, K], B [N, R]. Takes the layer's gradient away. Draws from torch's generator."""
    if config is None:
        raise ValueError("init_lora_weights='lora_ga' needs lora_ga_config=LoraGAConfig(...)")
    gradient = getattr(layer, GRADIENT).to(weight)
    gradient = gradient.t() if fan_in_fan_out else gradient
    smallest = min(gradient.shape)
    if gradient.shape != weight.shape or 2 * r > smallest:
        raise ValueError(
            f"init_lora_weights='lora_ga' needs a gradient of the weight's shape {tuple(weight.shape)}, got "
            f"{tuple(gradient.shape)}, and a rank of at most half of its smaller side, got {r}"
        )
    if not bool(gradient.isfinite().all()):
        raise ValueError("init_lora_weights='lora_ga' decomposes the weight's gradient, and that holds inf or NaN")
    U, S, V = torch.svd_lowrank(gradient, q=min(4 * r, smallest), niter=4)
    of_A, of_B = _chosen(config.direction, r)
    A, values = V.t()[of_A], S[of_B]
    B = U[:, of_B] * values
    if config.scale == "stable":
        B = B * (weight.shape[0] ** 0.25 / config.stable_gamma**0.5)
    elif config.scale == "weight_svd":
        _, largest, _ = torch.svd_lowrank(weight, q=r, niter=4)
        B = B * (largest[0] / values[0]) if values[0] > 0 else B
    elif config.scale == "gd_scale":
        A, B = A / scale, B / scale
    delattr(layer, GRADIENT)
    return Start(A, B, subtracted=True)


def _chosen(direction: str, r: int) -> tuple[Any, Any]:
    """Which singular vectors A and B take."""
    if direction == "random":
        indices = torch.randperm(2 * r, device="cpu")[:r]
        return indices, indices
    return {
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "A2rBr": (slice(r, 2 * r), slice(r)),
        "ArB2r": (slice(r), slice(r, 2 * r)),
    }[direction]
