"""What other libraries do to the adapters of a model without a PeftModel around it, under peft's names.

`model` went through inject_adapter_in_model; a PeftModel works too. What is active is a matter of each layer then.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from .checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .inject import inject_adapter_in_model, tuner_of
from .tuners.layer import AdapterHolder, BaseTunerLayer
from .tuners.modules_to_save import ModulesToSaveWrapper
from .tuners.trainable_tokens import TrainableTokensLayer


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
) -> None:
    """Make one adapter or several active, trainable unless `inference_mode`. Raises ValueError for unknown ones.

    `layer_cls`: only in layers of this class, and in what is trained beside them.
    """
    if _all_layers(layer_cls):
        tuner_of(model)[0].set_adapter(adapter_name, inference_mode)
        return
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    holders = _holders(model, layer_cls)
    _check_known(holders, names)
    for holder in holders:
        holder.check_set_adapter(names)
    for holder in holders:
        if isinstance(holder, BaseTunerLayer) and holder.merged:
            warnings.warn("the merged adapters are unmerged before another adapter is set", stacklevel=2)
            holder.unmerge()
        holder.set_adapter(names, inference_mode)


def delete_adapter(
    model: nn.Module,
    adapter_name: str,
    prefix: str | None = None,
    layer_cls: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
) -> list[str] | None:
    """Remove an adapter; returns the names that are active then, or None.

    `prefix`: "lora_", say; of the names of its weights. `layer_cls`: as for set_adapter; the adapter's config stays.
    """
    if not _all_layers(layer_cls):
        return _deleted(_holders(model, layer_cls), adapter_name)
    tuner, _ = tuner_of(model)
    if prefix not in (None, tuner.prefix):
        raise ValueError(f"prefix must be {tuner.prefix!r}, which the adapters of this model have, got {prefix!r}")
    tuner.delete_adapter(adapter_name)
    return list(tuner.active_adapters) or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    tuner_of(model)[0].set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Make an adapter's fp16 and bf16 weights fp32, unless switched off."""
    tuner, _ = tuner_of(model)
    tuner._check_known([adapter_name])
    if autocast_adapter_dtype:
        tuner._cast_to_float32(adapter_name)


def _all_layers(layer_cls: Any) -> bool:
    return layer_cls is None or layer_cls is BaseTunerLayer


def _holders(model: nn.Module, layer_cls: Any) -> list[Any]:
    """Of the layers with adapters those of this class, and what is trained beside them."""
    found = [module for module in model.modules() if isinstance(module, AdapterHolder)]
    beside = (ModulesToSaveWrapper, TrainableTokensLayer)
    kept = [holder for holder in found if isinstance(holder, (layer_cls, beside))]
    if not any(isinstance(holder, layer_cls) for holder in kept):
        raise ValueError(f"{type(model).__name__} has no layers of the class {layer_cls}")
    return kept


def _check_known(holders: Sequence[Any], names: Sequence[str]) -> None:
    known = {name for holder in holders for name in holder.available_adapters()}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"adapter {unknown[0]!r} does not exist in these layers: there are {sorted(known)}")


def _deleted(holders: Sequence[Any], name: str) -> list[str] | None:
    _check_known(holders, [name])
    if any(name in getattr(holder, "merged_adapters", ()) for holder in holders):
        raise ValueError(f"adapter {name!r} is merged: unmerge it first")
    active = [one for one in holders[0].active_adapters if one != name]
    left = sorted({one for holder in holders for one in holder.available_adapters()} - {name})
    if not active and left:
        active = left[:1]
        warnings.warn(f"the active adapter {name!r} was deleted: {active[0]!r} is active now", stacklevel=3)
    for holder in holders:
        was_active = name in holder.active_adapters
        holder.delete_adapter(name)
        if was_active:
            holder.set_adapter(active)
    return active or None


__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
