"""Names of adapters, as callers give them."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn


def without_compiling(model: Any) -> Any:
    """The model inside of what torch.compile made of it; not of what it made of a part of the model."""
    return vars(model).get("_modules", {}).get("_orig_mod", model)


def list_of_names(argument: str, names: Sequence[str]) -> Sequence[str]:
    """`names`, or TypeError for a string: its letters would be taken for names."""
    if isinstance(names, str):
        raise TypeError(f"{argument} must be a list of names, got the string {names!r}")
    return names


def check_adapter_name(name: str, taken: Iterable[str]) -> None:
    """Raise ValueError for a name that cannot be part of a parameter's name and of a folder's, or that is taken."""
    if not isinstance(name, str) or not name or any(character in name for character in "./\\"):
        raise ValueError(f"an adapter's name must be a string without '.', '/' and '\\', got {name!r}")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"an adapter cannot be called {name!r}: torch.nn.ModuleDict has an attribute of that name")
    if name in taken:
        raise ValueError(f"adapter {name!r} exists already: choose another name, or delete it first")
