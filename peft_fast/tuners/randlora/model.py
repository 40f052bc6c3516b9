"""RandLoraModel."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_fast.tuners.shared_tensors import SharingTuner
from peft_fast.tuners.targets import LORA_TARGETS

from .layer import Linear


class RandLoraModel(SharingTuner):
    """`model` with RandLoRA adapters in it; those of one rank have the same bases."""

    prefix = "randlora_"
    target_module_mapping = LORA_TARGETS
    layer_classes: ClassVar = {nn.Linear: Linear}
    layer_type = Linear
    adapts_conv1d = True

    def suffices(self, config: Any, tensors: tuple[Tensor, ...], smaller: int, larger: int) -> bool:
        A, B = tensors
        return len(A) == config.r and A.shape[2] >= smaller and len(B) >= larger

    def draw(self, config: Any, smaller: int, larger: int) -> tuple[Tensor, ...]:
        """A [r, 1, smaller] and B [larger, bases, r] of deviation 1, the same numbers as in peft."""
        generator, r = torch.Generator().manual_seed(config.projection_prng_key), config.r
        shapes = [(r, 1, smaller), *[(larger, 1, r)] * -(-smaller // r)]
        if config.sparse or config.very_sparse:
            share = 1 / (2 * (math.sqrt(smaller) if config.very_sparse else 3))
            shapes[1:] = [(larger, len(shapes) - 1, r)]
            uniform = (torch.rand(shape, generator=generator) for shape in shapes)
            drawn = [(u > 1 - share).float() - (u < share).float() for u in uniform]
        else:  # in 16 bits, as peft draws them
            empty = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
            drawn = [nn.init.kaiming_uniform_(one, a=math.sqrt(5), generator=generator) for one in empty]
        return tuple(one / one.std() for one in (drawn[0], torch.cat(drawn[1:], dim=1)))
