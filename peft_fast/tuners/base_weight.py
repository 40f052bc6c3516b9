"""The weight of a linear layer, dense or k-bit: the one place that knows how each kind is read and written."""

import torch
from torch import Tensor, nn

from peft_fast.quant import bitsandbytes
from peft_fast.quant.blockwise import quantize
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.quantized_linear import QuantizedLinear


def quantized_weight(layer: nn.Module) -> QuantizedWeight | None:
    """The k-bit weight [N, K] of a layer, without a copy, or None for a layer that has none."""
    return layer.quantized_weight if isinstance(layer, QuantizedLinear) else bitsandbytes.read_linear(layer)


def base_weight(layer: nn.Module) -> Tensor | QuantizedWeight:
    quantized = quantized_weight(layer)
    return layer.weight if quantized is None else quantized  # type: ignore[return-value]


def storage(layer: nn.Module) -> nn.Parameter | None:
    """The parameter that the bytes of a k-bit layer are in, or None where they are in buffers."""
    return dict(layer.named_parameters(recurse=False)).get("weight")


def set_base_weight(layer: nn.Module, weight: Tensor) -> None:
    """Write `weight` [N, K] into the layer: rounded to its dtype, or quantised in the format that it has.

    Raises ValueError for inf and NaN where the layer is k-bit (its bytes cannot hold them), and then writes nothing.
    """
    old = quantized_weight(layer)
    if old is None:
        layer.weight.data.copy_(weight)  # type: ignore[operator, union-attr]
        return
    new = quantize(weight, old.quant_type, old.blocksize, double_quant=old.nested is not None, dtype=old.dtype)
    if isinstance(layer, QuantizedLinear):
        layer.set_quantized_weight(new)
    else:
        bitsandbytes.write_linear(layer, new)


def is_dense_linear(layer: nn.Module) -> bool:
    """A torch.nn.Linear that holds a plain floating-point matrix (not 8 bits, not a tensor subclass)."""
    if not isinstance(layer, nn.Linear) or bitsandbytes.is_linear4bit(layer) or bitsandbytes.is_linear8bit(layer):
        return False
    return type(layer.weight.data) is torch.Tensor and layer.weight.is_floating_point()


def matmul_weight(layer: nn.Module) -> Tensor | QuantizedWeight | None:
    """The layer's weight where multiplying by it may replace calling the layer, else None.

    None where a call does more: hooks, a forward put onto the instance (accelerate's offloading), a subclass with a
    forward of its own. Such a layer is called.
    """
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return None
    quantized = quantized_weight(layer)
    if quantized is not None:
        return quantized
    return layer.weight if type(layer).forward is nn.Linear.forward else None  # type: ignore[return-value]
