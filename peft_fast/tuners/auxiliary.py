"""What is trained beside a method's layers: whole modules (modules_to_save) and single tokens' rows."""

import copy
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
        self.tied_to_saved = ties.saved
        self.config = copy.copy(config)
        self.config.modules_to_save = ties.modules_to_save
        names = ties.modules_to_save or []
        self.saved = [p for p in find_modules_to_save(model, names) if p not in ties.saved] if names else []
        for path in ties.saved:
            check_trainable(path, model.get_submodule(path))
        self.tokens = plan_tokens(model, config, [*names, *ties.saved])

    def without_saved(self, paths: list[str]) -> list[str]:
        """`paths` less those of modules that are trained whole because they are tied to such a one."""
        return [path for path in paths if not (self.tied_to_saved and is_inside_named(path, self.tied_to_saved))]

    def wrap(self, adapter_name: str) -> None:
        source, copies = embedding_path(self.model), {}
        for path in self.saved:
            copies[path] = wrap_to_save(self.model, path, adapter_name).modules_to_save[adapter_name]
        for path in self.tied_to_saved:
            wrap_to_save(self.model, path, adapter_name, copies[str(source)])
        wrap_tokens(self.model, self.tokens, adapter_name)
