"""A QuantizedWeight as the named tensors that bitsandbytes writes into safetensors files, and back.

4 bits:
weight                                uint8 [ceil(N * K / 2), 1]
weight.absmax, weight.quant_map       scales (uint8 when nested) and codes
weight.nested_absmax, weight.nested_quant_map
weight.quant_state.bitsandbytes__nf4  the numbers, as JSON in a uint8 tensor

8 bits:
weight                                int8 [N, K]
SCB                                   float32 [N], the scales
weight_format                         uint8 [], 0: row by row, the only layout since bitsandbytes 0.45
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .weight import INT8, NestedScales, QuantizedWeight

_STATE = "weight.quant_state.bitsandbytes__"
_ROWS = 0  # the only `weight_format`


def to_state(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Tensors by name, the packed weight itself included. They share the weight's memory, except for the two tables,
    which all weights have in common: safetensors refuses to write tensors that share memory with others."""
    if weight.code is None:
        rows = torch.tensor(_ROWS, dtype=torch.uint8)
        return {"weight": weight.data.view(weight.shape), "SCB": weight.absmax, "weight_format": rows}
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
    names = {prefix + name for name in ("weight", "SCB", "weight_format")}
    return [k for k in state if k in names or k.startswith(prefix + "weight.")]


def from_state(
    state: Mapping[str, Tensor], prefix: str = "", int8_dtype: torch.dtype = torch.float16
) -> QuantizedWeight:
    """The inverse of `to_state`, on the same device. KeyError names what is missing, ValueError what is wrong.

    `int8_dtype`: what an 8-bit weight dequantises to. Its tensors do not say; fp16 is what it was rounded to.
    """
    if prefix + "weight" in state and state[prefix + "weight"].dtype == torch.int8:
        return _from_8bit_state(state, prefix, int8_dtype)
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


def _from_8bit_state(state: Mapping[str, Tensor], prefix: str, dtype: torch.dtype) -> QuantizedWeight:
    codes, layout = state[prefix + "weight"], state.get(prefix + "weight_format")
    if codes.dim() != 2:
        raise ValueError(f"an int8 weight must be [N, K], got {tuple(codes.shape)}")
    if layout is not None and not layout.is_meta and layout.item() != _ROWS:
        raise ValueError(
            f"weight_format must be {_ROWS}, got {layout.item()}, a tiled layout of bitsandbytes before 0.45: save the "
            "model anew with a later version"
        )
    N, K = codes.shape
    return QuantizedWeight(codes.reshape(-1), state[prefix + "SCB"], None, (N, K), K, INT8, dtype).check()
