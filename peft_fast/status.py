"""What state the adapters of a model are in, layer by layer and all together."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from .peft_types import PeftType
from .tuners.base import BaseTuner
from .tuners.base_weight import quantized_weight, storage
from .tuners.layer import AdapterHolder, BaseTunerLayer

Irregular = Literal["irregular"]  # the parts disagree
Value = TypeVar("Value")


@dataclass
class TunerLayerStatus:
    """One adapted layer, or one module that is trained whole.

    name                 its path: "model.model.layers.0.self_attn.q_proj" in a PeftModel, as in peft
    module_type          "lora.Linear", "ModulesToSaveWrapper"
    enabled              False while adapters are switched off
    active_adapters      those in use, as far as this layer has them
    merged_adapters      those that are in the base weight now
    requires_grad        by adapter: True, False, or "irregular" where its weights differ
    available_adapters   those that this layer has, sorted
    devices              by adapter: the types of the devices that its weights are on, sorted
    quantization_backend "bnb 4bit" and "bnb 8bit", as in peft's documents (its LoRA layers leave it None), "nf4" and
                         others for a peft_fast.QuantizedLinear; None for a dense layer
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All adapted layers of a model; "irregular" where they disagree, which is seldom meant.

    base_model_type      the class of the user's model; "other" for one that is no transformers model and not wrapped
    adapter_model_type   "LoraModel"; "None" without a PeftModel around the model
    peft_types           by adapter: "LORA"; empty without a PeftModel
    trainable_params, total_params   see PeftModel.get_nb_trainable_parameters
    num_adapter_layers   how many layers get_layer_status gives
    the others           as in TunerLayerStatus. An adapter is merged irregularly where some layer that has it did not
                         merge it.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every module of `model` that has adapters: a PeftModel, or any module they were put into.

    Raises ValueError where there are none, TypeError for a PeftModel that learns prompts.
    """
    if getattr(model, "_is_prompt_learning", False) is True:
        raise TypeError(
            "get_layer_status and get_model_status are for adapters in layers, and this PeftModel learns prompts: see "
            "its peft_config, active_adapters and prompt_encoder"
        )
    root = getattr(model, "base_model") if _is_peft_model(model) else model  # noqa: B009 (typed as a Tensor else)
    found = [_of_layer(name, module) for name, module in root.named_modules() if isinstance(module, AdapterHolder)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no adapter layers: put some in with get_peft_model or inject_adapter_in_model"
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of all adapters of `model` together. Raises ValueError where there are none."""
    layers = get_layer_status(model)
    base, adapters, methods = _kinds(model)
    trainable, total = count_parameters(model)
    active = _agreed(tuple(layer.active_adapters) for layer in layers)
    return TunerModelStatus(
        base_model_type=base,
        adapter_model_type=adapters,
        peft_types=methods,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters="irregular" if active == "irregular" else list(active),
        merged_adapters=_merged(layers),
        requires_grad={
            name: _agreed(values) for name, values in _by_adapter(layer.requires_grad for layer in layers).items()
        },
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({device for devices in values for device in devices})
            for name, values in _by_adapter(layer.devices for layer in layers).items()
        },
        quantization_backend=_agreed(layer.quantization_backend for layer in layers),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. A k-bit weight counts its elements, not its bytes."""
    numbers = {id(parameter): _elements(parameter) for parameter in model.parameters()}
    for module in model.modules():
        weight = quantized_weight(module)
        if weight is not None:
            numbers[id(module if (own := storage(module)) is None else own)] = weight.shape[0] * weight.shape[1]
    trainable = sum(numbers[id(parameter)] for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(numbers.values())


def _elements(parameter: Any) -> int:
    """Also where DeepSpeed's ZeRO-3 keeps the values elsewhere."""
    return parameter.numel() or getattr(parameter, "ds_numel", 0)


def _of_layer(name: str, layer: AdapterHolder) -> TunerLayerStatus:
    weights = {adapter: layer.adapter_parameters(adapter) for adapter in _order_of_adapters(layer)}
    return TunerLayerStatus(
        name=name,
        module_type=repr(layer).partition("(")[0],
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(getattr(layer, "merged_adapters", ())),
        requires_grad={adapter: _agreed(p.requires_grad for p in own) for adapter, own in weights.items() if own},
        available_adapters=layer.available_adapters(),
        devices={adapter: sorted({p.device.type for p in own}) for adapter, own in weights.items()},
        quantization_backend=_backend(layer),
    )


def _order_of_adapters(layer: AdapterHolder) -> list[str]:
    """In which they were added."""
    return list(dict.fromkeys(name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute)))


def _backend(layer: AdapterHolder) -> str | None:
    if not isinstance(layer, BaseTunerLayer):
        return None
    base = layer.get_base_layer()
    weight = quantized_weight(base)
    if weight is None:
        return None
    return f"bnb {weight.bits}bit" if type(base).__module__.startswith("bitsandbytes") else weight.quant_type


def _agreed(values: Iterable[Value]) -> Value | Irregular:
    """The value that all are, or "irregular"; of at least one."""
    first, *others = values
    return first if all(other == first for other in others) else "irregular"


def _by_adapter(parts: Iterable[dict[str, Value]]) -> dict[str, list[Value]]:
    found: dict[str, list[Value]] = {}
    for part in parts:
        for name, value in part.items():
            found.setdefault(name, []).append(value)
    return found


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    merged = {name for layer in layers for name in layer.merged_adapters}
    for layer in layers:
        if merged & set(layer.available_adapters) - set(layer.merged_adapters):
            return "irregular"
    return sorted(merged)


def _kinds(model: Any) -> tuple[str, str, dict[str, str]]:
    """The class of the base model, that of the tuner, and the adapters' methods."""
    if _is_peft_model(model):
        methods = {name: PeftType(config.peft_type).value for name, config in model.peft_config.items()}
        return type(model.get_base_model()).__name__, type(model.base_model).__name__, methods
    transformers = sys.modules.get("transformers.modeling_utils")  # not imported: there is no model of it then
    known = transformers is not None and isinstance(model, transformers.PreTrainedModel)
    return type(model).__name__ if known else "other", "None", {}


def _is_peft_model(model: nn.Module) -> bool:
    """A PeftModel (the class imports this module, so it is told by its tuner)."""
    return isinstance(model._modules.get("base_model"), BaseTuner)
