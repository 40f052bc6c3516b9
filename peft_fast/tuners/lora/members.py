"""Linear layers that one op may stand for, instead of calling them: each with its adapter, or with none.

mlp.py and groups.py ask here; what they are told not to do, `explain` prints.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_fast import ops
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.sharded import PLAIN, is_plain
from peft_fast.tuners.base_weight import is_touched, matmul_weight

from .bnb import Linear4bit, Linear8bitLt
from .called import why_called
from .layer import Linear, LoraLayer

# Classes of LoRA layers that an op may stand for, and why not for one of their layers with these adapters in effect:
# integrations/peft_layers.py adds to them.
JOINING: dict[type, Callable[[Any, Sequence[str]], str | None]] = dict.fromkeys(
    (Linear, Linear4bit, Linear8bitLt), why_called
)


class Member(NamedTuple):
    layer: Any
    adapter: str | None  # the one in effect
    weight: Tensor | QuantizedWeight  # of the base layer


def is_lora(layer: Any) -> bool:
    """Whether it is a layer with LoRA adapters, of ours or an accelerated one of peft's."""
    return isinstance(layer, LoraLayer) or type(layer) in JOINING


def member(layer: Any) -> Member | str:
    """How an op takes the layer, or why it must be called."""
    base, adapters = layer, []
    if is_lora(layer):
        if getattr(layer, "is_mixed", False):
            return "has a batch of several adapters"
        if type(layer) not in JOINING:
            return f"is a {type(layer).__name__}"
        if layer.merged:
            return "has merged adapters"
        base, adapters = layer._modules["base_layer"], layer.adapters_in_effect()
        if adapters and (reason := JOINING[type(layer)](layer, adapters)):
            return f"must be called: {reason}"
        if len(adapters) > 1:
            return "has several active adapters"
        if adapters and adapters[0] in layer._modules["lora_magnitude_vector"]:
            return "has an adapter with DoRA"
    if is_touched(layer):
        return "has hooks or a forward of its own"
    weight = matmul_weight(base)
    if weight is None:
        return f"must be called: its base layer, a {type(base).__name__}, has hooks or a forward of its own"
    if isinstance(weight, Tensor) and (not is_plain(weight) or weight.requires_grad):
        return f"has a weight that is {'trained' if weight.requires_grad else f'a {type(weight).__name__}'}"
    if layer is base and isinstance(weight, QuantizedWeight) and weight.bits == 8:
        return "has no adapter and multiplies in 8 bits"
    return Member(layer, adapters[0] if adapters else None, weight)


def common_backend(members: Sequence[Member]) -> tuple[str | None] | str:
    """(the backend that the layers were given,), or why there is none in common."""
    backends = {layer.backend for layer, _, _ in members if is_lora(layer)}
    return "its layers have different backends" if len(backends) > 1 else (backends.pop(),)


def common_dtype(members: Sequence[Member], x: Tensor | None) -> torch.dtype | str:
    """The one dtype, on one device, that all would multiply in, or why there is none. Without x, in the dtype and on
    the device of the weights."""
    weights = [weight for _, _, weight in members]
    device = weights[0].device if x is None else x.device
    if x is not None and type(x) not in PLAIN:
        return f"its input is a {type(x).__name__}"
    if any(weight.device != device for weight in weights):
        return "its layers or its input are on different devices"
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    dtypes = set()
    for layer, _, weight in members:
        base = layer.base_layer if is_lora(layer) else layer
        if autocast is not None and base is layer and isinstance(weight, QuantizedWeight):
            return "a k-bit layer without an adapter decides itself what it does under autocast"
        own = getattr(base, "compute_dtype", None) if isinstance(weight, QuantizedWeight) else weight.dtype
        if isinstance(weight, Tensor) and x is not None and autocast is None and own != x.dtype:
            return "its input has another dtype than its weights"
        dtypes.add(autocast or own or (weight.dtype if x is None else x.dtype))
    if len(dtypes) > 1:
        return "its layers multiply in different dtypes"
    return dtypes.pop()


def projections(members: Sequence[Member], x: Tensor) -> list[ops.Projection]:
    """The layers as ops take them for one forward of x; dropout keys come from one draw, or each layer has its own."""
    dropping = [layer.dropout_p(name) > 0 if name is not None else False for layer, name, _ in members]
    keys = iter(_keys([layer for (layer, _, _), drops in zip(members, dropping) if drops], x.device))
    return [
        ops.Projection(weight, layer.bias)
        if name is None
        else layer.projection(name, weight, next(keys) if drops else None)
        for (layer, name, weight), drops in zip(members, dropping)
    ]


def _keys(layers: Sequence[Any], device: torch.device) -> Sequence[Tensor]:
    given = [layer.given_key(device) for layer in layers if hasattr(layer, "given_key")]
    own = [key for key in given if key is not None]
    if len(own) < len(layers):
        return ops.new_dropout_keys(device, len(layers))  # type: ignore[return-value]
    return own
