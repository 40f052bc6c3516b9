"""Adapters whose modules have to be called, one after the other, as peft calls them:

    y = base(x) + scale * B(A(dropout(x)))

Ops read the weights of A and B and call neither. Where calling does more than that, they cannot stand for it: hooks
(FSDP gathers a module's weights in one; weight_norm and pruning compute them), a module of another class in the place
of a factor or of the dropout, weights that are sharded.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peft_fast.quant.weight import QuantizedWeight
from peft_fast.sharded import is_plain
from peft_fast.tuners.base_weight import is_touched


def why_called(layer: Any, adapters: Sequence[str]) -> str | None:
    """Why the modules of these adapters of a linear layer must be called, or None."""
    dropouts = layer._modules["lora_dropout"]._modules
    for name in adapters:
        for factor in layer.factors(name):
            if type(factor) is not nn.Linear:
                return f"a factor of {name!r} is a {type(factor).__name__}"
            if is_touched(factor):
                return f"a factor of {name!r} has hooks or a forward of its own"
            weight = factor._parameters.get("weight")  # a quarter of the time of factor.weight
            if not is_plain(weight):
                return f"a factor of {name!r} is a {type(weight).__name__}"
        dropout = dropouts[name]
        if type(dropout) not in (nn.Identity, nn.Dropout) or is_touched(dropout):
            return f"the dropout of {name!r} is not torch's own, or has hooks"
    return None


def call(
    layer: Any,
    x: Tensor,
    adapters: Sequence[str],
    weight: Tensor | QuantizedWeight | None,
    dtype: Any,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """y for x [..., in_features]; `weight`: see Linear.base; `dtype`: in which a k-bit base computes, None for x's."""
    y = layer.base(x if dtype is None else x.to(dtype), weight, *args, **kwargs)
    for name in adapters:
        A, B = layer.factors(name)
        y = y + (B(A(layer.dropped(name, x))) * layer.scaling[name]).to(y.dtype)
    return y if dtype is None else y.to(x.dtype)
