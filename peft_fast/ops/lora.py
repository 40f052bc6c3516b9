"""The two halves of a LoRA adapter as functions of their own, for what lora_linear does not cover in one call:
further active adapters, a bias on B, other layers' outputs."""

from typing import Any

import torch
from torch import Tensor

from peft_fast.dispatch import Backend, Op

from . import plain
from .checks import check_bias, check_device, check_dropout, check_floating
from .library import apply, autocast, define, implementation, resolve


def _why_not_down(dtype: torch.dtype) -> str | None:
    from peft_fast.kernels import lora_down

    return lora_down.why_not(dtype)


def _why_not_up(dtype: torch.dtype) -> str | None:
    from peft_fast.kernels import lora_up_add

    return lora_up_add.why_not(dtype)


LORA_DOWN = Op("lora_down", "triton", _why_not_down)
LORA_UP_ADD = Op("lora_up_add", "triton", _why_not_up)


@define(
    "lora_down(Tensor x, Tensor A, float p, Tensor? key, str backend) -> Tensor",
    lambda x, A, p, key, backend: x.new_empty((x.shape[0], A.shape[0])),
)
def _down(x: Tensor, A: Tensor, p: float, key: Tensor | None, backend: Backend) -> Tensor:
    return implementation(LORA_DOWN.choose(backend, x.device, x.dtype)).lora_down(x, A, p, key)


@define(
    "lora_down_backward(Tensor ds, Tensor x, Tensor A, float p, Tensor? key, bool[] needs, str backend) "
    "-> (Tensor, Tensor)",
    lambda ds, x, A, p, key, needs, backend: tuple(t.new_empty(t.shape if n else (0,)) for t, n in zip((x, A), needs)),
)
def _down_backward(
    ds: Tensor, x: Tensor, A: Tensor, p: float, key: Tensor | None, needs: list[bool], backend: Backend
) -> tuple[Tensor, Tensor]:
    run = implementation(LORA_DOWN.choose(backend, x.device, x.dtype))
    dx = x.new_zeros(x.shape) if needs[0] else None  # dense rows, whatever the strides of x
    dA = run.lora_down_backward(ds, x, A, p, key, dx, needs[1])
    return x.new_empty(0) if dx is None else dx, A.new_empty(0) if dA is None else dA


class _LoraDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, p: float, key: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, A, key)
        ctx.p, ctx.backend = p, backend
        return _down(x, A, p, key, backend)

    @staticmethod
    def backward(ctx: Any, ds: Tensor) -> tuple:  # type: ignore[override]
        x, A, key = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        if plain.is_differentiated_again():
            dx, dA = plain.gradients(lambda x, A: plain.down(x, A, ctx.p, key), [x, A], needs, [ds])
            return dx, dA, None, None, None
        out = _down_backward(ds, x, A, ctx.p, key, needs, ctx.backend)
        return *(g if need else None for g, need in zip(out, needs)), None, None, None


def lora_down(
    x: Tensor,
    A: Tensor,
    *,
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """s [..., R] = dropout(x) [..., K] @ A.T, in x's dtype; A [R, K] in x's dtype or fp32. Differentiable in x and A.

    dropout_p, dropout_key, backend and the errors are lora_linear's.
    """
    check_floating(x=x, A=A)
    x = autocast(x)
    if A.dim() != 2 or A.shape[1] != x.shape[-1]:
        raise ValueError(f"A must be [R, K] with K={x.shape[-1]} as x has, got {tuple(A.shape)}")
    check_dropout(dropout_p, dropout_key)
    check_device(x, A=A, dropout_key=dropout_key)
    key = dropout_key if dropout_p else None
    rows = x.reshape(-1, x.shape[-1])
    if plain.is_transformed():
        return plain.down(rows, A, dropout_p, key).view(*x.shape[:-1], A.shape[0])
    s = apply(_LoraDown, rows, A, dropout_p, key, resolve(backend))
    return s.view(*x.shape[:-1], A.shape[0])


@define(
    "lora_up_add_(Tensor(a!) y, Tensor s, Tensor B, float scale, Tensor? bias, str backend) -> ()",
    lambda y, s, B, scale, bias, backend: None,
)
def _up_add_(y: Tensor, s: Tensor, B: Tensor, scale: float, bias: Tensor | None, backend: Backend) -> None:
    implementation(LORA_UP_ADD.choose(backend, y.device, y.dtype)).lora_up_add_(y, s, B, scale, bias)


@define(
    "lora_up_backward(Tensor dy, Tensor s, Tensor B, float scale, bool[] needs, str backend) -> (Tensor, Tensor)",
    lambda dy, s, B, scale, needs, backend: tuple(t.new_empty(t.shape if n else (0,)) for t, n in zip((s, B), needs)),
)
def _up_backward(
    dy: Tensor, s: Tensor, B: Tensor, scale: float, needs: list[bool], backend: Backend
) -> tuple[Tensor, Tensor]:
    run = implementation(LORA_UP_ADD.choose(backend, dy.device, dy.dtype))
    ds, dB = run.lora_up_backward(dy, s, B, scale, *needs)
    return s.new_empty(0) if ds is None else ds, B.new_empty(0) if dB is None else dB


class _LoraUpAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor, B: Tensor, bias: Tensor | None, scale: float, backend: str) -> Tensor:
        ctx.save_for_backward(s, B)
        ctx.scale, ctx.backend = scale, backend
        out = y.clone(memory_format=torch.contiguous_format)  # in place only on what this call made
        _up_add_(out, s, B, scale, bias, backend)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        s, B = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:3])
        dbias = dy.sum(0) if ctx.needs_input_grad[3] else None
        if plain.is_differentiated_again():
            nothing = dy.new_zeros(())
            ds, dB = plain.gradients(lambda s, B: plain.up_add(nothing, s, B, None, ctx.scale), [s, B], needs, [dy])
            return dy, ds, dB, dbias, None, None
        out = _up_backward(dy, s, B, ctx.scale, needs, ctx.backend)
        return dy, *(g if need else None for g, need in zip(out, needs)), dbias, None, None


def lora_up_add(
    y: Tensor, s: Tensor, B: Tensor, scale: float, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """y [..., N] + bias [N] + scale * s [..., R] @ B.T, in y's dtype; B [N, R] in that dtype or fp32; y is not changed.

    Differentiable in y, s, B and bias. Raises ValueError for shapes that do not fit, TypeError where y and s differ.
    """
    check_floating(y=y, s=s, B=B)
    N, R = B.shape
    if y.shape != (*s.shape[:-1], N) or s.shape[-1] != R:
        raise ValueError(
            f"y must be [..., {N}] and s [..., {R}] for B {(N, R)}, got {tuple(y.shape)}, {tuple(s.shape)}"
        )
    check_bias(bias, N)
    check_device(y, s=s, B=B, bias=bias)
    if y.dtype != s.dtype:
        raise TypeError(f"y and s must have one dtype, got {y.dtype} and {s.dtype}: cast s")
    if plain.is_transformed():
        return plain.up_add(y, s, B, bias, scale)
    out = apply(_LoraUpAdd, y.reshape(-1, N), s.reshape(-1, R), B, bias, scale, resolve(backend))
    return out.view(y.shape)
