"""All or nothing for changes to a model's structure, and for writing to its weights once the structure stands."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

CONTAINERS = (dict, list, set)

Write = tuple[Callable[[], None], Callable[[], None]]  # what to do, and what undoes it

_waiting: ContextVar[list[Write] | None] = ContextVar("writes that wait for the outermost block's end", default=None)


def at_end(write: Callable[[], None], undo: Callable[[], None]) -> None:
    """Call `write` when the outermost `unchanged_on_error` block that is open ends well, or at once without such a
    block. Should one of several writes fail, `undo` is called for those before it.

    For writing over weights: what can be wrong with the input has been found by then.
    """
    waiting = _waiting.get()
    if waiting is None:
        _do([(write, undo)])
    else:
        waiting.append((write, undo))


@contextmanager
def unchanged_on_error(model: nn.Module, config: Any = None) -> Iterator[None]:
    """Put `model` back as it was if the block raises: its modules, attributes, hooks, and what is trainable; and the
    attributes of `config`.

    Every module's attributes and containers are noted first (submodules, parameters, hooks, dicts of scalings, ...),
    but no values of tensors: check what you write into them before you write it, or write by `at_end`.
    """
    notes = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    options = dict(vars(config)) if config is not None else {}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with _collected():
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


@contextmanager
def _collected() -> Iterator[None]:
    """Writes of the block wait for the block around it, or for its own end if there is none."""
    outer, mine = _waiting.get(), list[Write]()
    token = _waiting.set(mine)
    try:
        yield
    finally:
        _waiting.reset(token)
    if outer is None:
        _do(mine)
    else:
        outer += mine


def _do(writes: list[Write]) -> None:
    done: list[Callable[[], None]] = []
    try:
        for write, undo in writes:
            write()
            done.append(undo)
    except BaseException:
        for undo in reversed(done):
            undo()
        raise


def _contents(module: nn.Module) -> dict[str, Any]:
    """Copies of the module's containers, but for the many empty ones."""
    held = {name: value for name, value in vars(module).items() if isinstance(value, CONTAINERS) and value}
    # Not a dict's own copy(): DeepSpeed's dicts of parameters have none that works.
    return {name: dict(value) if isinstance(value, dict) else value.copy() for name, value in held.items()}


def _refill(attributes: dict[str, Any], contents: dict[str, Any]) -> None:
    """The containers themselves get their contents back: hooks and others hold references to the very same dict."""
    for name, value in attributes.items():
        if isinstance(value, CONTAINERS):
            value.clear()
            if name in contents:
                value.extend(contents[name]) if isinstance(value, list) else value.update(contents[name])
