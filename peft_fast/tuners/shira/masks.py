"""Which entries of a weight are trained."""

from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners.base_weight import linear_features


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """[N, K] of 0 and 1: r * (N + K) ones at random places, the same for the same seed (None: a fixed one) as in peft.

    The function of a mask of your own has this signature, `base_layer` and `r`: see ShiraConfig.
    """
    K, N = linear_features(base_layer)
    generator = torch.Generator()
    if random_seed is not None:
        generator.manual_seed(random_seed)
    mask = torch.zeros(N * K)
    mask[torch.randperm(N * K, generator=generator)[: r * (N + K)]] = 1
    return mask.view(N, K)
