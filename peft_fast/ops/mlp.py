"""lora_mlp: a gated MLP of three frozen linear layers, each with or without a LoRA adapter, as one function.

    y = down(h)     h = act(g) * u     g = gate(x)     u = up(x)

Kept for backward: x as it came, or what rms_norm made it of (norm.py), g and u [M, F], the adapters' s [M, R], dropout
keys; or, with `recompute`, x and the keys alone. Neither act(g) nor h is: the backward needs h for down's dA only, and
makes it on its way. Where all three layers have adapters that the kernels of the gate take (routes.keeps_base), g and u
are kept without LoRA's parts, as the base layers gave them. dx of gate and up is one buffer. Each layer takes the route
that it would take alone (table.py, routes.py).

g and u stay in the dtype of the products, h is computed from them as in glu.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_fast.dispatch import Backend, Route

from . import norm, plain, routes
from .checks import check_floating
from .glu import ACTIVATIONS, GLU
from .library import (
    apply,
    autocasting,
    cast,
    define,
    implementation,
    product_dtype,
    resolve,
    resolve_route,
    weight_shape,
)
from .projection import (
    GRADIENTS,
    LEADING,
    Layer,
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


def _forward_fake(x, gate, up, down, fmts, scales, ps, activation, dtype, training, recompute, trained, backend, route):
    M, kept = x.shape[0], training and not recompute
    (F, _), (N, _) = weight_shape(gate[LEADING:], fmts[0]), weight_shape(down[LEADING:], fmts[2])
    inner = [x.new_empty((M, F) if kept else (0,), dtype=dtype) for _ in range(2)]
    s = [x.new_empty((M, R) if kept else (0,), dtype=dtype) for R in (rank(gate) + rank(up), rank(down))]
    return x.new_empty((M, N), dtype=dtype), *inner, *s


@define(
    "lora_mlp(Tensor x, Tensor?[] gate, Tensor?[] up, Tensor?[] down, str[] fmts, float[] scales, float[] ps, "
    "str activation, ScalarType dtype, bool training, bool recompute, bool trained, str backend, str route) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(
    x: Tensor,
    gate: list[Tensor | None],
    up: list[Tensor | None],
    down: list[Tensor | None],
    fmts: list[str],
    scales: list[float],
    ps: list[float],
    activation: str,
    dtype: torch.dtype,
    training: bool,
    recompute: bool,
    trained: bool,
    backend: Backend,
    route: Route,
) -> tuple[Tensor, ...]:
    """(y [M, N], g [M, F], u [M, F], s of gate and up side by side, s of down) in `dtype`; all but y empty where they
    are not kept."""
    parts = layers((gate, up, down), fmts, scales, ps, trained, backend, route)
    kept = training and not recompute
    g, u, s, h = _Gate(cast(x, dtype), parts, activation, backend).forward(kept)
    y, s_down = parts[2].forward(h)
    return y, *(t if kept else t.new_empty(0) for t in (g, u, s, s_down))


class _Gate:
    """From x [M, K] in the dtype of the products to h, and from dy back to dg and du."""

    def __init__(self, x: Tensor, parts: Sequence[Layer], activation: str, backend: Backend) -> None:
        self.x, self.activation = x, activation
        self.gate, self.up, self.down = parts
        self.choice = GLU.choose(backend, x.device, x.dtype)
        self.run = implementation(self.choice)

    def in_one(self) -> tuple[routes.Lora, routes.Lora, routes.Lora] | None:
        """The adapters where the gate goes in one launch each way: the same in the backward as in the forward."""
        gate, up, down = self.gate.lora, self.up.lora, self.down.lora
        if gate is None or up is None or down is None or not routes.keeps_base(self.x, gate, up, down, self.choice):
            return None
        return gate, up, down

    def forward(self, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(g [M, F], u [M, F], s [M, R] of gate and up, h [M, F]); without `keep` nobody reads g and u again."""
        gate, up = self.gate.lora, self.up.lora
        if gate is not None and up is not None:
            kept: routes.Keep = "nothing" if not keep else "base" if self.in_one() else "outputs"
            bias = [self.gate.bias, self.up.bias]
            return routes.forward_gated(self.x, bias, [gate, up], self.activation, self.choice, kept)
        (g, u), s = forward_together(self.x, (self.gate, self.up))
        return g, u, s, self.run.glu(g, u, self.activation, out=None if keep else g)

    def backward(
        self,
        dy: Tensor,
        g: Tensor,
        u: Tensor,
        s: Tensor,
        s_down: Tensor,
        h: Tensor | None,
        needs: list[bool],
        over_g: bool,
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """(dg [M, F], du [M, F], [dA, dB, dbias] of down) of dy [M, N]; dg lies over g where it may. h [M, F]: if
        somebody has it already."""
        needs_dh, (needs_dA, needs_dB, needs_dbias) = any(needs[:7]), needs[7:]
        out = g if over_g else None
        if (adapters := self.in_one()) is not None:
            needed = needs_dh, needs_dA, needs_dB
            dg, du, dA, dB = routes.backward_gated(
                dy, g, u, s, s_down, *adapters, self.activation, self.choice, needed, out
            )
            return dg, du, [dA, dB, self.down.dbias(dy, needs_dbias)]
        lacks_h = needs_dA and h is None
        dg = du = dA = None
        dh, ds, dB = self.down.backward_to_x(dy, s_down, [needs_dh, needs_dA, needs_dB])
        if dh is not None:
            dg, du, again = self.run.glu_backward_(dh, g, u, self.activation, needs_h=lacks_h, out=out)
            h = again if lacks_h else h
        elif lacks_h:
            h = self.run.glu(g, u, self.activation)
        if h is not None and ds is not None and needs_dA and self.down.lora is not None:
            dA = routes.backward_from_x(h, ds, self.down.lora)
        return dg, du, [dA, dB, self.down.dbias(dy, needs_dbias)]


def _backward_fake(
    dy, x, g, u, s, gate, up, down, fmts, scales, ps, activation, needs, recompute, trained, backend, route
):
    inputs = [x, *gate[:GRADIENTS], *up[:GRADIENTS], *down[:GRADIENTS]]
    return [x.new_empty(0) if not need else t.new_empty(t.shape) for t, need in zip(inputs, needs)]


@define(
    "lora_mlp_backward(Tensor dy, Tensor x, Tensor g, Tensor u, Tensor[] s, Tensor?[] gate, Tensor?[] up, "
    "Tensor?[] down, str[] fmts, float[] scales, float[] ps, str activation, bool[] needs, bool recompute, "
    "bool trained, str backend, str route) -> Tensor[]",
    _backward_fake,
)
def _backward(
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    u: Tensor,
    s: list[Tensor],
    gate: list[Tensor | None],
    up: list[Tensor | None],
    down: list[Tensor | None],
    fmts: list[str],
    scales: list[float],
    ps: list[float],
    activation: str,
    needs: list[bool],
    recompute: bool,
    trained: bool,
    backend: Backend,
    route: Route,
) -> list[Tensor]:
    """The gradients of x and of A, B, bias of gate, up and down: empty tensors for those that `needs` does not ask for.

    Products are taken in dy's dtype, which is the forward's. What was saved is not written over: a graph that is kept
    can be run again.
    """
    z = cast(x, dy.dtype)
    parts = layers((gate, up, down), fmts, scales, ps, trained, backend, route)
    middle = _Gate(z, parts, activation, backend)
    s_x, s_down = s
    h: Tensor | None = None
    if recompute:
        g, u, s_x, h = middle.forward(keep=True)
        s_down = parts[2].down_again(h)
        if middle.in_one():
            h = None  # made again on the way: F columns less to keep meanwhile
    dx: Tensor | None = None
    nothing: list[Tensor | None] = [None] * GRADIENTS
    of_gate, of_up = nothing, nothing
    dg, du, of_down = middle.backward(dy, g, u, s_x, s_down, h, needs, over_g=recompute)
    del g, u, h  # of the recomputed ones only dg's and du's memory is needed on
    if dg is not None and du is not None:
        dx, (of_gate, of_up) = backward_together((dg, du), z, s_x, parts[:2], needs[0], (needs[1:4], needs[4:7]))
    grads = [None if dx is None else cast(dx, x.dtype), *of_gate, *of_up, *of_down]
    return [x.new_empty(0) if grad is None else grad for grad in grads]


class _LoraMLP(torch.autograd.Function):
    """`settings`: the op's arguments that are no tensors, and how many tensors each projection has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple, source: norm.Source | None, *tensors: Tensor | None) -> Tensor:
        training, recompute, counts = settings[5], settings[6], settings[-1]
        gate, up, down = restored(split(tensors, counts))
        y, *kept = _forward(x, gate, up, down, *settings[:-1])
        inputs, ctx.recipe = norm.to_keep(x, source)
        kept = kept if training and not recompute else [None] * len(kept)
        ctx.save_for_backward(*inputs, *kept, *tensors)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        fmts, scales, ps, activation, _, _, recompute, trained, backend, route, counts = ctx.settings
        x, (g, u, s, s_down, *tensors) = norm.made_again(ctx.saved_tensors, ctx.recipe)
        if plain.is_differentiated_again():
            given = [tensor for part in restored(split(tensors, counts)) for tensor in part]

            def call(x: Tensor, *given: Any) -> Tensor:
                return plain.mlp(x, counts, fmts, scales, ps, activation, ctx.settings[4], *given)

            needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
            of_x, *of_given = plain.gradients(call, [x, *given], needs, [dy])
            return of_x, None, None, *of_given
        if recompute:
            g = u = s = s_down = x.new_empty(0)
        projections = restored(split(tensors, counts))
        needs_input = split(ctx.needs_input_grad[3:], counts)
        needs = [ctx.needs_input_grad[0], *(need for needed in needs_input for need in needed[:GRADIENTS])]
        grads: list[Tensor | None] = [None] * len(needs)
        if any(needs):
            out = _backward(
                dy, x, g, u, [s, s_down], *projections, fmts, scales, ps, activation, needs, recompute,
                trained, backend, route,
            )  # fmt: skip
            grads = [grad if need else None for grad, need in zip(out, needs)]
        of_tensors: list[Tensor | None] = []
        for i, count in enumerate(counts):
            first = 1 + i * GRADIENTS
            of_tensors += [*grads[first : first + GRADIENTS], *[None] * (count - GRADIENTS)]
        return grads[0], None, None, *of_tensors


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str,
    *,
    dtype: torch.dtype | None = None,
    recompute: bool = False,
    backend: str | None = None,
    route: str | None = None,
) -> Tensor:
    """y [..., N] = down(act(gate(x)) * up(x)) for x [..., K]; gate and up are [F, K], down is [N, F].

    activation  "silu" (SwiGLU), "gelu" (by erf) or "gelu_tanh" (GeGLU; arXiv 2002.05202)
    dtype       of the products, of g, u and y; by default autocast's where that is on, else x's. x keeps its own
    recompute   keep x alone and compute gate and up again in the backward, for about a half more of the forward's time
    backend, route   lora_linear's, for each of the three

    Differentiable in x and every A, B and bias. Raises ValueError for shapes that do not fit, an unknown activation and
    weights that require a gradient, and else what lora_linear raises.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    projections = {"gate": gate, "up": up, "down": down}
    check_floating(x=x)
    _check_shapes(x, projections)
    for name, projection in projections.items():
        check(x, name, projection, "lora_mlp")
    if dtype is None and not autocasting(x.device.type):
        for name, projection in projections.items():
            if isinstance(projection.weight, Tensor) and projection.weight.dtype != x.dtype:
                raise TypeError(
                    f"x is {x.dtype} but the weight of {name} is {projection.weight.dtype}: cast one of them, give "
                    "dtype, or use torch.autocast"
                )
    dtype = dtype or product_dtype(x)
    packed = [projection.tensors() for projection in projections.values()]
    tensors = without_repetitions([part for part, _ in packed])
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    settings = (
        [fmt for _, fmt in packed],
        [float(projection.scale) for projection in projections.values()],
        [float(projection.dropout_p) for projection in projections.values()],
        activation,
        dtype,
        training,
        recompute,
        any(p.trained for p in projections.values()),
        resolve(backend),
        resolve_route(route),
        [len(part) for part, _ in packed],
    )
    if plain.is_transformed():
        given = (tensor for part, _ in packed for tensor in part)
        y = plain.mlp(x.reshape(-1, x.shape[-1]), settings[-1], *settings[:5], *given)
        return y.view(*x.shape[:-1], y.shape[-1])
    y = apply(_LoraMLP, x.reshape(-1, x.shape[-1]), settings, norm.source_of(x), *tensors)
    return y.view(*x.shape[:-1], y.shape[-1])


def _check_shapes(x: Tensor, projections: dict[str, Projection]) -> None:
    (F, K), up, down = (tuple(projection.weight.shape) for projection in projections.values())
    if up != (F, K) or down[1] != F:
        raise ValueError(f"gate and up must be [F, K] and down [N, F], got {(F, K)}, {up} and {down}")
    if x.shape[-1] != K:
        raise ValueError(f"x must have K={K} features for gate and up of shape {(F, K)}, got {tuple(x.shape)}")
