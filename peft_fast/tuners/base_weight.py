"""The weight of a linear layer, dense or k-bit: the one place that knows how each kind is read and written."""

from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.quant import bitsandbytes
from peft_fast.quant.blockwise import quantize
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.quantized_linear import QuantizedLinear

HALF_DTYPES = (torch.float16, torch.bfloat16)


def quantized_weight(layer: nn.Module) -> QuantizedWeight | None:
    """The k-bit weight [N, K] of a layer, without a copy, or None for a layer that has none."""
    return layer.quantized_weight if isinstance(layer, QuantizedLinear) else bitsandbytes.read_linear(layer)


def base_weight(layer: nn.Module) -> Tensor | QuantizedWeight:
    quantized = quantized_weight(layer)
    return layer.weight if quantized is None else quantized  # type: ignore[return-value]


def storage(layer: nn.Module) -> nn.Parameter | None:
    """The parameter that the bytes of a k-bit layer are in, or None where they are in buffers."""
    return dict(layer.named_parameters(recurse=False)).get("weight")


def check_writable(layer: nn.Module) -> None:
    """Raise ValueError where the weight is computed from others before each use: what is written to it is lost."""
    if "weight" not in layer._parameters:
        raise ValueError(
            "the base layer's weight is no parameter but computed from others (weight_norm, parametrize): nothing can "
            "be merged into it. Remove the parametrisation first, or keep the adapter unmerged"
        )


def set_base_weight(layer: nn.Module, weight: Tensor) -> None:
    """Write `weight` [N, K] into the layer: rounded to its dtype, or quantised in the format that it has.

    Raises ValueError for inf and NaN where the layer is k-bit (its bytes cannot hold them), and then writes nothing.
    """
    check_writable(layer)
    old = quantized_weight(layer)
    if old is None:
        layer.weight.data.copy_(weight)  # type: ignore[operator, union-attr]
        return
    double_quant = old.nested is not None
    set_quantized_weight(layer, quantize(weight, old.quant_type, old.blocksize, double_quant, dtype=old.dtype))


def set_quantized_weight(layer: nn.Module, weight: QuantizedWeight) -> None:
    """Put a k-bit weight into a layer that holds one of the same format, byte for byte."""
    if isinstance(layer, QuantizedLinear):
        layer.set_quantized_weight(weight)
    else:
        bitsandbytes.write_linear(layer, weight)


def clone(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight.from_tensors([tensor.clone() for tensor in weight.tensors()], weight.format)


def repacks_itself(layer: nn.Module) -> bool:
    """Whether the layer's own forward, in eval mode, rewrites its weight so that no gradient passes it any more.

    bitsandbytes' Linear4bit does so on CPUs with bf16 instructions (quant/bitsandbytes.py).
    """
    if not bitsandbytes.is_linear4bit(layer) or not getattr(layer, "support_avx512bf16_for_cpu", False):
        return False
    return layer.weight.device.type == "cpu"  # type: ignore[union-attr, return-value]


def call_layer(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, hooks included, without the repacking: a layer in training mode does not do it."""
    if layer.training or not repacks_itself(layer):
        return layer(x, *args, **kwargs)
    quantized_weight(layer)  # what was repacked before we had the layer is unpacked by reading it
    layer.training = True
    try:
        return layer(x, *args, **kwargs)
    finally:
        layer.training = False


def is_bypassed(layer: nn.Module) -> bool:
    """torch.nn.MultiheadAttention uses its out_proj's weight without calling it: an adapter would never run."""
    return isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_dense_linear(layer: nn.Module) -> bool:
    """A torch.nn.Linear that is called and holds a plain floating-point matrix (not 8 bits, not a tensor subclass)."""
    if not isinstance(layer, nn.Linear) or is_bypassed(layer):
        return False
    if bitsandbytes.is_linear4bit(layer) or bitsandbytes.is_linear8bit(layer):
        return False
    return type(layer.weight.data) is torch.Tensor and layer.weight.is_floating_point()


def matmul_weight(layer: nn.Module) -> Tensor | QuantizedWeight | None:
    """The layer's weight where multiplying by it may replace calling the layer, else None.

    None where a call does more: hooks, a forward put onto the instance (accelerate's offloading), a subclass with a
    forward of its own. Such a layer is called.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks) or "forward" in vars(layer):
        return None
    quantized = quantized_weight(layer)
    if quantized is not None:
        return quantized
    return layer.weight if type(layer).forward is nn.Linear.forward else None  # type: ignore[return-value]
