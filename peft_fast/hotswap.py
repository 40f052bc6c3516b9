"""Other weights for an adapter that is in use: in place, so that a compiled model is not compiled again.

prepare_model_for_compiled_hotswap(model, target_rank=64)   # if ranks or scales differ
model = torch.compile(model)
hotswap_adapter(model, "another-adapter", "default")
"""

import copy
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import sharded
from .adapter_file import is_plain, load_peft_weights
from .checkpoint import keys_in_model
from .config import PeftConfig
from .peft_types import PeftType
from .tuners.lora import dora
from .tuners.lora.config import LoraConfig
from .tuners.lora.conv import Conv2d
from .tuners.lora.layer import LoraLayer
from .tuners.lora.moe import converted
from .tuners.lora.padding import PADDED, blocks_of_A, groups_of, pad, padded, rank_of
from .tuners.lora.param_wrapper import path_for_patterns
from .tuners.matching import by_pattern
from .tuners.names import without_compiling

# What adapters that replace one another share.
SAME = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora", "alora_invocation_tokens")


class Swap(NamedTuple):
    """What a state dict does to a model, looked at before anything is done."""

    values: dict[str, Tensor]  # by name in the model
    scales: dict[LoraLayer, tuple[int, float, float]]  # (rank, alpha, scale) of the layers that it has weights for
    idle: list[LoraLayer]  # layers with the adapter that it has none for


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make adapters of other ranks and scales fit into `model` later, without its being compiled again.

    To be called after the first adapter is loaded and before torch.compile. Scales become tensors; with `target_rank`,
    the largest rank of all adapters to come, A and B of linear layers, 2-d convolutions and parameters (of each of the
    experts) are filled up with zeros, which changes no output. `config`: one or several, whose ranks are set to
    target_rank, with the alpha that keeps the scale. `check_compiled`: what to do where the model is compiled already.
    Raises ValueError, and leaves the model as it was, for a compiled model, one without adapters, and a target_rank
    below the rank that is there.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled must be 'error', 'warn' or 'ignore', got {check_compiled!r}")
    if target_rank is not None and (isinstance(target_rank, bool) or not isinstance(target_rank, int)):
        raise TypeError(f"target_rank must be a number of ranks, got {target_rank!r}")
    if _is_compiled(model) and check_compiled != "ignore":
        rule = "prepare_model_for_compiled_hotswap is to be called before the model is compiled"
        if check_compiled == "error":
            raise ValueError(f"{rule}, which would have to be done again: call it first")
        warnings.warn(f"{rule}: it will be compiled again", stacklevel=2)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not any(layer.scaling for layer in layers):
        raise ValueError("the model has no LoRA layers: load the first adapter, then prepare for others")
    if target_rank is not None:
        for layer in layers:
            _check_rank(layer, target_rank)
    for layer in layers:
        for name, scale in layer.scaling.items():
            device = next(
                iter(layer.adapter_parameters(name)), layer.weight
            ).device  # the base weight's may be offloaded
            layer.scaling[name] = torch.as_tensor(scale, device=device)
        if target_rank is not None and isinstance(layer, PADDED):
            for name in layer.lora_A:
                pad(layer, name, target_rank)
    if config is not None and target_rank is not None:
        for one in config.values() if isinstance(config, dict) else [config]:
            _set_rank(one, target_rank)


def hotswap_adapter(
    model: Any,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **hub_arguments: Any,
) -> None:
    """Give the adapter `adapter_name` of `model`, a PeftModel that may be compiled, the weights of another one.

    Layers that the new adapter has no weights for stay, with an adapter that does nothing. `torch_device`: where the
    file is read to. `hub_arguments`: see PeftModel.from_pretrained.
    Raises ValueError where the two cannot take each other's place (SAME lists what must be equal) and for tensors that
    do not fit, RuntimeError for weights of layers that have no adapter; nothing is changed then.
    """
    config: Any = PeftConfig.from_pretrained(model_name_or_path, **hub_arguments)
    inner = without_compiling(model)
    configs = inner.peft_config
    if adapter_name not in configs:
        raise ValueError(f"adapter {adapter_name!r} does not exist: there are {sorted(configs)}")
    if isinstance(config, LoraConfig):
        config = converted(inner.get_base_model(), config)
    check_hotswap_configs_compatible(configs[adapter_name], config)
    tensors = load_peft_weights(model_name_or_path, torch_device, **hub_arguments)
    found, unexpected = keys_in_model(inner, tensors, adapter_name)
    hotswap_adapter_from_state_dict(model, {**found, **unexpected}, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same from tensors by their names in the model, `config` being the new adapter's. Whether its config fits the
    old one's is not looked at. `parameter_prefix`: what the names of the weights that may be missing begin with."""
    inner = without_compiling(model)
    swap = _plan(inner, state_dict, adapter_name, config, parameter_prefix)
    own = dict(inner.named_parameters())
    grown = [name for name, value in swap.values.items() if not _holds(own[name], value)]
    if grown and _is_compiled(model):
        warnings.warn(
            f"{len(grown)} tensors, such as {grown[0]}, become larger, and the model will be compiled again: give "
            "prepare_model_for_compiled_hotswap the largest rank of all adapters",
            stacklevel=2,
        )
    with torch.no_grad():
        for layer in swap.idle:
            _silence(layer, adapter_name)
        for name, value in swap.values.items():
            _write(inner, own[name], name, value)
        for layer, (rank, alpha, scale) in swap.scales.items():
            layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
            layer._set_scales({adapter_name: scale})
    _note(inner, adapter_name, config)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise ValueError where an adapter of `config1` cannot take the place of one of `config0`."""
    for config in (config0, config1):
        if config.peft_type != PeftType.LORA:
            raise ValueError(f"only LoRA adapters can be hot-swapped, got {config.peft_type}")
    for key in SAME:
        old, new = getattr(config0, key), getattr(config1, key)
        if old != new:
            raise ValueError(f"adapters that replace one another must have the same {key}, got {old!r} and {new!r}")


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or bool(getattr(model, "_compiled_call_impl", None))


def _plan(
    model: nn.Module, state_dict: Mapping[str, Any], adapter_name: str, config: LoraConfig, prefix: str
) -> Swap:  # fmt: skip
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    layers = {path: layer for path, layer in layers.items() if adapter_name in layer.scaling}
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} does not exist: the model has no layer with it")
    merged = [path for path, layer in layers.items() if adapter_name in layer.merged_adapters]
    if merged:
        raise ValueError(f"adapter {adapter_name!r} is merged into {merged[0]}: call unmerge_adapter first")
    values = {key.replace("_orig_mod.", ""): value for key, value in state_dict.items()}
    own = dict(model.named_parameters())
    if unexpected := [key for key in values if key not in own]:
        raise RuntimeError(
            f"hot-swapping adapts no new layers: unexpected keys found, {', '.join(unexpected[:3])}, {len(unexpected)} "
            "in all. Load that adapter with load_adapter"
        )
    places = {f"{path}.{key}": path for path, layer in layers.items() for key in _own_keys(layer, adapter_name)}
    for key, value in values.items():
        _check_fits(key, value, own[key], layers.get(places.get(key, "")))
    missing = [key for key in places if key not in values and prefix in key]
    there = {places[key] for key in values if key in places}
    torn = [key for key in missing if places[key] in there]
    if torn:
        raise ValueError(f"the new adapter has only some weights of a layer: {torn[0]} is missing")
    scales = {layers[path]: _scale(path_for_patterns(layers[path], _below_the_model(path)), config) for path in there}
    return Swap(values, scales, [layer for path, layer in layers.items() if path not in there])


def _own_keys(layer: LoraLayer, adapter_name: str) -> list[str]:
    return list(layer.adapter_state_keys(adapter_name).values())


def _below_the_model(path: str) -> str:
    return path.removeprefix("base_model.model.")


def _scale(path: str, config: LoraConfig) -> tuple[int, float, float]:
    rank = by_pattern(config.rank_pattern, path, config.r)
    alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
    return rank, alpha, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _check_fits(key: str, value: Any, own: Tensor, layer: LoraLayer | None) -> None:
    """Along the ranks a tensor may be smaller, or larger; everywhere else it is of the same size."""
    fits = is_plain(value) and value.dim() == own.dim() and value.is_floating_point()
    axis = _rank_axis(key) if layer is not None else None
    if not fits or any(value.shape[d] != own.shape[d] for d in range(own.dim()) if d != axis):
        got = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{key} is {tuple(own.shape)} in the model, got {got}: is it another model's?")


def _rank_axis(key: str) -> int | None:
    """Along which dimension the ranks of a weight lie."""
    parts = key.split(".")
    if "lora_A" in parts or "lora_embedding_A" in parts:
        return 0
    is_B = ("lora_B" in parts and parts[-1] == "weight") or "lora_embedding_B" in parts
    return 1 if is_B else None


def _holds(own: Tensor, value: Tensor) -> bool:
    return all(have >= need for have, need in zip(own.shape, value.shape))


def _write(model: nn.Module, own: nn.Parameter, name: str, value: Tensor) -> None:
    if own.shape == value.shape:
        sharded.write(own, value)
    elif _holds(own, value):
        blocks = blocks_of_A(model.get_submodule(name.partition(".lora_")[0])) if _rank_axis(name) == 0 else 1
        sharded.write(own, padded(value.to(own.device, own.dtype), own.shape, blocks))
    else:
        own.data = value.to(own.device, own.dtype, copy=True)


def _silence(layer: LoraLayer, name: str) -> None:
    """An adapter that does nothing: A and B zero, and with DoRA the magnitudes of the base weight."""
    for parameter in layer.adapter_parameters(name):
        parameter.zero_()
    if name in layer.lora_magnitude_vector:
        magnitude: Any = layer.lora_magnitude_vector[name].weight
        magnitude.copy_(dora.initial_magnitude(layer, name).view(magnitude.shape))


def _note(model: Any, adapter_name: str, config: LoraConfig) -> None:
    """The new ranks in the adapter's config, for who saves it; a model of another library may have none."""
    configs = getattr(model, "peft_config", None)
    there = configs.get(adapter_name) if isinstance(configs, dict) else None
    if there is not None:
        new = copy.deepcopy(config)
        for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
            setattr(there, name, getattr(new, name))


def _check_rank(layer: LoraLayer, target_rank: int) -> None:
    groups = groups_of(layer)
    if isinstance(layer, Conv2d) and target_rank % groups:
        raise ValueError(f"target_rank must be divisible by the {groups} groups of a convolution, got {target_rank}")
    for name in layer.lora_A if isinstance(layer, PADDED) else ():
        rank = rank_of(layer, name)
        if rank > target_rank:
            raise ValueError(
                f"target_rank must be the largest rank of all adapters: adapter {name!r} has {rank}, got {target_rank}"
            )


def _set_rank(config: LoraConfig, target_rank: int) -> None:
    if not config.rank_pattern and not config.alpha_pattern:
        factor = target_rank / config.r
        config.lora_alpha *= math.sqrt(factor) if config.use_rslora else factor
    config.r = target_rank
    config.rank_pattern = dict.fromkeys(config.rank_pattern, target_rank)
