"""layer_replication: a model with some of its layers several times, in the same weights, each with adapters of its own
(SOLAR's depth up-scaling, arXiv 2312.15166, without the memory)."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_fast.quantized_linear import QuantizedLinear

PLACES = (("layers",), ("encoder", "layer"), ("h",))  # of Llama and its kin, BERT, Falcon and GPT-2


@dataclass
class Replication:
    """What was replaced, to be put back."""

    ranges: list[list[int]]
    parent: Any
    name: str
    layers: nn.ModuleList
    config: Any
    options: dict[str, Any]  # of the model's config, as they were

    def undo(self) -> None:
        setattr(self.parent, self.name, self.layers)
        for name, value in self.options.items():
            setattr(self.config, name, value)


def replicate_layers(model: nn.Module, layer_map: Any) -> Replication:
    """Replace the model's list of layers: [[0, 4], [2, 5]] makes of five layers 0, 1, 2, 3, 2, 3, 4.

    Raises ValueError, with the model as it was, for a model without such a list and for ranges beyond it.
    """
    parent, name = _place(model)
    layers = getattr(parent, name)
    for start, end in layer_map:
        if end > len(layers):
            raise ValueError(
                f"layer_replication [{start}, {end}] goes beyond the {len(layers)} layers of {type(model).__name__}"
            )
    order = [index for start, end in layer_map for index in range(start, end)]
    config: Any = getattr(parent, "config", None)
    options: dict[str, Any] = {}
    if hasattr(config, "num_hidden_layers"):
        options["num_hidden_layers"] = config.num_hidden_layers
    types: Any = getattr(config, "layer_types", None)
    if isinstance(types, list) and len(types) == len(layers):
        options["layer_types"] = types
    done = Replication([list(one) for one in layer_map], parent, name, layers, config, options)
    setattr(parent, name, nn.ModuleList(_twin(layers[index], place) for place, index in enumerate(order)))
    if "num_hidden_layers" in options:
        config.num_hidden_layers = len(order)
    if "layer_types" in options:
        config.layer_types = [types[index] for index in order]
    return done


def _place(model: Any) -> tuple[Any, str]:
    inner = model
    while hasattr(inner, "model"):
        inner = inner.model
    inner = getattr(inner, "bert", getattr(inner, "transformer", inner))
    for *outer, name in PLACES:
        parent = inner
        for attribute in outer:
            parent = getattr(parent, attribute, None)
        if isinstance(getattr(parent, name, None), nn.ModuleList):
            return parent, name
    places = ", ".join(".".join(place) for place in PLACES)
    raise ValueError(
        f"layer_replication needs a model with its layers in a ModuleList called {places}, and {type(model).__name__} "
        "has none"
    )


def _twin(layer: nn.Module, index: int) -> nn.Module:
    """A copy of the layer in the layer's own weights."""
    shared = [*layer.parameters(), *layer.buffers()]
    for module in layer.modules():
        shared += module._scales if isinstance(module, QuantizedLinear) else []
    twin = copy.deepcopy(layer, {id(tensor): tensor for tensor in shared})
    for module in twin.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]
    return twin
