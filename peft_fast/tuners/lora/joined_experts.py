"""Adapters that were trained on each expert's layers, in transformers 4, as adapters of the parameters that they are in
today: see moe.py.

Of gate and up, joined, A is one above the other and B block-diagonal: twice the rank, and the same change.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

OF_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,6})\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.lora_([AB])\.weight")
IN_ORDER = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


def joined_experts(tensors: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`tensors` of an adapter with those of single experts joined, under the keys that they have today.

    names: {key: what transformers calls it today}, of keys that are called otherwise
    Raises ValueError where experts are missing, or are of several ranks.
    """
    parts: dict[str, dict[str, dict[str, dict[int, Tensor]]]] = {}  # module, parameter's layer, "A" or "B", expert
    others: dict[str, Any] = {}
    for key, value in tensors.items():
        match = OF_EXPERT.fullmatch(names.get(key, key))
        if match is None or not isinstance(value, Tensor):
            others[key] = value
            continue
        module, expert, layer, factor = match.groups()
        parts.setdefault(module, {}).setdefault(layer, {}).setdefault(factor, {})[int(expert)] = value
    for module, layers in parts.items():
        both = any(set(order) & layers.keys() for order in IN_ORDER["gate_up_proj"])
        both = both and any(set(order) & layers.keys() for order in IN_ORDER["down_proj"])
        for parameter, orders in IN_ORDER.items():
            order = next((order for order in orders if set(order) & layers.keys()), None)
            if order is not None:
                inner = ".base_layer" if both and parameter == "gate_up_proj" else ""
                A, B = _join([layers.get(layer, {}) for layer in order], f"{module}: {' and '.join(order)}")
                others |= {f"{module}{inner}.lora_A.weight": A, f"{module}{inner}.lora_B.weight": B}
    return others


def _join(layers: list[dict[str, dict[int, Tensor]]], what: str) -> tuple[Tensor, Tensor]:
    """(A [rank * experts, in], B [out, rank * experts]) as ParamWrapper has them."""
    experts = {tuple(sorted(layer.get(factor, {}))) for layer in layers for factor in "AB"}
    ids = experts.pop()
    shapes = {layer[factor][i].shape for layer in layers for factor in "AB" for i in ids} if not experts else set()
    if experts or ids != tuple(range(len(ids))) or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"the adapter has to have A and B for every expert, as matrices, and has not: {what}")
    try:
        A = torch.stack([torch.cat([layer["A"][i] for layer in layers]) for i in ids])  # [experts, rank, in]
        B = torch.stack([torch.block_diag(*(layer["B"][i] for layer in layers)) for i in ids])  # [experts, out, rank]
    except RuntimeError as error:
        raise ValueError(f"the adapters of single experts have to be of one shape: {what}: {error}") from error
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
