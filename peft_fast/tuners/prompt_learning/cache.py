"""Prefixes as what transformers keeps of the tokens before: its caches of keys and values."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from peft_fast.tuners.offload import home

from .sizes import key_value_shapes, text_config


def prefix_cache(model: Any, config: Any, prompts: Tensor, cache: Any = None) -> Cache:
    """A cache with the prefix in every layer that has keys and values of its own.

    prompts: [batch, tokens, layers * 2 * token_dim]. cache: an empty one to put it into; a new one where it is None.
    Raises ValueError where no layer takes keys and values of this size.
    """
    pairs = keys_and_values(config, prompts)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cache is None else cache
        _fill(cache.self_attention_cache, enumerate(pairs), model)
        return cache
    of_model = text_config(model)
    cache = DynamicCache(config=of_model) if cache is None else cache
    _fill(cache, _those_that_fit(of_model, config, pairs), model)
    return cache


def keys_and_values(config: Any, prompts: Tensor) -> list[tuple[Tensor, Tensor]]:
    """By layer, [batch, heads, tokens, dim] each.

    Where encoder and decoder both count, only every other pair is used and some serve two layers, as in peft, which
    made four tensors a layer and forgot two: prefixes were trained that way.
    """
    batch, tokens, _ = prompts.shape
    heads, layers = config.num_attention_heads, config.num_layers
    states = prompts.view(batch, tokens, 2 * layers, heads, config.token_dim // heads).permute(2, 0, 3, 1, 4)
    step = 2 * config.num_transformer_submodules
    starts = [step * layer % (2 * layers) for layer in range(layers)]
    return [(states[start], states[start + 1]) for start in starts]


def _those_that_fit(of_model: Any, config: Any, pairs: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """(layer, (keys, values)): cut to the layer's size; without layers that are larger, or that use another's."""
    shapes = key_value_shapes(of_model)
    if shapes is None:
        return list(enumerate(pairs))
    shared = getattr(of_model, "num_kv_shared_layers", 0)
    fitting: list[Any] = []
    for index, (keys, values) in enumerate(pairs):
        heads, dim = shapes[index]
        if index < len(shapes) - shared and heads <= keys.shape[1] and dim <= keys.shape[3]:
            fitting.append((index, (keys[:, :heads, :, :dim], values[:, :heads, :, :dim])))
    if not fitting:
        raise ValueError(
            f"the prefix has {config.num_attention_heads} heads of {config.token_dim // config.num_attention_heads}, "
            f"and no layer of the model has as many or fewer and keys of its own: theirs are {sorted(set(shapes))}"
        )
    if len(fitting) < len(pairs):
        left = sorted(set(range(len(pairs))) - {index for index, _ in fitting})
        warnings.warn(f"layers {left} get no prefix: they are of another size, or use another layer's", stacklevel=3)
    return fitting


def _fill(cache: Cache, pairs: Any, model: Any) -> None:
    devices = _devices(model)
    for index, (keys, values) in pairs:
        device = devices[index] if devices else keys.device
        cache.update(keys.to(device), values.to(device), index)


def _devices(model: Any) -> list[torch.device] | None:
    """By layer, where accelerate has spread the model over several devices."""
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) < 2:
        return None
    count = text_config(model).num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    layers = next(lists, None)
    return None if layers is None else [_device(layer) for layer in layers]


def _device(layer: nn.Module) -> torch.device:
    homes = (home(module) for module in layer.modules())  # offloaded, it is on the device that it computes on
    return next((device for device in homes if device is not None), next(layer.parameters()).device)
