"""Which implementation of an op runs, and why: a pure function of what the call looks like, asked for by name.

    PEFT_FAST_BACKEND=auto|triton|torch            the process-wide setting, validated at import
    with use_backend("torch"): ...                 the same for a while: tests, debugging, A/B in benches
    layer.backend = "torch"                        one layer; wins over both
    PEFT_FAST_ROUTE=auto|split|merge|fused, use_route(...)    which of lora_linear's routes (ops/table.py)

`auto` takes the Triton route where it can run and plain torch elsewhere, with a reason that `explain` prints. `triton`
asked for by name never falls back: it raises TritonUnsupported with that reason; so does a route, with ValueError. The
settings are one value per process and no ContextVars: activation checkpointing runs forwards again on autograd's
threads, which would not see one.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]
Route = Literal["auto", "split", "merge", "fused"]
ENV, ROUTE_ENV = "PEFT_FAST_BACKEND", "PEFT_FAST_ROUTE"


class TritonUnsupported(RuntimeError):
    """Triton was asked for by name and cannot take this call."""


def checked(backend: str, source: str) -> Backend:
    """`backend` itself, or ValueError with the valid names and where the bad one came from."""
    return _one_of(Backend, backend, source)


def checked_route(route: str, source: str) -> Route:
    return _one_of(Route, route, source)


def _one_of(kind: Any, name: str, source: str) -> Any:
    if name not in get_args(kind):
        raise ValueError(f"{source} must be one of {', '.join(get_args(kind))}, got {name!r}")
    return name


_backend: Backend = checked(os.environ.get(ENV, "auto"), ENV)
_route: Route = checked_route(os.environ.get(ROUTE_ENV, "auto"), ROUTE_ENV)


def current_backend() -> Backend:
    return _backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Set the backend of the whole process within a `with` block; restored also when the block raises."""
    global _backend
    before, _backend = _backend, checked(backend, "use_backend")
    try:
        yield
    finally:
        _backend = before


def current_route() -> Route:
    return _route


@contextmanager
def use_route(route: str) -> Iterator[None]:
    """Have every lora_linear of the process take this route within a `with` block, on whichever backend runs it.

    A call that cannot take it raises ValueError with the reason.
    """
    global _route
    before, _route = _route, checked_route(route, "use_route")
    try:
        yield
    finally:
        _route = before


@dataclass(frozen=True)
class Choice:
    """What runs a call, and the reason."""

    op: str
    route: str
    because: str
    backend: Literal["triton", "torch", "bitsandbytes"] = "torch"  # whose kernels the route consists of


@dataclass(frozen=True)
class Op:
    """An operation with a route in Triton and a reference in torch that compute the same.

    `why_not(*facts)` says why the route's kernels cannot take a call, or None. It is only asked where Triton can run at
    all, so it may import them. `needs_dot`: the route multiplies matrices inside Triton, hence needs tensor cores.
    """

    name: str
    route: str
    why_not: Callable[..., str | None]
    needs_dot: bool = True

    def choose(self, backend: Backend, device: torch.device, dtype: torch.dtype, *facts: Hashable) -> Choice:
        """Pure and memoised: the same call gets the same route, in backward as in forward."""
        return _choose(self, backend, device, dtype, facts)


REFERENCE = "reference"


@functools.lru_cache(maxsize=4096)
def _choose(op: Op, backend: Backend, device: torch.device, dtype: torch.dtype, facts: tuple) -> Choice:
    if backend == "torch":
        return Choice(op.name, REFERENCE, "backend torch was asked for")
    reason = cannot_run_triton(device, dtype, op.needs_dot, interpreter=backend == "triton")
    reason = reason or op.why_not(dtype, *facts)
    if reason is None:
        because = "Triton, asked for" if backend == "triton" else describe_device(device)
        return Choice(op.name, op.route, because, "triton")
    if backend == "triton":
        raise TritonUnsupported(f"{op.name}: backend triton was asked for, but {reason}; backend auto would run torch")
    if device.type == "cuda":
        _warn_of_fallback(f"{op.name} runs in plain torch on {describe_device(device)}: {reason}")
    return Choice(op.name, REFERENCE, reason)


def cannot_run_triton(device: torch.device, dtype: torch.dtype, needs_dot: bool, interpreter: bool) -> str | None:
    """The reason Triton cannot run on this device at all; the interpreter counts only where Triton is asked for."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        if not (interpreter and interpreting()):
            return "the tensors are on the CPU"
        return "Triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    if device.type != "cuda" or torch.version.hip:
        return "the tensors are not on an NVIDIA GPU"
    if needs_dot and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{describe_device(device)} is older than sm_80, where Triton has no tensor cores"
    return None


def interpreting() -> bool:
    """Whether this process runs Triton kernels in the interpreter (TRITON_INTERPRET=1 before triton's import)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return "{} (sm_{}{})".format(torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device))


_warned_of_fallback = False


def _warn_of_fallback(text: str) -> None:
    """Once per process; explain(model) has the rest."""
    global _warned_of_fallback
    if not _warned_of_fallback:
        _warned_of_fallback = True
        warnings.warn(f"{text}. peft_fast.explain(model) lists every layer; this is said once.", stacklevel=2)
