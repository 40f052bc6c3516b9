"""What is trained beside a method's layers: whole modules (modules_to_save), single tokens' rows, and biases."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from .modules_to_save import check_trainable, find_modules_to_save, is_inside_named, wrap_to_save
from .tied import Ties, embedding_path
from .trainable_tokens.wrapper import plan_tokens, wrap_tokens


class Auxiliary:
    """A plan for one adapter, made before anything is changed.

    config  the adapter's, as `ties` says that it has to be
    saved   the paths of the modules that are trained whole
    Raises ValueError where the config asks for what cannot be done.
    """

    def __init__(self, model: nn.Module, config: Any, ties: Ties) -> None:
        self.model = model
        self.ties = ties
        self.config = copy.copy(config)
        self.config.modules_to_save = ties.modules_to_save
        names = ties.modules_to_save or []
        self.saved = [p for p in find_modules_to_save(model, names) if p not in ties.saved] if names else []
        for path in ties.saved:
            check_trainable(path, model.get_submodule(path))
        self.tokens = plan_tokens(model, config, [*names, *ties.saved])

    def in_order(self, paths: list[str]) -> list[str]:
        """`paths`, those tied to another last, without those of modules that are trained whole as they are tied."""
        first = [path for path in paths if path not in self.ties.targets]
        return [path for path in [*first, *self.ties.targets] if not is_inside_named(path, self.ties.saved)]

    def wrap(self, adapter_name: str) -> None:
        source, copies = embedding_path(self.model), {}
        for path in self.saved:
            copies[path] = wrap_to_save(self.model, path, adapter_name).modules_to_save[adapter_name]
        for path in self.ties.saved:
            wrap_to_save(self.model, path, adapter_name, copies[str(source)])
        wrap_tokens(self.model, self.tokens, adapter_name)


def check_biases(config: Any, others: Mapping[str, Any]) -> None:
    """Raise ValueError where an adapter of `others` trains the base model's biases, and `config` would too."""
    trained = [name for name, other in others.items() if getattr(other, "bias", "none") != "none"]
    if trained and getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"adapter {trained[0]!r} trains biases of the base model already, and they exist once: use bias='none'"
        )


def bias_keys(tuner: Any, config: Any) -> list[str]:
    """The names of the base model's biases that an adapter with this config trains, and so saves."""
    bias = getattr(config, "bias", "none")
    if bias == "none":
        return []
    names = [name for name, _ in tuner.model.named_parameters() if name.rpartition(".")[2] == "bias"]
    inside = tuple(f"{path}.{attribute}." for path, h in tuner.holders() for attribute in h.adapter_layer_names)
    names = [name for name in names if not name.startswith(inside)]
    if bias == "all":
        return names
    adapted = {f"{path}.base_layer.bias" for path, _ in tuner.layers()}
    return [name for name in names if name in adapted]
