"""The torch.library of peft_fast: one place that registers ops, and what every op has in common.

An op is opaque to torch.compile: which implementation runs is decided inside it, so graphs neither branch on sizes nor
break. Ops are called from autograd.Functions (linear.py, lora.py), which costs half of what a registered autograd
formula does (13.6 us against 25.1 for a forward that tracks gradients, torch 2.13). They are private: called directly,
a torch implementation would track gradients and a Triton one silently would not.

Where nobody looks at ops (no compiler, mode or profiler), the implementation is called without torch's dispatcher, and
without gradients without the autograd.Function: a small layer's forward takes 48 us and not 69, with gradients to come
62 and not 75 (one thread of an EPYC).
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler

from peft_fast.dispatch import Backend, Choice, Route, checked, checked_route, current_backend, current_route
from peft_fast.kernels import reference
from peft_fast.quant.weight import Format, QuantizedWeight

LIBRARY = torch.library.Library("peft_fast", "DEF")
VALUES = (Tensor, nn.Parameter)
IMPLEMENTATIONS: dict[str, Callable] = {}  # by op name: for who wants to look inside an op (bench/counts.py)


def define(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated implementation as the op of this schema; return what calls the op, or the implementation
    itself where nobody would see the op.

    `fake` computes output shapes and dtypes without data. The implementation runs with autocast off: the caller has
    cast already, and what it allocates must have the dtypes that `fake` promised. It runs on its tensors' own GPU,
    where a model is spread over several: Triton launches on the current one.
    """
    name = schema.partition("(")[0]

    def register(implementation: Callable) -> Callable:
        @functools.wraps(implementation)
        def run(*args):
            device = args[0].device if isinstance(args[0], Tensor) else args[0][0].device
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    return run(*args)
            if not autocasting(device.type):
                return implementation(*args)
            torch.set_autocast_enabled(device.type, False)  # entering torch.autocast takes 4 us
            try:
                return implementation(*args)
            finally:
                torch.set_autocast_enabled(device.type, True)

        IMPLEMENTATIONS[name] = run
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"peft_fast::{name}", fake, lib=LIBRARY)
        op = getattr(torch.ops.peft_fast, name).default

        @functools.wraps(implementation)
        def call(*args):
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            return run(*args) if is_unseen(first) else op(*args)

        return call

    return register


def is_unseen(x: Tensor) -> bool:
    """Whether an op that is called now would only be a detour to its implementation: nothing compiles, traces, records
    or rewrites ops, and x is a tensor with values."""
    return (
        type(x) in VALUES
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not profiler._is_profiler_enabled
    )


class _Nothing:
    """In the place of an autograd.Function's ctx where there are no gradients."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), and where nothing is to be differentiated its forward alone (11 us less)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_Nothing(), *args)


def implementation(choice: Choice) -> ModuleType:
    """The module that holds the functions of the chosen backend; Triton is imported when it is first chosen."""
    if choice.backend == "torch":
        return reference
    from peft_fast.kernels import triton_ops

    return triton_ops


def resolve(backend: str | None) -> Backend:
    """A layer's or caller's own backend where there is one, else the process's."""
    return current_backend() if backend is None else checked(backend, "backend")


def resolve_route(route: str | None) -> Route:
    return current_route() if route is None else checked_route(route, "route")


def product_dtype(x: Tensor) -> torch.dtype:
    """In which dtype to multiply by x: autocast's where that is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if autocasting(kind) else x.dtype


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast prescribes for matrix products, differentiably; x itself where autocast is off."""
    return cast(x, product_dtype(x))


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which takes 0.9 us to find that nothing is to be done."""
    return t if t.dtype == dtype else t.to(dtype)


def autocasting(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # meta knows no autocast: torch raises


def flatten(weight: Tensor | QuantizedWeight) -> tuple[list[Tensor], str]:
    """A weight as an op takes it: its tensors, and its format as text, empty for a dense one."""
    return ([weight], "") if isinstance(weight, Tensor) else (weight.tensors(), str(weight.format))


def unflatten(tensors: list[Tensor], fmt: str) -> Tensor | QuantizedWeight:
    return QuantizedWeight.from_tensors(tensors, Format.parse(fmt)) if fmt else tensors[0]


def weight_shape(tensors: list[Tensor], fmt: str) -> tuple[int, int]:
    """(N, K)"""
    return Format.parse(fmt)[1:3] if fmt else (tensors[0].shape[0], tensors[0].shape[1])
