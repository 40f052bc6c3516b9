"""The factors A and B of a model's LoRA adapters, by the names of their parameters."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MARKS = ((".lora_A.", ".lora_B."), (".lora_embedding_A.", ".lora_embedding_B."))


def name_of_a(name: str) -> str | None:
    """The name of the A that belongs to a B of this name; None for anything else, biases of B among it."""
    for a, b in MARKS:
        if b in name and not name.endswith(".bias"):
            return name.replace(b, a)
    return None


def pairs_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """{name of B: (A [R, ...], B [N, R, ...])} of all pairs whose ranks are the same: not of grouped convolutions, each
    of whose groups has a part of the ranks."""
    found = {name: (parameters.get(name_of_a(name) or ""), B) for name, B in parameters.items()}
    return {name: (A, B) for name, (A, B) in found.items() if A is not None and A.shape[0] == B.shape[1]}


def scale_of(model: nn.Module, name: str) -> float:
    """Of the adapter that the parameter of this name is of; 1 where its layer has none."""
    path, _, rest = name.rpartition(".lora_")
    scaling: Any = getattr(model.get_submodule(path), "scaling", {})
    return float(scaling.get(rest.split(".")[1], 1.0))


def damped_inverses(grams: Sequence[Tensor], damping: float) -> list[Tensor]:
    """(gram + damping I)^-1 of each [R, R], pseudo-inverses where these do not exist; those of one size together."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, gram in enumerate(grams):
        alike[len(gram), gram.dtype, gram.device].append(i)
    found: dict[int, Tensor] = {}
    for (size, dtype, device), members in alike.items():
        one = torch.eye(size, dtype=dtype, device=device)
        found |= zip(members, torch.linalg.pinv(torch.stack([grams[i] for i in members]) + damping * one))
    return [found[i] for i in range(len(grams))]


def wide(tensor: Tensor) -> Tensor:
    """[rows, columns] in fp32 or wider."""
    return tensor.detach().flatten(1).to(torch.promote_types(tensor.dtype, torch.float32))
