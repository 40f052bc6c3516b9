"""Launches that cost the host little: what decides one is worked out once, and Triton is asked once.

A launcher's grid, tiles and numbers follow from sizes, strides and dtypes alone. Its function `_plan` makes a Plan of
them, behind `planned`, and the tensors come with each call. Triton's own way from a call to the driver looks at every
argument and makes a key of them all: 10.5 us for 32 of them, 20 us within a model, where little is in the cache. A Plan
knows what Triton compiled for it, and goes there directly (one thread of an EPYC, Triton 3.7).

So what Triton asks about in every call, a Plan asks about once: after a change of triton.knobs or of a kernel's hooks
(a profiler that instruments kernels) call `forget_plans`. Hooks of launches are called in every one.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
PLANS = 2048  # of each function: 512 batches of different M, with 4 shapes of layers. 1.7 KB each, so 3.5 MB at most
_planned: list[Any] = []


def planned(function: Function) -> Function:
    """Plans that `function` has made for the same arguments are kept."""
    cached: Any = functools.lru_cache(maxsize=PLANS)(function)
    _planned.append(cached)
    return cached


def forget_plans() -> None:
    """Triton is asked anew about every launch."""
    for function in _planned:
        function.cache_clear()


class Plan:
    """A kernel and all that a launch takes but its tensors, which are the first of the kernel's arguments."""

    __slots__ = ("_arguments", "_compiled", "constants", "grid", "kernel", "numbers")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], **constants: Any) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers  # the arguments between the tensors and the constants
        self.constants = constants  # and num_warps, num_stages, enable_fp_fusion
        self._compiled: dict[tuple, Any] = {}
        self._arguments: tuple = ()  # the values of `constants` that are arguments, in the kernel's order

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current GPU, which must be the tensors'. None is for tensors that this launch has none of."""
        address = 0
        key: list[torch.dtype | None] = []
        for tensor in tensors:
            if tensor is None:
                key.append(None)
            else:
                address |= tensor.data_ptr()
                key.append(tensor.dtype)
        if address % 16:  # Triton compiles anew for each of them that is not a multiple: it finds the right one
            self.by_triton(*tensors)
            return
        known = (tensors[0].device, *key)  # type: ignore[union-attr]
        compiled = self._compiled.get(known)
        if compiled is not None:
            compiled[self.grid](*tensors, *self.numbers, *self._arguments)
            return
        compiled = self.by_triton(*tensors)
        if hasattr(type(compiled), "__getitem__"):  # None in the interpreter, at first a future in AsyncCompileMode
            rest = self.kernel.params[len(tensors) + len(self.numbers) :]
            self._arguments = tuple([self.constants[parameter.name] for parameter in rest])
            self._compiled[known] = compiled

    def by_triton(self, *tensors: Tensor | None) -> Any:
        """Launch the way that Triton documents, which compiles what it has not compiled yet."""
        return self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
