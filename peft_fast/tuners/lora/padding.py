"""Adapters with more ranks than they use, the rest of them zeros: for hot-swapping (peft_fast/hotswap.py)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners.matching import by_pattern

from .conv import Conv2d
from .layer import Linear, LoraLayer
from .param_wrapper import ParamWrapper, path_for_patterns

PADDED = (Linear, Conv2d, ParamWrapper)  # the layers whose adapters can be padded; peft has the first two


@torch.no_grad()
def pad(layer: Any, name: str, target_rank: int) -> None:
    """Fill A and B up to `target_rank` with zeros; the modules are new ones, so that their sizes are what they say."""
    A, B = layer.factors(name)
    rows = target_rank * experts_of(layer)
    if A.weight.shape[0] == rows:
        return
    trained, training = A.weight.requires_grad, A.training
    A_shape = torch.Size([rows, *A.weight.shape[1:]])
    B_shape = torch.Size([B.weight.shape[0], rows // groups_of(layer), *B.weight.shape[2:]])
    for container, old, weight in (
        (layer.lora_A, A, padded(A.weight, A_shape, blocks_of_A(layer))),
        (layer.lora_B, B, padded(B.weight, B_shape, 1)),
    ):
        new = copy.deepcopy(old)
        new.weight = nn.Parameter(weight, requires_grad=trained)
        container[name] = new.train(training)
    out_of, into = ("out_features", "in_features") if isinstance(A, nn.Linear) else ("out_channels", "in_channels")
    setattr(layer.lora_A[name], out_of, rows)
    setattr(layer.lora_B[name], into, rows)


def padded(value: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """`value` at the start of zeros of this shape, of each of `groups` blocks along the first dimension."""
    result = value.new_zeros(shape)
    of_old, of_new = value.unflatten(0, (groups, -1)), result.unflatten(0, (groups, -1))
    of_new[(slice(None), *(slice(size) for size in of_old.shape[1:]))] = of_old
    return result


def without_padding(tuner: Any, adapter_name: str, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`tensors`, an adapter's by the keys of a file, of the ranks that the adapter's config says."""
    config: Any = tuner.peft_config[adapter_name]
    result = dict(tensors)
    for path, layer in tuner.layers():
        if not isinstance(layer, LoraLayer):
            continue  # another method's
        rank = by_pattern(config.rank_pattern, path_for_patterns(layer, path), config.r) * experts_of(layer)
        blocks, of_B = blocks_of_A(layer), rank // groups_of(layer)
        for A_name, B_name in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            A_key, B_key = f"{prefix}{path}.{A_name}", f"{prefix}{path}.{B_name}"
            if A_key not in tensors or rank >= tensors[A_key].shape[0]:
                continue
            result[A_key] = tensors[A_key].unflatten(0, (blocks, -1))[:, : rank // blocks].flatten(0, 1)
            result[B_key] = tensors[B_key][:, :of_B]
    return result


def blocks_of_A(layer: Any) -> int:
    """In how many blocks the ranks of an A lie: those of a grouped convolution, whose B has them apart anyway, or the
    experts of a parameter, whose B has all experts' first ranks first."""
    return experts_of(layer) * groups_of(layer)


def experts_of(layer: Any) -> int:
    """How many adapters lie in A and B side by side."""
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1


def groups_of(layer: Any) -> int:
    """Of a convolution."""
    return 1 if isinstance(layer, ParamWrapper) else getattr(layer.get_base_layer(), "groups", 1)


def rank_of(layer: Any, name: str) -> int:
    """The ranks that an adapter has room for: of each expert."""
    return layer.factors(name)[0].weight.shape[0] // experts_of(layer)
