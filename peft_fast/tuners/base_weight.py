"""The weight of a linear layer, dense or k-bit: the one place that knows how each kind is read and written."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peft_fast.quant import bitsandbytes, blockwise, int8
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.quantized_linear import QuantizedLinear

HALF_DTYPES = (torch.float16, torch.bfloat16)


def quantized_weight(layer: nn.Module) -> QuantizedWeight | None:
    """The k-bit weight [N, K] of a layer, without a copy, or None for a layer that has none."""
    return layer.quantized_weight if isinstance(layer, QuantizedLinear) else bitsandbytes.read_linear(layer)


def base_weight(layer: nn.Module, name: str = "weight") -> Tensor | QuantizedWeight:
    """The layer's weight as it is stored: [N, K], but [K, N] in a Conv1D of transformers. `name`: of the parameter."""
    quantized = quantized_weight(layer)
    return getattr(layer, name) if quantized is None else quantized


def _conv1d() -> Any:
    """transformers' class, or None while it is not imported: then there is no such layer either."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer (of GPT-2 and its kin) whose weight lies [K, N]."""
    kind = _conv1d()
    return kind is not None and isinstance(layer, kind)


def linear_features(layer: Any) -> tuple[int, int]:
    """(K, N) of a linear layer. Raises ValueError where it says neither."""
    if is_conv1d(layer):
        return tuple(layer.weight.shape)
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        if all(hasattr(layer, name) for name in names):
            return getattr(layer, names[0]), getattr(layer, names[1])
    raise ValueError(f"a linear layer must have in_features and out_features, and a {type(layer).__name__} has not")


def storage(layer: nn.Module) -> nn.Parameter | None:
    """The parameter that the bytes of a k-bit layer are in, or None where they are in buffers."""
    return dict(layer.named_parameters(recurse=False)).get("weight")


def check_writable(layer: nn.Module, name: str = "weight") -> None:
    """Raise ValueError where the weight is computed from others before each use: what is written to it is lost."""
    if name not in layer._parameters:
        raise ValueError(
            "the base layer's weight is no parameter but computed from others (weight_norm, parametrize): nothing can "
            "be merged into it. Remove the parametrisation first, or keep the adapter unmerged"
        )


def set_base_weight(layer: nn.Module, weight: Tensor, name: str = "weight") -> None:
    """Write `weight`, in the layer's own layout, into it: rounded to its dtype, or quantised in the format that it has.

    Raises ValueError for inf and NaN where the layer is k-bit (its bytes cannot hold them), and then writes nothing.
    """
    check_writable(layer, name)
    old = quantized_weight(layer)
    if old is None:
        getattr(layer, name).data.copy_(weight)
        bitsandbytes.forget_codes(layer)
    else:
        set_quantized_weight(layer, _quantized_like(old, weight))


def _quantized_like(old: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    if old.bits == 8:
        return int8.quantize(weight, dtype=old.dtype)
    return blockwise.quantize(weight, old.quant_type, old.blocksize, old.nested is not None, dtype=old.dtype)


def can_hold(layer: nn.Module, weight: Tensor, name: str = "weight") -> bool:
    """Whether every value of `weight` is finite and stays so in the layer's dtype or format. Writes nothing."""
    old = quantized_weight(layer)
    if old is None:
        stored = weight.to(getattr(layer, name).dtype)
    else:
        stored = weight.half() if old.bits == 8 else weight  # 8-bit codes are taken from the weight in fp16
    return bool(stored.isfinite().all())


def set_quantized_weight(layer: nn.Module, weight: QuantizedWeight) -> None:
    """Put a k-bit weight into a layer that holds one of the same format, byte for byte."""
    if isinstance(layer, QuantizedLinear):
        layer.set_quantized_weight(weight)
    else:
        bitsandbytes.write_linear(layer, weight)


def clone(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight.from_tensors([tensor.clone() for tensor in weight.tensors()], weight.format)


def is_bypassed(layer: nn.Module) -> bool:
    """torch.nn.MultiheadAttention uses its out_proj's weight without calling it: an adapter would never run."""
    return isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_dense_linear(layer: nn.Module) -> bool:
    """A torch.nn.Linear, or a Conv1D of transformers, that is called and holds a plain floating-point matrix (not k
    bits, not a tensor subclass).

    bitsandbytes' Linear8bitLt with `has_fp16_weights` is one.
    """
    if not (isinstance(layer, nn.Linear) or is_conv1d(layer)) or is_bypassed(layer):
        return False
    if bitsandbytes.is_kbit(layer):
        return False
    weight: Any = layer.weight
    return type(weight.data) in (Tensor, FakeTensor) and weight.is_floating_point()


def is_touched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    own = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    return "forward" in own


def matmul_weight(layer: nn.Module) -> Tensor | QuantizedWeight | None:
    """The layer's weight [N, K] where multiplying by it may replace calling the layer, else None. Of transformers'
    Conv1D it is a transposed view: cuBLAS reads either layout, and no copy is made.

    None where a call does more: hooks, a forward put onto the instance (accelerate's offloading), a subclass with a
    forward of its own. Such a layer is called.
    """
    if is_touched(layer):
        return None
    if type(layer) is nn.Linear:  # most layers: a quarter of the time of asking whether it is another one
        return layer.weight
    quantized = quantized_weight(layer)
    if quantized is not None:
        return quantized
    if type(layer).forward is nn.Linear.forward:
        return layer.weight  # type: ignore[return-value]
    if is_conv1d(layer) and type(layer).forward is _conv1d().forward:
        return layer.weight.t()  # type: ignore[operator, union-attr]
    return None


def why_not_embedding(layer: Any) -> str | None:
    """Why the adapter of an embedding could not follow what the layer does, or None."""
    if type(layer.weight.data) is not Tensor or not layer.weight.is_floating_point():
        return f"its table is a {type(layer.weight.data).__name__} of {layer.weight.dtype}"
    if type(layer).forward is nn.Embedding.forward:
        return None
    factor = getattr(layer, "embed_scale", None)
    if factor is None:
        return "it has a forward of its own, and need not look up the ids that it is called with"
    if isinstance(factor, Tensor) and factor.numel() != 1:
        return f"its embed_scale must be one number, got {tuple(factor.shape)}"
    return None
