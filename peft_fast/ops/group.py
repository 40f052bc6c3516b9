"""lora_group: up to three frozen linear layers that share x, as q, k and v do, each with or without a LoRA adapter.

    y_j = x @ W_j.T + bias_j + scale_j * dropout_j(x) @ A_j.T @ B_j.T

What lora_linear computes for each, but that the adapters read x once, forward and backward, and that dx is one buffer
instead of one for each layer and their sums. Each layer takes the route that it would take alone (table.py, routes.py);
those that go different routes go them one by one.

Kept for backward: x as it came, or what rms_norm made it of (norm.py), s [M, sum R_j], dropout keys.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_fast.dispatch import Backend, Route

from . import norm, plain
from .checks import check_floating
from .library import apply, autocasting, cast, define, product_dtype, resolve, resolve_route, weight_shape
from .projection import (
    GRADIENTS,
    LEADING,
    Projection,
    backward_together,
    check,
    forward_together,
    layers,
    rank,
    restored,
    split,
    without_repetitions,
)

MOST = 3  # as kernels/tiles.py has it, which cannot be imported without Triton


def _forward_fake(x, tensors, counts, fmts, scales, ps, dtype, trained, backend, route):
    parts = split(tensors, counts)
    widths = [weight_shape(part[LEADING:], fmt)[0] for part, fmt in zip(parts, fmts)]
    return [x.new_empty((x.shape[0], n), dtype=dtype) for n in (*widths, sum(map(rank, parts)))]


@define(
    "lora_group(Tensor x, Tensor?[] tensors, int[] counts, str[] fmts, float[] scales, float[] ps, ScalarType dtype, "
    "bool trained, str backend, str route) -> Tensor[]",
    _forward_fake,
)
def _forward(
    x: Tensor,
    tensors: list[Tensor | None],
    counts: list[int],
    fmts: list[str],
    scales: list[float],
    ps: list[float],
    dtype: torch.dtype,
    trained: bool,
    backend: Backend,
    route: Route,
) -> list[Tensor]:
    """y_j [M, N_j] of each layer and then s [M, sum R_j], all in `dtype`."""
    y, s = forward_together(cast(x, dtype), layers(split(tensors, counts), fmts, scales, ps, trained, backend, route))
    return [*y, s]


def _backward_fake(dy, x, s, tensors, counts, fmts, scales, ps, needs, trained, backend, route):
    inputs = [x, *(tensor for part in split(tensors, counts) for tensor in part[:GRADIENTS])]
    return [x.new_empty(0) if not need else t.new_empty(t.shape) for t, need in zip(inputs, needs)]


@define(
    "lora_group_backward(Tensor[] dy, Tensor x, Tensor s, Tensor?[] tensors, int[] counts, str[] fmts, "
    "float[] scales, float[] ps, bool[] needs, bool trained, str backend, str route) -> Tensor[]",
    _backward_fake,
)
def _backward(
    dy: list[Tensor],
    x: Tensor,
    s: Tensor,
    tensors: list[Tensor | None],
    counts: list[int],
    fmts: list[str],
    scales: list[float],
    ps: list[float],
    needs: list[bool],
    trained: bool,
    backend: Backend,
    route: Route,
) -> list[Tensor]:
    """The gradients of x and of A, B, bias of each layer: empty tensors for those that `needs` does not ask for. The
    products are taken in s's dtype, as in the forward."""
    parts = layers(split(tensors, counts), fmts, scales, ps, trained, backend, route)
    of_each = split(needs[1:], [GRADIENTS] * len(parts))
    dx, grads = backward_together(dy, cast(x, s.dtype), s, parts, needs[0], of_each)
    found = [None if dx is None else cast(dx, x.dtype), *(grad for part in grads for grad in part)]
    return [x.new_empty(0) if grad is None else grad for grad in found]


class _LoraGroup(torch.autograd.Function):
    """`settings`: the op's arguments that are no tensors; the first is how many tensors each layer has."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, settings: tuple, source: norm.Source | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        given = _filled(tensors, settings[0])
        *y, s = _forward(x, given, *settings)
        ctx.set_materialize_grads(False)  # of an output that nobody used: no gradients, as if it had not been computed
        kept, ctx.recipe = norm.to_keep(x, source)
        ctx.save_for_backward(*kept, s, *tensors)
        ctx.settings = settings
        return tuple(y)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor | None) -> tuple:  # type: ignore[override]
        counts, *numbers, _, trained, backend, route = ctx.settings
        x, (s, *tensors) = norm.made_again(ctx.saved_tensors, ctx.recipe)
        if plain.is_differentiated_again():
            given = _filled(tensors, counts)
            fmts, scales, ps, dtype = ctx.settings[1:5]

            def call(x: Tensor, *given: Any) -> list[Tensor]:
                return plain.group(x, counts, fmts, scales, ps, dtype, *given)

            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
            of_x, *of_given = plain.gradients(call, [x, *given], needs, dy)
            return of_x, None, None, *of_given
        of_each = split(ctx.needs_input_grad[3:], counts)
        parts, used = restored(split(tensors, counts)), [j for j, d in enumerate(dy) if d is not None]
        needs = [ctx.needs_input_grad[0], *(need for j in used for need in of_each[j][:GRADIENTS])]
        dx: Tensor | None = None
        of_parts: list[list[Tensor | None]] = [[None] * count for count in counts]
        if used and any(needs):
            if len(used) < len(dy):
                s = torch.cat([s.split([rank(part) for part in parts], dim=1)[j] for j in used], dim=1)
            given = [tensor for j in used for tensor in parts[j]]
            numbers = [[values[j] for j in used] for values in (counts, *numbers)]
            out = _backward([dy[j] for j in used], x, s, given, *numbers, needs, trained, backend, route)
            dx, *grads = [grad if need else None for grad, need in zip(out, needs)]
            for j, part in zip(used, split(grads, [GRADIENTS] * len(used))):
                of_parts[j][:GRADIENTS] = part
        return dx, None, None, *(grad for part in of_parts for grad in part)


def _filled(tensors: Sequence[Tensor | None], counts: list[int]) -> list[Tensor | None]:
    return [tensor for part in restored(split(tensors, counts)) for tensor in part]


def lora_group(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    route: str | None = None,
) -> list[Tensor]:
    """y_j [..., N_j] of each layer for x [..., K]; W_j is [N_j, K], dense or k-bit.

    dtype       of the products and of y; by default autocast's where that is on, else x's. x keeps its own
    backend, route   lora_linear's, for each of the layers

    Differentiable in x and every A, B and bias. Raises ValueError for shapes that do not fit, for no layer or more than
    three, and for weights that require a gradient, and else what lora_linear raises.
    """
    if not 1 <= len(projections) <= MOST:
        raise ValueError(f"a group has one to {MOST} layers, got {len(projections)}")
    check_floating(x=x)
    named = {str(j): projection for j, projection in enumerate(projections)}
    for name, projection in named.items():
        if projection.weight.shape[1] != x.shape[-1]:
            shape = tuple(projection.weight.shape)
            raise ValueError(f"layer {name} is {shape} and takes K={shape[1]} features, got x {tuple(x.shape)}")
    for name, projection in named.items():
        check(x, name, projection, "lora_group")
    autocast_dtype = product_dtype(x)
    if dtype is None and not autocasting(x.device.type):
        for name, projection in named.items():
            if isinstance(projection.weight, Tensor) and projection.weight.dtype != x.dtype:
                raise TypeError(
                    f"x is {x.dtype} but the weight of layer {name} is {projection.weight.dtype}: cast one of them, "
                    "give dtype, or use torch.autocast"
                )
    packed = [projection.tensors() for projection in projections]
    settings = (
        [len(part) for part, _ in packed],
        [fmt for _, fmt in packed],
        [float(projection.scale) for projection in projections],
        [float(projection.dropout_p) for projection in projections],
        dtype or autocast_dtype,
        any(p.trained for p in projections),
        resolve(backend),
        resolve_route(route),
    )
    rows = x.reshape(-1, x.shape[-1])
    if plain.is_transformed():
        y = plain.group(rows, *settings[:5], *(tensor for part, _ in packed for tensor in part))
        return [y_j.view(*x.shape[:-1], y_j.shape[-1]) for y_j in y]
    tensors = without_repetitions([part for part, _ in packed])
    y = apply(_LoraGroup, rows, settings, norm.source_of(x), *tensors)
    return [y_j.view(*x.shape[:-1], y_j.shape[-1]) for y_j in y]
