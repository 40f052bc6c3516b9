"""Models whose input embedding and output layer share one weight: what adapters on one of them do to the other."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from .layer import BaseTunerLayer
from .matching import embedding_of

ENDS = ("get_input_embeddings", "get_output_embeddings")


def is_tied(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


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
            "first (tie_word_embeddings=False) where you want that",
            stacklevel=4,
        )


def warn_of_merging(model: Any) -> None:
    """Where merging into one of the two writes the other's weight too."""
    if is_tied(model) and any(isinstance(embedding_of(model, name), BaseTunerLayer) for name in ENDS):
        warnings.warn(
            "the output layer shares its weight with the input embedding: merging changes both. Untie them first",
            stacklevel=4,
        )
