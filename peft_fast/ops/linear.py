"""lora_linear: a frozen linear layer, dense or k-bit, and its LoRA adapter as one differentiable function.

table.py picks the route inside the op, routes.py has the steps of each.

Kept for backward: x as it came (fp32 x is not copied: siblings that share x keep one tensor), or what rms_norm made it
of (norm.py), s [M, R], the dropout key; never W, a mask, or a cast of x.
"""

from typing import Any

import torch
from torch import Tensor

from peft_fast.dispatch import Backend, Route
from peft_fast.quant.weight import QuantizedWeight

from . import norm, plain, routes
from .checks import check_bias, check_device, check_dropout, check_floating
from .library import (
    apply,
    autocasting,
    cast,
    define,
    flatten,
    product_dtype,
    resolve,
    resolve_route,
    unflatten,
    weight_shape,
)


def _forward_fake(x, weight, fmt, bias, A, B, scale, p, key, dtype, trained, backend, route):
    M = x.shape[0]
    return x.new_empty((M, weight_shape(weight, fmt)[0]), dtype=dtype), x.new_empty((M, A.shape[0]), dtype=dtype)


@define(
    "lora_linear(Tensor x, Tensor[] weight, str fmt, Tensor? bias, Tensor A, Tensor B, float scale, float p, "
    "Tensor? key, ScalarType dtype, bool trained, str backend, str route) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward(
    x: Tensor,
    weight: list[Tensor],
    fmt: str,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    key: Tensor | None,
    dtype: torch.dtype,
    trained: bool,
    backend: Backend,
    route: Route,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, R]) in `dtype`."""
    lora = routes.Lora(unflatten(weight, fmt), A, B, scale, p, key, trained, backend, route)
    return routes.forward(cast(x, dtype), bias, lora)


def _backward_fake(dy, x, s, weight, fmt, A, B, scale, p, key, needs, trained, backend, route):
    like = [t.new_empty(t.shape if need else (0,)) for t, need in zip((x, A, B), needs)]
    return tuple(like)


@define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor s, Tensor[] weight, str fmt, Tensor A, Tensor B, float scale, "
    "float p, Tensor? key, bool[] needs, bool trained, str backend, str route) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: list[Tensor],
    fmt: str,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    key: Tensor | None,
    needs: list[bool],
    trained: bool,
    backend: Backend,
    route: Route,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [M, K] in x's dtype, dA [R, K], dB [N, R]); an empty tensor for each that `needs` = (x, A, B) does not ask
    for. The products are taken in s's dtype, as in the forward."""
    lora = routes.Lora(unflatten(weight, fmt), A, B, scale, p, key, trained, backend, route)
    dx, dA, dB = routes.backward(dy, cast(x, s.dtype), s, lora, (needs[0], needs[1], needs[2]))
    dx = None if dx is None else cast(dx, x.dtype)
    return tuple(t.new_empty(0) if g is None else g for g, t in ((dx, x), (dA, A), (dB, B)))  # type: ignore[return-value]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scale: float,
        p: float,
        key: Tensor | None,
        dtype: torch.dtype,
        trained: bool,
        fmt: str,
        backend: str,
        route: str,
        source: norm.Source | None,
        *weight: Tensor,
    ) -> Tensor:
        y, s = _forward(x, list(weight), fmt, bias, A, B, scale, p, key, dtype, trained, backend, route)
        kept, ctx.recipe = norm.to_keep(x, source)
        ctx.save_for_backward(*kept, s, A, B, key, *weight)
        ctx.settings = fmt, scale, p, trained, backend, route
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        x, (s, A, B, key, *weight) = norm.made_again(ctx.saved_tensors, ctx.recipe)
        fmt, scale, p, trained, backend, route = ctx.settings
        needs = list(ctx.needs_input_grad[:3])
        dbias = dy.sum(0) if ctx.needs_input_grad[3] else None
        if plain.is_differentiated_again():

            def call(x: Tensor, A: Tensor, B: Tensor, *weight: Tensor) -> Tensor:
                return plain.linear(x, A, B, None, scale, p, key, s.dtype, fmt, *weight)

            of_weight = ctx.needs_input_grad[13:]
            of_x, of_A, of_B, *of_W = plain.gradients(call, [x, A, B, *weight], [*needs, *of_weight], [dy])
            return of_x, of_A, of_B, dbias, *(None,) * 9, *of_W
        grads: list[Tensor | None] = [None, None, None]
        if any(needs):
            out = _backward(dy, x, s, weight, fmt, A, B, scale, p, key, needs, trained, backend, route)
            grads = [g if need else None for g, need in zip(out, needs)]
        # The base is frozen as a rule; who unfreezes a dense one gets its gradient.
        dW = (dy.t() @ x.to(dy.dtype)).to(weight[0].dtype) if ctx.needs_input_grad[13] else None
        return *grads, dbias, *(None,) * 9, dW, *(None for _ in weight[1:])


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    route: str | None = None,
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias + scale * dropout(x) @ A.T @ B.T     (LoRA, arXiv 2106.09685)

    weight  W [N, K] in `dtype` (any float dtype under autocast), or a QuantizedWeight
    A, B    [R, K] and [N, R], in `dtype` or in fp32: then their gradients are fp32
    scale   multiplies the adapter's output: alpha / r, or alpha / sqrt(r) for rsLoRA
    dropout_p, dropout_key   probability in [0, 1], rounded to 1/65536, and new_dropout_key(x.device)
    dtype   in which to multiply, and y's; by default autocast's where that is on, else x's. x keeps its own
    backend "auto" | "triton" | "torch"; None: the process's (dispatch.use_backend)
    route   "auto" | "split" | "merge" | "fused" (routes.py); None: the process's (dispatch.use_route)

    Differentiable in x, A, B, bias and a dense weight. Raises ValueError for shapes that do not fit and for a route
    that cannot take the call, TypeError for dtypes that do not fit, TritonUnsupported where Triton was asked for by
    name and cannot take the call.
    """
    check_floating(x=x, A=A, B=B)
    tensors, fmt = flatten(weight)
    if len(weight.shape) != 2:
        raise ValueError(f"weight must be a matrix [N, K], got {tuple(weight.shape)}: flatten it")
    N, K = weight.shape
    R = A.shape[0]
    if x.shape[-1] != K:
        raise ValueError(f"x must have K={K} features for a weight of shape {(N, K)}, got {tuple(x.shape)}")
    if A.shape != (R, K) or B.shape != (N, R):
        raise ValueError(f"A must be [R, {K}] and B [{N}, R], got {tuple(A.shape)} and {tuple(B.shape)}")
    autocast_dtype = product_dtype(x)
    if not fmt and dtype is None and not autocasting(x.device.type) and tensors[0].dtype != x.dtype:
        raise TypeError(
            f"x is {x.dtype} but the weight is {tensors[0].dtype}: cast one of them, give dtype, or use torch.autocast"
        )
    check_bias(bias, N)
    check_dropout(dropout_p, dropout_key)
    check_device(x, weight=tensors[0], A=A, B=B, bias=bias, dropout_key=dropout_key)
    rows, key, dtype = x.reshape(-1, K), dropout_key if dropout_p else None, dtype or autocast_dtype
    if plain.is_transformed():
        y = plain.linear(rows, A, B, bias, scale, dropout_p, key, dtype, fmt, *tensors)
        return y.view(*x.shape[:-1], N)
    y = apply(
        _LoraLinear,
        rows,
        A,
        B,
        bias,
        scale,
        dropout_p,
        key,
        dtype,
        A.requires_grad or B.requires_grad,
        fmt,
        resolve(backend),
        resolve_route(route),
        norm.source_of(x),
        *tensors,
    )
    return y.view(*x.shape[:-1], N)
