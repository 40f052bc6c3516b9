"""The config option trainable_token_indices: rows of embeddings that are trained beside another method's adapters."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.modules_to_save import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, is_inside_named
from peft_fast.tuners.tied import embedding_path, is_tied, tied_paths

from .layer import TrainableTokensLayer


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Stands in the place of an embedding, or of an output layer; `token_adapter` around it does the work.

    Attributes that it lacks are the layer's; `weight` has the active adapters' rows in it.
    """

    def __init__(self, token_adapter: TrainableTokensLayer) -> None:
        super().__init__()
        self.token_adapter = token_adapter

    @property
    def original_module(self) -> nn.Module:
        return self.token_adapter.base_layer

    @property
    def weight(self) -> Any:
        return self.token_adapter.weight_in_effect()

    @property
    def _adapters(self) -> set[str]:
        return set(self.token_adapter.trainable_tokens_delta)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "token_adapter" not in self._modules:  # being unpickled or copied
                raise
            return getattr(self.token_adapter.base_layer, name)


@dataclass(frozen=True)
class TokenPlan:
    """Where rows of tokens will be trained, looked at before anything is changed."""

    rows: Mapping[str, list[int]] = field(default_factory=dict)  # tokens by the layer's path
    source: str = ""  # the embedding whose rows the layers at `tied` share
    tied: tuple[str, ...] = ()


def plan_tokens(model: nn.Module, config: Any, saved: Collection[str]) -> TokenPlan:
    """What config.trainable_token_indices means in `model`. `saved`: the names in modules_to_save.

    Raises ValueError for layers that are not there, that are trained whole, or that are tied and may not be.
    """
    wanted = getattr(config, "trainable_token_indices", None)
    if wanted is None:
        return TokenPlan()
    source = embedding_path(model)
    if not isinstance(wanted, dict):
        wanted = {source or "embed_tokens": wanted}
    found = {name: _paths(model, name) for name in wanted}
    for name, paths in found.items():
        if any(is_inside_named(path, saved) for path in paths):
            raise ValueError(
                f"{name} is in modules_to_save, which trains it whole, and in trainable_token_indices: leave out one"
            )
    tied = tied_paths(model) if is_tied(model) else []
    same = [name for name, paths in found.items() if source in paths or set(paths) & set(tied)]
    alike = all(wanted[name] == wanted[same[0]] for name in same)
    if not alike and config.ensure_weight_tying:
        raise ValueError(
            f"ensure_weight_tying needs the same tokens for {' and '.join(same)}, which share one weight, got "
            f"{', '.join(f'{name}: {wanted[name]}' for name in same)}: give them the same, or leave the option out"
        )
    through_source = source is not None and alike and any(source in found[name] for name in same)
    follow = [path for path in tied if not is_inside_named(path, saved)] if through_source else []
    rows = {path: wanted[name] for name, paths in found.items() for path in paths if path not in follow}
    return TokenPlan(rows, source or "", tuple(follow))


def _paths(model: nn.Module, name: str) -> list[str]:
    """The layers that `name` means: by the letters at the end of their paths, as in peft."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path and path.endswith(name)]
    if not paths:
        raise ValueError(
            f"trainable_token_indices: Target modules {name!r} not found in the base model: name an embedding, such as "
            f"{embedding_path(model) or 'embed_tokens'!r}"
        )
    return paths


def wrap_tokens(model: nn.Module, plan: TokenPlan, adapter_name: str) -> None:
    """Put the adapter's rows into `model`. Raises ValueError for layers and tokens that this is not for."""
    for path, tokens in plan.rows.items():
        _wrap(model, path, adapter_name, tokens, None)
    if plan.tied:
        source: Any = model.get_submodule(plan.source)
        for path in plan.tied:
            while isinstance(model.get_submodule(path), BaseTunerLayer):  # the method has adapted it: within that
                path += ".base_layer"
            _wrap(model, path, adapter_name, [], source.token_adapter)


def _wrap(
    model: nn.Module, path: str, adapter_name: str, tokens: list[int], tied_adapter: TrainableTokensLayer | None
) -> None:
    module = model.get_submodule(path)
    if isinstance(module, TrainableTokensWrapper):
        if module.token_adapter.tied_adapter is not tied_adapter:
            raise ValueError(
                f"{path} has tokens of another adapter already, and is tied to the embedding in only one of the two: "
                "the adapters of a model have to agree on that"
            )
        return module.token_adapter.update_layer(adapter_name, tokens)
    if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
        raise ValueError(
            f"trainable_token_indices cannot be applied to {path}, which has an adapter or trained copies of its own: "
            "leave it out of target_modules and modules_to_save, or out of trainable_token_indices"
        )
    layer = TrainableTokensLayer(module, adapter_name, token_indices=tokens, tied_adapter=tied_adapter)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, TrainableTokensWrapper(layer))
    return None
