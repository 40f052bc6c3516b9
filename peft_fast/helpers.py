"""Helpers around a PeftModel or a model with adapters, under peft's names."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from .config import PeftConfig
from .kappa import KappaTuneSelector, find_kappa_target_modules
from .model import PeftModel
from .tuners.layer import BaseTunerLayer
from .tuners.lora.dora import DoraCaching
from .tuners.lora.layer import LoraLayer
from .tuners.lora.model import LoraModel
from .tuners.scaling import checked_factor

__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "LoraModel",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block every LoRA adapter of `model` acts with `multiplier` times its scale; afterwards as before.

    With a multiplier from 0 to 1 that is weight interpolation between base and fine-tuned model (WiSE-FT, arXiv
    2109.01903). Raises TypeError for what is no number, ValueError for a model without LoRA layers or a merged one.
    """
    factor = checked_factor("multiplier", multiplier)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(f"rescale_adapter_scale is for models with LoRA layers: {type(model).__name__} has none")
    if any(layer.merged for layer in layers):
        raise ValueError("adapters are merged with the scale that they have: call unmerge_adapter first")
    before = [dict(layer.scaling) for layer in layers]
    for layer, scaling in zip(layers, before):
        layer.scaling.update({name: scale * factor for name, scale in scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling.update({name: scale for name, scale in scaling.items() if name in layer.scaling})


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the block no layer casts its input to the dtype of its adapters, for who casts the adapters itself by
    hooks, as diffusers' layerwise casting does. `active=False`: the block changes nothing.

    It concerns convolutions and DoRA. A linear layer never casts its input: the adapter is cast to the input's dtype.
    """
    layers = [module for module in model.modules() if active and isinstance(module, BaseTunerLayer)]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.cast_input_dtype_enabled = enabled


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder or a Hub repository holds the config of an adapter that can be read here."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (ValueError, TypeError, NotImplementedError):  # the last: of a kind that is not built here
        return False
    return True


def update_forward_signature(model: PeftModel) -> None:
    """Give `model.forward`, where it takes anything, the signature and the documentation of the base model's."""
    _take_over(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """Give `model.generate` the signature and the documentation of the base model's."""
    _take_over(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Both of the above, or one: `method` is "forward", "generate" or "all"."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method must be 'forward', 'generate' or 'all', got {method!r}")
    for name in ("forward", "generate") if method == "all" else (method,):
        _take_over(model, name)


def _take_over(model: Any, name: str) -> None:
    of_base = getattr(type(model.get_base_model()), name, None)
    parameters = inspect.signature(getattr(model, name)).parameters.values()
    anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if of_base is None or any(parameter.kind not in anything for parameter in parameters):
        return
    own = getattr(type(model), name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, of_base.__doc__
    method.__annotations__ = dict(of_base.__annotations__)
    method.__signature__ = inspect.signature(of_base)  # type: ignore[attr-defined]
    setattr(model, name, MethodType(method, model))
