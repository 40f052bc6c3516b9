"""All or nothing for changes to a model's structure."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put `model` back as it was if the block raises: its modules, attributes, hooks, and what is trainable.

    A first note of every module's containers is taken (submodules, parameters, hooks, dicts of scalings, ...), not of
    the values in tensors: check those before you write them. Costs about 10 us per module.
    """
    attributes = [(module, {name: _noted(value) for name, value in vars(module).items()}) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, noted in attributes:
            vars(module).clear()
            vars(module).update({name: _restored(*pair) for name, pair in noted.items()})
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def _noted(value: Any) -> tuple[Any, Any]:
    """The object itself and a copy of what it holds: hooks and others keep references to the very same dict."""
    return value, value.copy() if isinstance(value, (dict, list, set)) else None


def _restored(value: Any, content: Any) -> Any:
    if isinstance(value, list):
        value[:] = content
    elif content is not None:
        value.clear()
        value.update(content)
    return value
