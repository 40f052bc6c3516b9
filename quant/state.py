"""A QuantizedWeight as the named tensors that bitsandbytes writes into safetensors files, and back.

weight                                uint8 [ceil(N * K / 2), 1]
weight.absmax, weight.quant_map       scales (uint8 when nested) and codes
weight.nested_absmax, weight.nested_quant_map
weight.quant_state.bitsandbytes__nf4  the numbers, as JSON in a uint8 tensor
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .weight import NestedScales, QuantizedWeight

_STATE = "weight.quant_state.bitsandbytes__"


def to_state(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Tensors by name, the packed weight itself included. They share the weight's memory, except for the two tables,
    which all weights have in common: safetensors refuses to write tensors that share memory with others."""
    numbers = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    state = {"weight": weight.data.view(-1, 1), "weight.absmax": weight.absmax, "weight.quant_map": weight.code.clone()}
    if weight.nested:
        nested = weight.nested
        state |= {"weight.nested_absmax": nested.absmax, "weight.nested_quant_map": nested.code.clone()}
        numbers |= {
            "nested_blocksize": nested.blocksize,
            "nested_dtype": "float32",
            "nested_offset": 0.0 if nested.offset.is_meta else nested.offset.item(),  # there is no number on meta
        }
    text = json.dumps(numbers).encode()
    return state | {_STATE + weight.quant_type: torch.tensor(list(text), dtype=torch.uint8)}


def state_keys(state: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The keys below `prefix` that belong to one quantised weight."""
    return [k for k in state if k == prefix + "weight" or k.startswith(prefix + "weight.")]


def from_state(state: Mapping[str, Tensor], prefix: str = "") -> QuantizedWeight:
    """The inverse of `to_state`, on the same device. KeyError names what is missing, ValueError what is wrong."""
    packed = [k for k in state if k.startswith(prefix + _STATE)]
    if not packed:
        raise KeyError(prefix + _STATE + "nf4")
    numbers = json.loads(bytes(state[packed[0]].tolist()))
    data = state[prefix + "weight"]
    nested = None
    if "nested_offset" in numbers:
        offset = torch.tensor(numbers["nested_offset"], dtype=torch.float32, device=data.device)
        absmax, code = state[prefix + "weight.nested_absmax"], state[prefix + "weight.nested_quant_map"]
        nested = NestedScales(absmax, code, offset, numbers["nested_blocksize"])
    return QuantizedWeight(
        data.view(torch.uint8).view(-1),
        state[prefix + "weight.absmax"],
        state[prefix + "weight.quant_map"],
        (numbers["shape"][0], numbers["shape"][1]),
        numbers["blocksize"],
        numbers["quant_type"],
        getattr(torch, numbers["dtype"]),
        nested,
    ).check()
