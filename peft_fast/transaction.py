"""All or nothing for changes to a model's structure."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CONTAINERS = (dict, list, set)


@contextmanager
def unchanged_on_error(model: nn.Module, config: Any = None) -> Iterator[None]:
    """Put `model` back as it was if the block raises: its modules, attributes, hooks, and what is trainable; and the
    attributes of `config`.

    Every module's attributes and containers are noted first (submodules, parameters, hooks, dicts of scalings, ...),
    but no values of tensors: check what you write into them before you write it.
    """
    notes = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    options = dict(vars(config)) if config is not None else {}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes, contents in notes:
            vars(module).clear()
            vars(module).update(attributes)
            _refill(attributes, contents)
        if config is not None:
            vars(config).update(options)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def _contents(module: nn.Module) -> dict[str, Any]:
    """Copies of the module's containers, but for the many empty ones."""
    return {name: value.copy() for name, value in vars(module).items() if isinstance(value, CONTAINERS) and value}


def _refill(attributes: dict[str, Any], contents: dict[str, Any]) -> None:
    """The containers themselves get their contents back: hooks and others hold references to the very same dict."""
    for name, value in attributes.items():
        if isinstance(value, CONTAINERS):
            value.clear()
            if name in contents:
                value.extend(contents[name]) if isinstance(value, list) else value.update(contents[name])
