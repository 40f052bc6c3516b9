"""An adapter whose start took its part out of the base weight (PiSSA, OLoRA, ...), as a plain one for the base weight
as it was:

    W - s B0 A0 + s B A = W + s [B | -B0] [A ; A0]

of twice the rank, with the same scale. A0 and B0 are those of the adapter as it was saved before training.
"""

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peft_fast.adapter_file import PREFIX, load_peft_weights
from peft_fast.tuners.matching import by_pattern

from .config import LoraConfig
from .converted import convert_to_lora, save_as_lora
from .initialisation import Start, subtracts

__all__ = ["as_plain_lora", "convert_to_lora", "difference", "save_as_lora"]

A_NAMES, B_NAMES = (".lora_A.weight", ".lora_embedding_A"), (".lora_B.weight", ".lora_embedding_B")


def as_plain_lora(
    config: LoraConfig, tensors: Mapping[str, Tensor], initial: str | os.PathLike[str]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and tensors of the difference to the adapter in the folder `initial`; what is no factor (magnitudes,
    biases, whole modules) stays as it is. Nothing that is given is changed.

    Raises ValueError for an adapter that has no such form, and for a folder whose adapter is another's.
    """
    _check(config)
    if not Path(initial).is_dir():
        raise ValueError(
            f"path_initial_model_for_weight_conversion must be the folder of the adapter as it was before training, "
            f"got {str(initial)!r}, which is none"
        )
    before = load_peft_weights(initial)
    return _of_twice_the_rank(config), difference(_on_untouched_base(config, tensors, before), before)


def _on_untouched_base(
    config: LoraConfig, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`tensors` where the base weights among them, embeddings that are saved with the adapter, are what they were
    before the adapter's start was taken out of them. Those of few bits are left out: the base model has them."""
    result = dict(tensors)
    for key, weight in tensors.items() if subtracts(config.init_lora_weights) else ():
        path = key.removesuffix(".base_layer.weight")
        A, B = (initial.get(f"{path}.{name}.weight") for name in ("lora_A", "lora_B"))
        if path == key or A is None or B is None:
            continue
        if not weight.is_floating_point():
            del result[key]
            continue
        wide = torch.promote_types(A.dtype, torch.float32)
        in_model = path.removeprefix(PREFIX)
        r = by_pattern(config.rank_pattern, in_model, config.r)
        alpha = by_pattern(config.alpha_pattern, in_model, config.lora_alpha)
        result[key] = weight.to("cpu", copy=True)
        Start(A.to("cpu", wide), B.to("cpu", wide), subtracted=True).take_from(
            result[key], -alpha / (math.sqrt(r) if config.use_rslora else r)
        )
    return result


def difference(tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` less `initial`, both under the keys of a file."""
    result = dict(tensors)
    for key, value in tensors.items():
        if key.endswith((*A_NAMES, *B_NAMES)):
            before = initial.get(key)
            if before is None or before.shape != value.shape:
                got = "nothing" if before is None else tuple(before.shape)
                raise ValueError(
                    f"the initial adapter must be this adapter before training: {key} is {tuple(value.shape)}, and "
                    f"the initial one has {got}"
                )
            before = before.to(value)
            if key.endswith(B_NAMES):
                result[key] = torch.cat([value, -before], dim=1)
            else:  # the ranks of a grouped convolution lie group by group
                groups = _groups(tensors, key)
                parts = [factor.unflatten(0, (groups, -1)) for factor in (value, before)]
                result[key] = torch.cat(parts, dim=1).flatten(0, 1)
    return result


def _groups(tensors: Mapping[str, Tensor], key: str) -> int:
    """Of the layer whose A this is the key of: its B [N, R / groups, ...] has each group's ranks alone."""
    name = next(name for name in A_NAMES if key.endswith(name))
    B = tensors.get(key.removesuffix(name) + B_NAMES[A_NAMES.index(name)])
    return 1 if B is None else max(1, len(tensors[key]) // B.shape[1])


def _check(config: LoraConfig) -> None:
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "path_initial_model_for_weight_conversion cannot be used with use_rslora and rank_pattern or alpha_pattern "
            "at the same time: leave it out, and keep the base model as it was for training"
        )
    if config.init_lora_weights is False or config.init_lora_weights == "loftq":
        raise ValueError(
            f"path_initial_model_for_weight_conversion is for adapters that start as nothing or as a part of the base "
            f"weight, and init_lora_weights is {config.init_lora_weights!r}: leave it out"
        )
    if config.target_parameters:
        raise ValueError(
            "path_initial_model_for_weight_conversion cannot be used with target_parameters, whose adapters hold those "
            "of all experts in one: leave it out"
        )


def _of_twice_the_rank(config: LoraConfig) -> LoraConfig:
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    plain.corda_config = plain.lora_ga_config = plain.eva_config = None  # of the start, which is no longer one
    plain.r *= 2
    plain.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    plain.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    plain.alpha_pattern = {key: 2 * alpha for key, alpha in config.alpha_pattern.items()}
    return plain
