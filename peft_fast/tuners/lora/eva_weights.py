"""EVA's components in an adapter that is there: other ranks for its layers, and a config that says so."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.adapter_file import PREFIX
from peft_fast.transaction import unchanged_on_error
from peft_fast.tuners.matching import MANY, adaptable_paths, by_pattern, shortest

from . import dora
from .config import LoraConfig
from .groups import group_siblings, ungroup_siblings
from .layer import LoraLayer
from .mlp import fuse_mlps, restore_mlps


def checked_model(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The adapter's config. Raises ValueError where it is not EVA's, or is not the model's only active one."""
    configs: Any = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not hasattr(getattr(model, "base_model", None), "layers"):
        raise ValueError(f"model must be a PeftModel, got {type(model).__name__}")
    if adapter_name not in configs:
        raise ValueError(f"adapter {adapter_name!r} does not exist: there are {sorted(configs)}")
    active: Any = getattr(model, "active_adapters", [])
    if len(active) > 1:
        raise ValueError(f"EVA needs a single active adapter, got {active}: call set_adapter({adapter_name!r})")
    config = configs[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ValueError(
            f"EVA is for adapters with init_lora_weights='eva', and {adapter_name!r} has "
            f"{getattr(config, 'init_lora_weights', None)!r}"
        )
    return config


@torch.no_grad()
def write_components(model: Any, components: Mapping[str, Tensor], adapter_name: str) -> None:
    """Give each layer its components [rank, K]. Raises ValueError, with the model unchanged, for what does not fit."""
    tuner, config = model.base_model, model.peft_config[adapter_name]
    adapted = ((path, layer) for path, layer in tuner.layers() if layer.has_adapter(adapter_name))
    layers: dict[str, Any] = {path: layer for path, layer in adapted if isinstance(layer, LoraLayer)}
    found = {path: components.get(PREFIX + path, components.get(path)) for path in layers}
    _check(layers, found, components)
    plain = copy.copy(config)
    plain.init_lora_weights = True
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    with unchanged_on_error(tuner, config):
        if any(vectors is not None and not len(vectors) for vectors in found.values()):
            restore_mlps(tuner.model)
            ungroup_siblings(tuner.model)
        for path, layer in layers.items():
            r = by_pattern(config.rank_pattern, path, config.r)
            alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
            vectors = found[path]
            rank = r if vectors is None else len(vectors)
            if rank == 0:
                _take_away(tuner, path, layer, adapter_name)
                continue
            if rank != r and config.eva_config.adjust_scaling_factors:
                alpha *= rank / r
            on_meta = any(parameter.is_meta for parameter in layer.adapter_parameters(adapter_name))
            if vectors is None and (on_meta or layer.starts_from_weight):  # others have started plainly
                _renew(layer, adapter_name, r, alpha, plain)
            elif vectors is not None and (on_meta or rank != r):
                _renew(layer, adapter_name, rank, alpha, config)
            ranks |= {path: rank} if rank != config.r else {}
            alphas |= {path: alpha} if alpha != config.lora_alpha else {}
        left = [path for path, layer in tuner.layers() if layer.has_adapter(adapter_name)]
        paths = adaptable_paths(tuner.model)
        config.target_modules = set(left) if len(left) < MANY else shortest(left, paths)
        config.rank_pattern, config.alpha_pattern = ranks, alphas
        fuse_mlps(tuner.model)
        group_siblings(tuner.model)
    for path, vectors in found.items():
        if vectors is not None and len(vectors):
            layers[path].lora_A[adapter_name].weight.copy_(vectors)
            layers[path].kept_norms.clear()
    if plainly := [path for path, vectors in found.items() if vectors is None]:
        warnings.warn(
            f"EVA has no components for {plainly}, which start plainly: it is for linear layers", stacklevel=4
        )


def _check(layers: Mapping[str, Any], found: Mapping[str, Tensor | None], components: Mapping[str, Tensor]) -> None:
    known = {name for path in layers for name in (path, PREFIX + path)}
    if unknown := sorted(components.keys() - known):
        raise ValueError(f"the components are of layers that the adapter is not on, such as {unknown[0]!r}")
    for path, vectors in found.items():
        layer = layers[path]
        if layer.merged:
            raise ValueError(f"adapters {layer.merged_adapters} are merged into {path}: call unmerge_adapter first")
        if vectors is None:
            continue
        if not getattr(layer, "starts_from_weight", False):
            raise ValueError(f"EVA's components are for linear layers, and {path} is LoRA around another kind")
        K = layer.in_features
        if not isinstance(vectors, Tensor) or vectors.dim() != 2 or vectors.shape[1] != K:
            got = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
            raise ValueError(f"the components of {path} must be [rank, {K}], got {got}")
        if not bool(vectors.isfinite().all()):
            raise ValueError(f"the components of {path} hold inf or NaN")
    if not any(vectors is not None and len(vectors) for vectors in found.values()):
        raise ValueError("the components name none of the adapter's layers, or none with a rank above 0")


def _renew(layer: Any, adapter_name: str, rank: int, alpha: float, config: LoraConfig) -> None:
    """Make the adapter's weights of this layer anew: trained or not, and of the dtype, that they were."""
    old = layer.adapter_parameters(adapter_name)
    trained, dtype = any(parameter.requires_grad for parameter in old), old[0].dtype
    for attribute in layer.adapter_layer_names:  # what is on the meta device would keep the new ones there
        if adapter_name in getattr(layer, attribute):
            del getattr(layer, attribute)[adapter_name]
    layer.update_layer(adapter_name, rank, alpha, config)
    for parameter in layer.adapter_parameters(adapter_name):
        parameter.data = parameter.data.to(dtype)
    layer.set_requires_grad(adapter_name, trained)
    if adapter_name in layer.lora_magnitude_vector:
        dora.unround(layer, adapter_name)


def _take_away(tuner: Any, path: str, layer: Any, adapter_name: str) -> None:
    """The adapter leaves this layer, and with the last adapter the layer is the base model's own again."""
    active = list(layer.active_adapters)
    layer.delete_adapter(adapter_name)
    layer._active_adapter = active
    if not layer.available_adapters():
        tuner._replace(path, layer.base_layer)
        tuner.targeted_module_names.remove(path)
