"""A linear layer in a batch whose samples go through different adapters: one op for all of them, however many."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_fast import ops
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.mixed_batch import MixedBatch, assigned, one_by_one

from .activated import invoked
from .called import why_called
from .scales import folded


class InMixedBatch(BaseTunerLayer):
    """What a linear layer says of the batch that its model has been given: see mixed_batch.py."""

    lora_magnitude_vector: Any

    @property
    def is_mixed(self) -> bool:
        """Whether multi.py takes this forward: its samples go through different adapters, or through one whose modules
        draw from torch's generator, which is given a state of the adapter's own there."""
        if self.mixed_batch is None or self.mixed_batch.alone is None:
            return self.mixed_batch is not None
        adapters = self.adapters_in_effect()
        return any(name in self.lora_magnitude_vector for name in adapters) or why_called(self, adapters) is not None

    def adapters_in_effect(self) -> list[str]:
        if self.mixed_batch is None or self.mixed_batch.alone is None:
            return super().adapters_in_effect()
        name = self.mixed_batch.alone
        return [name] if self.has_adapter(name) and not (self.disable_adapters or self.merged) else []

    def given_key(self, device: torch.device) -> Tensor | None:
        """For dropout of the one adapter of a mixed batch in training: its own, whatever others draw."""
        keys = None if self.mixed_batch is None else self.mixed_batch.keys(self)
        return None if keys is None else keys[0].to(device)

    def new_key(self, device: torch.device) -> Tensor:
        given = self.given_key(device)
        return ops.new_dropout_key(device) if given is None else given


class Call(NamedTuple):
    """What is the same for all forwards of a layer with one batch, as long as nothing is trained."""

    here: list[str]  # adapters of the batch that the layer has
    adapters: ops.Adapters
    weight: Tensor | QuantizedWeight | None  # None: the base layer is called
    biased: Sequence[str] = ()  # adapters whose B has a bias (lora_bias)


def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y [samples, ..., out_features] of lora.Linear, in x's dtype (autocast's where that is on)."""
    batch: MixedBatch = layer.mixed_batch
    call = _call_for(layer, batch, x)
    if call is ONE_BY_ONE:
        with invoked(layer):
            return one_by_one(layer, x, *args, **kwargs)
    if batch.beside(layer):
        with assigned([layer], None):
            y = layer.forward(x, *args, **kwargs)
        y = y + _part(layer, x, call, batch).to(y.dtype)
    else:
        y = compute(layer, x, call, batch, *args, **kwargs)
    return _with_biases(layer, batch, x, y, call.biased) if call.biased else y


def compute(layer: Any, x: Tensor, call: Call, batch: MixedBatch, *args: Any, **kwargs: Any) -> Tensor:
    """The base layer and the adapters' products, without biases of theirs."""
    here, adapters, weight, _ = call
    if weight is None or args or kwargs:
        y = layer.base_layer(x, *args, **kwargs)
        if not here:
            return y
        return y + _part(layer, x, call, batch).to(y.dtype)
    keys = _keys(layer, batch, x) if adapters.drops else None
    dtype = layer.own_dtype(x) if isinstance(weight, QuantizedWeight) else None
    y = ops.lora_linear_multi(
        x, weight, adapters, batch.segments(x), layer.bias, dropout_keys=keys, dtype=dtype, backend=layer.backend
    )  # fmt: skip
    return y if dtype is None else y.to(x.dtype)


def _part(layer: Any, x: Tensor, call: Call, batch: MixedBatch) -> Tensor:
    """The adapters' products alone."""
    keys = _keys(layer, batch, x) if call.adapters.drops else None
    return ops.lora_linear_multi(
        x, None, call.adapters, batch.segments(x), dropout_keys=keys, backend=layer.backend
    )  # fmt: skip


ONE_BY_ONE = object()  # instead of a Call


def _call_for(layer: Any, batch: MixedBatch, x: Tensor) -> Any:
    """The Call, or ONE_BY_ONE. Stacks of the adapters are kept from the batch's second forward on: most batches have
    one, and memory for what is kept costs more than stacking (a page fault for every 4 KB; 64 adapters of rank 16, 256
    wide, one thread of an EPYC: 0.5 ms a factor against 0.1)."""
    if torch.is_grad_enabled():
        return _call(layer, batch, x, constant=False)
    if layer not in batch.kept:
        batch.kept[layer] = None
        return _call(layer, batch, x, constant=False)
    if batch.kept[layer] is None:
        batch.kept[layer] = _call(layer, batch, x, constant=True)
    return batch.kept[layer]


def _call(layer: Any, batch: MixedBatch, x: Tensor, constant: bool) -> Any:
    here = [name for name in batch.adapters if layer.has_adapter(name)]
    magnitudes = layer.lora_magnitude_vector
    with_magnitudes = len(magnitudes) > 0 and any(name in magnitudes for name in here)
    if layer.disable_adapters or with_magnitudes or why_called(layer, here) is not None:
        return ONE_BY_ONE
    none = x.new_empty(0, layer.in_features), x.new_empty(layer.out_features, 0), 1.0, 0.0
    each = [_adapter(layer, name) if layer.has_adapter(name) else none for name in batch.adapters]
    A, B, scales, p = zip(*each) if each else ((), (), (), ())
    adapters = ops.Adapters(A, B, scales, p, constant=constant)
    return Call(here, adapters, layer.product_weight(), [name for name in here if layer.lora_bias[name]])


def _adapter(layer: Any, name: str) -> tuple[Tensor, Tensor, float, float]:
    """(A [R, K], B [N, R], scale, dropout)"""
    a, b = (factor._parameters["weight"] for factor in layer.factors(name))  # as in why_called, which has passed them
    return a, *folded(b, layer.scaling[name]), layer.dropout_p(name)


def _keys(layer: Any, batch: MixedBatch, x: Tensor) -> Tensor:
    """Those of the model's mixed training; without one, as where layers are used without a PeftModel, new ones."""
    keys = batch.keys(layer)
    return ops.new_dropout_key_table(x.device, len(batch.adapters)) if keys is None else keys.to(x.device)


def _with_biases(layer: Any, batch: MixedBatch, x: Tensor, y: Tensor, biased: Sequence[str]) -> Tensor:
    """y plus each row's scale * bias of B."""
    biases = {name: layer.get_delta_bias(name) for name in biased}
    none = torch.zeros(layer.out_features, dtype=torch.float32, device=y.device)
    table = torch.stack([*(biases.get(name, none) for name in batch.adapters), none])  # the last: of no adapter
    of_row = table[batch.rows(x)].to(y.dtype)
    while of_row.dim() < y.dim() and not batch.by_token:
        of_row = of_row[:, None]
    return y + (of_row.view(y.shape) if batch.by_token else of_row)
