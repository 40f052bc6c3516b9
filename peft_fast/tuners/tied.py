"""Models whose input embedding and output layer share one weight: what adapters on one of them do to the other, and the
config option ensure_weight_tying, which has them share their adapters too."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .layer import BaseTunerLayer
from .matching import embedding_of

ENDS = ("get_input_embeddings", "get_output_embeddings")
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]  # what peft takes for embeddings, by the ends of paths


def is_tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def embedding_path(model: nn.Module) -> str | None:
    """The path of what transformers calls the input embedding."""
    embedding = embedding_of(model, ENDS[0])
    return next((path for path, module in model.named_modules() if module is embedding and path), None)


def tied_paths(model: nn.Module) -> list[str]:
    """The paths of the layers that share the weight of the input embedding; of a wrapped one, the wrapper's."""
    source = embedding_path(model)
    if source is None:
        return []
    weight = _innermost(model.get_submodule(source)).weight
    found = [
        _outermost(path)
        for path, module in model.named_modules(remove_duplicate=False)
        if any(parameter is weight for parameter in module._parameters.values())
    ]
    head = embedding_of(model, ENDS[1])
    if head is not None and not any(model.get_submodule(path) is head for path in found):
        # Offloaded, say, with placeholders of their own: by transformers' rule the two share a weight all the same.
        found += [path for path, module in model.named_modules() if module is head]
    return [path for path in dict.fromkeys(found) if path != source]


def _outermost(path: str) -> str:
    inside = (".token_adapter", ".base_layer", ".original_module")
    while path.endswith(inside):
        path = path.rpartition(".")[0]
    return path


def _innermost(module: Any) -> Any:
    for attribute in ("base_layer", "original_module", "token_adapter"):
        inner = module._modules.get(attribute)
        if inner is not None:
            return _innermost(inner)
    return module


@dataclass(frozen=True)
class Ties:
    """What ensure_weight_tying makes of a config."""

    target_modules: set[str] | str
    modules_to_save: list[str] | None
    targets: tuple[str, ...] = ()  # layers whose adapters follow the embedding's
    saved: tuple[str, ...] = ()  # layers whose trained copies share the weight of the embedding's


def plan_ties(model: nn.Module, config: Any, targets: set[str] | str) -> Ties:
    """`targets`: config.target_modules as it is resolved for this model. Warns where there is nothing to tie."""
    saved = getattr(config, "modules_to_save", None)
    plain = Ties(targets, saved)
    if not getattr(config, "ensure_weight_tying", False):
        return plain
    tied, source = tied_paths(model) if is_tied(model) else [], embedding_path(model)
    if not tied or source is None:
        warnings.warn("ensure_weight_tying=True, and no modules of the model are tied: it has no effect", stacklevel=4)
        return plain
    if any(_ends_as_embedding(name) for name in saved or ()):
        return Ties(targets, _by_embedding([*(saved or ()), source], tied), saved=tuple(tied))
    if _targets_embedding(config.target_modules):
        if isinstance(targets, str):
            return Ties(rf"(?:{targets}|^{re.escape(source)}$)", saved, targets=tuple(tied))
        return Ties(set(_by_embedding([*targets, source], tied)), saved, targets=tuple(tied))
    if getattr(config, "trainable_token_indices", None) is None:
        warnings.warn(
            "ensure_weight_tying=True, and none of the tied modules, which peft tells by the names embed_tokens and "
            "lm_head, is in modules_to_save, target_modules or trainable_token_indices: it has no effect",
            stacklevel=4,
        )
    return plain


def _by_embedding(names: Sequence[str], tied: Sequence[str]) -> list[str]:
    """`names` less those of the tied layers, as peft leaves its config. But where nothing is left that peft knows an
    embedding by (GPT-2's wte), it would not tie when it loads such an adapter, and lose half of it: then they stay."""
    left = [name for name in dict.fromkeys(names) if not _means(name, tied)]
    return left if any(map(_ends_as_embedding, left)) else list(dict.fromkeys(names))


def _targets_embedding(targets: Any) -> bool:
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in EMBEDDING_LAYER_NAMES)
    return any(_ends_as_embedding(name) for name in targets or ())


def _ends_as_embedding(name: str) -> bool:
    return name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES


def _means(name: str, paths: Sequence[str]) -> bool:
    return any(f".{name}." in f".{path}." for path in paths)


def warn_of_adapting(model: Any, paths: Sequence[str]) -> None:
    """Where the adapter of the layers at `paths` changes one of the two alone."""
    if not is_tied(model):
        return
    ends = [embedding_of(model, name) for name in ENDS]
    tied = [path for path in paths if any(model.get_submodule(path) is end for end in ends)]
    if tied:
        warnings.warn(
            f"the model has tie_word_embeddings=True, and the adapter changes {tied} alone: the two that shared one "
            "weight come apart, so that merging, or a format with one weight for both, changes outputs. Untie them "
            "first (tie_word_embeddings=False) where you want that, or have their adapters tied (ensure_weight_tying)",
            stacklevel=4,
        )


def warn_of_merging(model: Any) -> None:
    """Where merging into one of the two writes the other's weight too, and the other's adapter does not want that."""
    if not is_tied(model):
        return
    layers = [layer for name in ENDS if isinstance(layer := embedding_of(model, name), BaseTunerLayer)]
    together = any(
        names and all(map(layer.follows, names)) for layer in layers if (names := layer.available_adapters())
    )
    if layers and not together:
        warnings.warn(
            "the output layer shares its weight with the input embedding: merging changes both. Untie them first",
            stacklevel=4,
        )


def note_untied(model: Any) -> None:
    """After adapters were merged: where the two have come apart, the model's config has to say so."""
    if not is_tied(model):
        return
    ends: list[Any] = [embedding_of(model, name) for name in ENDS]
    weights: list[Any] = [getattr(end, "weight", None) for end in ends]
    if all(weight is not None for weight in weights) and weights[0].data_ptr() != weights[1].data_ptr():
        model.config.tie_word_embeddings = False
        warnings.warn(
            "input embedding and output layer no longer share a weight: tie_word_embeddings is set to False in the "
            "model's config",
            stacklevel=4,
        )
