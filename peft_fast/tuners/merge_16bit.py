"""From a model with adapters and k-bit layers to a plain one in 16 bits.

Nothing is quantised again: a weight is the fp32 sum of the exact k-bit weight and the adapters, rounded once. (Merging
into a k-bit layer rounds that sum to sixteen values a block, or 255 a row, and most of what was learnt with it.)
"""

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_fast import ops
from peft_fast.quant import bitsandbytes
from peft_fast.sharded import refuse_sharded
from peft_fast.transaction import unchanged_on_error

from .base_weight import HALF_DTYPES, check_writable, quantized_weight, set_base_weight
from .layer import AdapterHolder, BaseTunerLayer
from .modules_to_save import ModulesToSaveWrapper
from .trainable_tokens import TrainableTokensLayer
from .trainable_tokens.wrapper import TrainableTokensWrapper


@torch.no_grad()
def merge_to_16bit(model: nn.Module, adapter_names: Sequence[str], dtype: torch.dtype, progressbar: bool) -> None:
    """Put a plain layer of `dtype` in the place of every adapted or k-bit one, and cast what else is floating point.

    Adapters that are merged already are meant too. Raises ValueError, with the model as it was, for another dtype, a
    model that is offloaded or quantised by other libraries, an adapted weight that other layers share, and sums that
    `dtype` cannot hold.
    """
    _check(model, dtype)
    places, tied = list(_places(model)), _tied_tokens(model)
    wrappers = [(path, module) for path, module in model.named_modules() if isinstance(module, TrainableTokensWrapper)]
    made: dict[nn.Module, nn.Module] = {}  # a layer under several names becomes one layer
    with unchanged_on_error(model):
        for path, layer in tqdm(places, f"merging to {dtype}", unit="layer", disable=None if progressbar else True):
            if layer not in made:
                made[layer] = _plain(path, layer, adapter_names, dtype)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[layer])
        for layer, source in tied:
            layer.weight = source.weight
        for path, wrapper in wrappers:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, wrapper.token_adapter)  # which is the layer itself by now
        _cast_the_rest(model, dtype)
    _forget_quantisation(model, dtype)


def _check(model: Any, dtype: torch.dtype) -> None:
    if dtype not in HALF_DTYPES:
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype!r}")
    method = getattr(model, "quantization_method", None)
    if method not in (None, "bitsandbytes"):
        raise ValueError(
            f"merge_to_16bit knows the k-bit layers of bitsandbytes and peft_fast, not those of {method}: call "
            "unload() and the model's own dequantize(), and load the adapter onto that"
        )
    refuse_sharded(model, "merge_to_16bit")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("weights are on the meta device or offloaded: load the whole model onto one device")
    same = {module for pair in _tied_tokens(model) for module in pair}
    users: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append(path)
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if layer.weight_name != "weight":
            raise ValueError(
                f"merge_to_16bit knows no {type(layer.get_base_layer()).__name__}, which is at {path}: call "
                "merge_and_unload(), and cast the model"
            )
        check_writable(layer.get_base_layer())
        others = [name for name in users.get(layer.weight, []) if not name.startswith(f"{path}.")]  # type: ignore[call-overload]
        if isinstance(layer, TrainableTokensLayer):
            others = [name for name in others if model.get_submodule(name) not in same]
        if others:
            raise ValueError(
                f"the weight of {path} is also {others[0]}'s, which the adapter must not change: give one of them a "
                "copy, and set tie_word_embeddings=False in the model's config, before get_peft_model"
            )


def _tied_tokens(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(output layer, embedding) that share a weight, and the rows of tokens that are trained in it."""
    layers = [layer for layer in model.modules() if isinstance(layer, TrainableTokensLayer)]
    pairs = [(layer.base_layer, layer.tied_adapter.base_layer) for layer in layers if layer.tied_adapter is not None]
    return [(layer, source) for layer, source in pairs if layer.weight is source.weight]


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of what has to be replaced, under each of its names: holders of adapters and k-bit layers."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if inside and path.startswith(inside):
            continue
        if isinstance(module, AdapterHolder):
            inside = (f"{path}.",)
            yield path, module
        elif quantized_weight(module) is not None:
            yield path, module


def _plain(path: str, layer: nn.Module, adapter_names: Sequence[str], dtype: torch.dtype) -> nn.Module:
    """What stands for `layer` in the model without adapters."""
    if isinstance(layer, ModulesToSaveWrapper):
        return layer.module_of(adapter_names)
    if isinstance(layer, BaseTunerLayer):
        here = [name for name in adapter_names if name in layer.available_adapters()]
        base: Any = layer.get_base_layer()
        if layer.bias is None and any(layer.get_delta_bias(name) is not None for name in here):
            raise ValueError(
                f"an adapter of {path} has a bias and the layer has none to merge it into: a plain model has no place "
                "for it"
            )
        weight, bias = layer.shifted_base([name for name in here if name not in layer.merged_adapters])
        bias = layer.bias if bias is None else bias
    else:
        base, quantized = layer, quantized_weight(layer)
        assert quantized is not None
        weight, bias = ops.dequantize(quantized, torch.float32), base.bias
    if not all(bool(values.to(dtype).isfinite().all()) for values in (weight, bias) if values is not None):
        raise ValueError(f"{path}: the sum of weight and adapters has inf or NaN in {dtype}: the adapter is broken")
    if quantized_weight(base) is not None or bitsandbytes.is_linear8bit(base):
        return _twin(path, base, weight, bias, dtype)
    return _with_values(base, weight, bias, dtype)


def _with_values(layer: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The dense layer itself, with new parameters: those it had keep their values, for the case of an error later."""
    flags = layer.weight.requires_grad, bias is not None and layer.bias.requires_grad
    layer.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=dtype), requires_grad=flags[0])
    set_base_weight(layer, weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=flags[1])
    return layer


def _twin(path: str, layer: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A dense layer with this weight [N, K] in the place of a k-bit one: of the class that it had before, nn.Linear or
    transformers' Conv1D, which keeps its weight [K, N] (transformers notes it as `source_cls`)."""
    source, rounded = getattr(layer, "source_cls", nn.Linear), weight.to(dtype)
    with torch.device("meta"):
        if source.__name__ == "Conv1D":
            twin, rounded = source(layer.out_features, layer.in_features), rounded.t().contiguous()
        else:
            twin = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    twin.weight = nn.Parameter(rounded, requires_grad=False)
    if bias is not None:
        twin.bias = nn.Parameter(bias.to(dtype), requires_grad=layer.bias.requires_grad)
    if any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)):
        warnings.warn(f"the hooks of {path} stay with its k-bit layer: register them anew", stacklevel=6)
    if hasattr(layer, "_hf_hook"):  # of accelerate, which moves inputs to the layer's device
        sys.modules["accelerate"].hooks.add_hook_to_module(twin, layer._hf_hook)
    return twin.train(layer.training)


def _cast_the_rest(model: Any, dtype: torch.dtype) -> None:
    """Cast the remaining parameters, but for those that transformers loads in fp32 whatever is asked for; tied ones
    stay tied. They are replaced, not written to, for the case of an error later."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept = re.compile("|".join(rf"(?:^|\.){name}\." for name in names)) if names else None
    cast: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_floating_point() or parameter.dtype == dtype:
                continue
            if kept and kept.search(f"{path}.{name}"):
                continue
            if parameter not in cast:
                cast[parameter] = nn.Parameter(parameter.to(dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, cast[parameter])


def _forget_quantisation(model: Any, dtype: torch.dtype) -> None:
    """Take off what transformers notes at a quantised model, so that it saves and moves this one as any other."""
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            delattr(model, name)
    if "is_quantized" in vars(model):
        model.is_quantized = False
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None:
            continue
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if getattr(config, "_is_quantized", False):
            config._is_quantized = False
        if hasattr(config, "dtype"):
            config.dtype = dtype
