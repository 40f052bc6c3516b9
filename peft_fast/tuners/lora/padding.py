"""Adapters with more ranks than they use, the rest of them zeros: for hot-swapping (peft_fast/hotswap.py)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners.matching import by_pattern

from .conv import Conv2d
from .layer import Linear, LoraLayer
from .param_wrapper import ParamWrapper

PADDED = (Linear, Conv2d)  # the layers whose adapters can be padded, as in peft


@torch.no_grad()
def pad(layer: Any, name: str, target_rank: int) -> None:
    """Fill A and B up to `target_rank` with zeros; the modules are new ones, so that their sizes are what they say."""
    A, B = layer.factors(name)
    if A.weight.shape[0] == target_rank:
        return
    trained, training = A.weight.requires_grad, A.training
    groups = groups_of(layer)
    A_shape = torch.Size([target_rank, *A.weight.shape[1:]])
    B_shape = torch.Size([B.weight.shape[0], target_rank // groups, *B.weight.shape[2:]])
    for container, old, weight in (
        (layer.lora_A, A, padded(A.weight, A_shape, groups)),
        (layer.lora_B, B, padded(B.weight, B_shape, 1)),
    ):
        new = copy.deepcopy(old)
        new.weight = nn.Parameter(weight, requires_grad=trained)
        container[name] = new.train(training)
    out_of, into = ("out_features", "in_features") if isinstance(A, nn.Linear) else ("out_channels", "in_channels")
    setattr(layer.lora_A[name], out_of, target_rank)
    setattr(layer.lora_B[name], into, target_rank)


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
        if isinstance(layer, ParamWrapper):
            if adapter_name not in layer.r:
                continue
            rank = layer.r[adapter_name] * layer.num_experts
            own, of_B = layer.num_experts, rank
        else:
            rank, own = by_pattern(config.rank_pattern, path, config.r), groups_of(layer)
            of_B = rank // own
        for A_name, B_name in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            A_key, B_key = f"{prefix}{path}.{A_name}", f"{prefix}{path}.{B_name}"
            if A_key not in tensors or rank >= tensors[A_key].shape[0]:
                continue
            result[A_key] = tensors[A_key].unflatten(0, (own, -1))[:, : rank // own].flatten(0, 1)
            result[B_key] = tensors[B_key][:, :of_B]
    return result


def groups_of(layer: Any) -> int:
    """Of a convolution: its ranks lie in so many blocks, one for each group."""
    return getattr(layer.get_base_layer(), "groups", 1)
