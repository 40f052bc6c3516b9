"""Reading bitsandbytes' layers: the only file of the library that names it.

bitsandbytes is never imported here: a model that holds one of its layers has imported it already. What is returned
are views of the layer's own tensors. The layout is weight.py's; the traps are (versions 0.49 to 0.50):

* `quant_storage`: the same bytes may lie in a bf16, fp16 or fp32 tensor (FSDP wants floats).
* FSDP and others turn `Params4bit` into a plain `Parameter`, and the state is then only at the module.
* On CPUs with avx512_bf16 the layer's own forward repacks its weight in eval mode (other nibble order, transposed
  scales rounded to bf16), and gradients through it are lost from then on.
"""

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .weight import NestedScales, QuantizedWeight


def _layer_type(name: str) -> type | None:
    bnb = sys.modules.get("bitsandbytes")
    return getattr(bnb.nn, name) if bnb else None


def is_linear4bit(module: nn.Module) -> bool:
    kind = _layer_type("Linear4bit")
    return kind is not None and isinstance(module, kind)


def is_linear8bit(module: nn.Module) -> bool:
    kind = _layer_type("Linear8bitLt")
    return kind is not None and isinstance(module, kind)


def read_linear(module: nn.Module) -> QuantizedWeight | None:
    """The weight of a `bitsandbytes.nn.Linear4bit` without a copy, or None for any other module.

    Raises ValueError while the layer is not quantised yet (bitsandbytes quantises when it is moved to a device).
    """
    if not is_linear4bit(module):
        return None
    state = _quant_state(module)
    if getattr(state, "packing_format_for_cpu", False):
        _unpack_for_cpu(module, state)
    nested = None
    if state.nested:
        inner = state.state2
        nested = NestedScales(inner.absmax, inner.code, state.offset, inner.blocksize)
    shape = (state.shape[0], state.shape[1])
    data = _as_bytes(_stored(module))
    return QuantizedWeight(
        data, state.absmax, state.code, shape, state.blocksize, state.quant_type, state.dtype, nested
    )


def write_linear(module: nn.Module, weight: QuantizedWeight) -> None:
    """Put `weight` into a Linear4bit in place of the one it holds; same shape, block size, type and nesting."""
    state = _quant_state(module)
    here = read_linear(module)
    if here is None or here.format != weight.format:
        raise ValueError(f"the layer holds {here.format if here else None}, got {weight.format}: they must be equal")
    _as_bytes(_stored(module)).copy_(weight.data)
    state.absmax.copy_(weight.absmax)
    if weight.nested:
        state.state2.absmax.copy_(weight.nested.absmax)
        state.offset.copy_(weight.nested.offset)


def _quant_state(module: nn.Module) -> Any:
    state = getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise ValueError(
            "a Linear4bit layer is not quantised yet: bitsandbytes quantises when the layer is moved to a device, "
            'so call model.to("cuda") (or "cpu") first'
        )
    return state


def _stored(module: nn.Module) -> Tensor:
    """The packed bytes, in whatever dtype bitsandbytes keeps them."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data


def _as_bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8).view(-1)


def _unpack_for_cpu(module: nn.Module, state: Any) -> None:
    """Undo bitsandbytes' CPU packing in the module itself, with plain scales.

    Packed: rows n in groups of 32; a byte holds rows i (low nibble) and i + 16 (high), runs of 32 bytes = 64 nibbles
    cover two columns of a group; scales lie transposed, [K / G, N], in bf16. The nibbles come back exactly. The
    scales keep the bf16 rounding that the packing gave them: a relative error of up to 2**-9.
    """
    warnings.warn(
        "bitsandbytes repacked this model's 4-bit weights when it was run in eval mode on the CPU, which rounds their "
        "scales to bf16; peft_fast goes on with the rounded ones. Add the adapter before the first evaluation, or "
        "reload the model, to have the exact ones.",
        stacklevel=2,
    )
    N, K = state.shape
    packed = _stored(module).view(torch.uint8).view(-1, 32)
    nibbles = torch.cat([packed & 0xF, packed >> 4], dim=1).view(N // 32, K // 2, 32, 2)
    flat = nibbles.transpose(1, 2).reshape(-1)
    data = (flat[0::2] << 4) | flat[1::2]
    storage = getattr(state, "original_storage_type", None) or torch.uint8
    module.weight.data = data.view(storage).view(-1, 1)  # type: ignore[union-attr]
    state.absmax = state.absmax.t().float().reshape(-1).contiguous()
    state.dtype = state.original_dtype
    state.packing_format_for_cpu = False
