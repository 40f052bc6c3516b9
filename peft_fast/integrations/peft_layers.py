"""Real peft's LoRA layers on our ops: what `accelerate` makes of them.

A layer keeps its identity, its attributes and its state; the class of this one instance becomes a subclass of its own,
with AcceleratedLinear or AcceleratedEmbedding in front (as tuners/lora/mlp.py does it with MLPs). They compute as
our own layers do, by the same functions: those ask a layer for nothing that peft's layers have not got under the same
name. Whatever our ops do not cover is peft's own forward, asked anew at every call.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.dispatch import Choice
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.sharded import PLAIN, is_plain
from peft_fast.tuners.base_weight import base_weight, matmul_weight, why_not_embedding
from peft_fast.tuners.lora.called import why_called
from peft_fast.tuners.lora.embedding import Embedding
from peft_fast.tuners.lora.layer import Linear
from peft_fast.tuners.lora.members import JOINING


class Accelerated:
    """What all of them have. `original_class` is peft's class of the layer."""

    mixed_batch, is_mixed = None, False  # peft's own goes by an argument
    invocations = ()  # peft's own activated adapters are variants

    original_class: Any
    backend: str | None = None

    def adapters_in_effect(self: Any) -> list[str]:
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.scaling]

    def base_weight(self: Any) -> Tensor | QuantizedWeight:
        return base_weight(self.get_base_layer())

    def why_idle(self: Any) -> str:
        return "merged" if self.merged else "switched off" if self.disable_adapters else "not active here"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: made again from peft's class."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))  # (function, its arguments, the state, ...)
        return _new, (self.original_class,), *reduced[2:]


def _new(original: Any) -> nn.Module:
    cls = accelerated_class(original)
    return cls.__new__(cls)


class AcceleratedLinear(Accelerated):
    """peft's lora.Linear and lora.Linear4bit."""

    group: Any = None  # see Linear
    factors = Linear.factors
    dropout_p = Linear.dropout_p
    get_delta_bias = Linear.get_delta_bias
    projection = Linear.projection
    plus = Linear.plus
    own_dtype = Linear.own_dtype
    _base_and = Linear._base_and
    _dropout = Linear._dropout
    given_key = Linear.given_key
    new_key = Linear.new_key

    def product_weight(self: Any) -> Tensor | QuantizedWeight | None:
        return matmul_weight(self.base_layer)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., in_features] -> [..., out_features]"""
        if not args and not kwargs and why_not_linear(self, x) is None:
            return Linear.forward(self, x)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def route(self: Any, tokens: int) -> Choice:
        reason = why_not_linear(self) if self.adapters_in_effect() else None
        return Choice("peft", "peft", reason) if reason else Linear.route(self, tokens)


class Accelerated8bit(AcceleratedLinear):
    """peft's lora.Linear8bitLt. bitsandbytes rounds activations to 8 bits there, and goes on doing so: adapters are
    added to what it computes. (Our own layers multiply such a weight in floating point.)"""

    def product_weight(self) -> None:
        return None

    def route(self: Any, tokens: int) -> Choice:
        choice = super().route(tokens)
        if choice.route in ("peft", "base"):
            return choice
        return Choice("lora_up_add", "added", "bitsandbytes multiplies in 8 bits, as it did")


class AcceleratedEmbedding(Accelerated):
    """peft's lora.Embedding."""

    _add = Embedding._add

    def forward(self: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """ids: [...] -> [..., embedding_dim]"""
        if not args and not kwargs and why_not_lookup(self) is None:
            return Embedding.forward(self, ids)
        return super().forward(ids, *args, **kwargs)  # type: ignore[misc]

    def route(self: Any, tokens: int) -> Choice:
        reason = why_not_lookup(self) if self.adapters_in_effect() else None
        return Choice("peft", "peft", reason) if reason else Embedding.route(self, tokens)


def why_not_linear(layer: Any, x: Tensor | None = None) -> str | None:
    """Why peft's own forward has to run now, or None. Without x: for any input that the base layer takes."""
    adapters = layer.adapters_in_effect()
    if not adapters:
        return f"the adapters are {layer.why_idle()}"  # and peft unmerges them where they are switched off
    if reason := _why_not_adapters(layer, adapters):
        return reason
    weight = layer.product_weight()
    if isinstance(weight, Tensor) and not is_plain(weight):
        return f"the base weight is a {type(weight).__name__}"
    if x is not None and (type(x) not in PLAIN or not x.is_floating_point()):
        return f"the input is a {type(x).__name__} of {x.dtype}"
    dtype = _product_dtype(layer, weight, x)
    if isinstance(weight, Tensor) and x is not None and dtype is None:
        return f"the input is {x.dtype} and the base weight {weight.dtype}"
    for name in adapters:
        for factor in layer.factors(name):
            if dtype is not None and factor.weight.dtype not in (torch.float32, dtype):
                return f"the weights of {name!r} are {factor.weight.dtype}, and the layer computes in {dtype}"
    return None


def _product_dtype(layer: Any, weight: Tensor | QuantizedWeight | None, x: Tensor | None) -> torch.dtype | None:
    """In which dtype the layer multiplies; None where that is not known, and for a dense weight of another dtype than
    x, which torch refuses."""
    device = (layer.base_layer.weight if x is None else x).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    given = None if x is None else x.dtype
    if isinstance(weight, Tensor):
        return weight.dtype if given in (None, weight.dtype) else None
    own = getattr(layer.base_layer, "compute_dtype", None) if isinstance(weight, QuantizedWeight) else None
    return own or given


def _why_not_adapters(layer: Any, adapters: list[str]) -> str | None:
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting of its input is switched off (disable_input_dtype_casting)"
    for name in adapters:
        if name in layer.lora_variant:
            return f"{name!r} is no plain LoRA: {type(layer.lora_variant[name]).__name__}"
    return why_called(layer, adapters)


def why_not_lookup(layer: Any) -> str | None:
    """Why peft's own forward has to run now, or None."""
    adapters = layer.adapters_in_effect()
    if not adapters:
        return f"the adapters are {layer.why_idle()}"
    base = layer.get_base_layer()
    if reason := why_not_embedding(base):
        return reason
    for name in adapters:
        if name in layer.lora_variant:
            return f"{name!r} is no plain LoRA: {type(layer.lora_variant[name]).__name__}"
        if name in layer.input_fns or name in layer.output_fns:
            return f"{name!r} is sharded by tensor parallelism"
        for factor in (layer.lora_embedding_A[name], layer.lora_embedding_B[name]):
            if not is_plain(factor) or factor.dtype not in (torch.float32, base.weight.dtype):
                return f"a factor of {name!r} is a {type(factor).__name__} of {factor.dtype}"
    return None


KINDS: dict[tuple[str, str], type[Accelerated]] = {
    ("peft.tuners.lora.layer", "Linear"): AcceleratedLinear,
    ("peft.tuners.lora.layer", "Embedding"): AcceleratedEmbedding,
    ("peft.tuners.lora.bnb", "Linear4bit"): AcceleratedLinear,
    ("peft.tuners.lora.bnb", "Linear8bitLt"): Accelerated8bit,
}


@functools.cache
def accelerated_class(original: Any) -> Any:
    """The subclass that a layer of peft's gets, or None for a class that is not covered."""
    front = KINDS.get((original.__module__, original.__name__))
    if front is None:
        return None
    attributes = {"original_class": original, "__module__": __name__, "__qualname__": original.__qualname__}
    cls = type(original.__name__, (front, original), attributes)
    if front is AcceleratedLinear:
        JOINING[cls] = lambda layer, adapters: why_not_linear(layer)
    return cls


def is_peft_layer(module: nn.Module) -> bool:
    """Whether a module is a layer with adapters of real peft's. False while peft is not imported."""
    kind = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    return kind is not None and isinstance(module, kind)


def why_peft(module: Any) -> str:
    """Why a layer of peft's that is not accelerated is not."""
    cls: Any = type(module)
    if accelerated_class(cls) is None:
        return f"accelerate() does not cover peft's {cls.__qualname__}"
    return "peft made it: peft_fast.accelerate(model) has it run on peft_fast's ops"
