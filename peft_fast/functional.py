"""What other libraries do to the adapters of a model without a PeftModel around it, under peft's names.

`model` went through inject_adapter_in_model; a PeftModel works too. What is active is a matter of each layer then.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .inject import inject_adapter_in_model, tuner_of
from .tuners.layer import BaseTunerLayer


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Make one adapter or several active, trainable unless `inference_mode`. Raises ValueError for unknown ones."""
    _refuse_layer_class(layer_cls)
    tuner_of(model)[0].set_adapter(adapter_name, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str | None = None, layer_cls: Any = None
) -> list[str] | None:
    """Remove an adapter; returns the names that are active then, or None.

    `prefix`: "lora_", say; of the names of its weights.
    """
    _refuse_layer_class(layer_cls)
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


def _refuse_layer_class(layer_cls: Any) -> None:
    if layer_cls not in (None, BaseTunerLayer):
        raise NotImplementedError("layer_cls, other layer classes than our own, is not built: leave it out")


__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
