"""The steps of each route, forward and backward, on plain tensors: no autograd, no checks. table.py picks the route.

    route   forward                                        backward
    split   y = x @ W.T + bias; s = lora_down(x)           ds, dB = lora_up_backward(dy, s); dx = dy @ W
            lora_up_add_(y, s)                             dA = lora_down_backward(ds, x), which adds to dx
    fused   s = lora_down(x)                               ds, dB; dx = quant_matmul_dx(dy, W, ds, A)
            y = quant_matmul(x, W, bias, s, B)             dA = lora_down_backward(ds, x)
    merge   W' = dequantize_merge(W, A, B)                 ds, dB; W' again; dx = dy @ W'
            y = x @ W'.T + bias                            dA = lora_down_backward(ds, x)
            s = lora_down(x), if trained

`reference` is split in plain torch. W of a k-bit base is written out for one product and freed after it.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.dispatch import REFERENCE, Backend, Choice, Route
from peft_fast.quant import bitsandbytes_kernels
from peft_fast.quant.weight import QuantizedWeight

from . import table
from .library import cast, implementation


class Lora(NamedTuple):
    """A linear layer and its adapter, as a route takes them."""

    weight: Tensor | QuantizedWeight  # [N, K]
    A: Tensor  # [R, K]
    B: Tensor  # [N, R]
    scale: float
    p: float  # dropout
    key: Tensor | None
    trained: bool  # A or B want gradients, now or when a checkpoint runs this forward again
    backend: Backend
    route: Route

    def call(self, x: Tensor) -> table.Call:
        """What table.py is asked about, for x [M, K] in the dtype of the product: the same in forward and backward."""
        (N, K), R = self.weight.shape, self.A.shape[0]
        fmt = _text(self.weight.format) if isinstance(self.weight, QuantizedWeight) else ""
        return table.Call(x.device, x.dtype, x.shape[0], N, K, R, fmt, self.p, self.trained)


_text = functools.lru_cache(maxsize=4096)(str)


def dequantize(weight: QuantizedWeight, dtype, backend: Backend, out: Tensor | None = None) -> Tensor:
    """W [N, K] in `dtype`, by whoever table.dequantization names; into `out`, if given."""
    choice = table.dequantization(backend, weight.device, dtype, _text(weight.format))
    if choice.backend == "bitsandbytes":
        W = bitsandbytes_kernels.dequantize(weight, dtype)
        return W if out is None else out.copy_(W)
    return implementation(choice).dequantize(weight, dtype, out)


def materialize(weight: Tensor | QuantizedWeight, dtype, backend: Backend) -> Tensor:
    """W [N, K] in `dtype`: dequantised, or cast where it has another one."""
    return cast(weight, dtype) if isinstance(weight, Tensor) else dequantize(weight, dtype, backend)


def product(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, backend: Backend) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias, by whoever table.product names."""
    bias = None if bias is None else cast(bias, x.dtype)
    if isinstance(weight, QuantizedWeight):
        call = table.Call(x.device, x.dtype, x.shape[0], *weight.shape, fmt=_text(weight.format))
        choice = table.product(call, backend)
        if choice.route == "fused":
            return implementation(choice).quant_matmul(x, weight, bias)
        if choice.route == "bitsandbytes" and weight.data.data_ptr() % 16 == 0:  # it reads 16 bytes at a time
            return bitsandbytes_kernels.matmul(x, weight, bias)
    return F.linear(x, materialize(weight, x.dtype, backend), bias)


def product_dx(
    dy: Tensor, weight: Tensor | QuantizedWeight, backend: Backend, added_to: Tensor | None = None
) -> Tensor:
    """dx [M, K] = dy [M, N] @ W, by whoever table.product_dx names; `added_to`, in place, if given."""
    if isinstance(weight, QuantizedWeight):
        call = table.Call(dy.device, dy.dtype, dy.shape[0], *weight.shape, fmt=_text(weight.format))
        choice = table.product_dx(call, backend)
        if choice.route == "fused":
            return _sum(implementation(choice).quant_matmul_dx(dy, weight), added_to)
    return _product(dy, materialize(weight, dy.dtype, backend), added_to)


def _product(dy: Tensor, W: Tensor, added_to: Tensor | None) -> Tensor:
    return dy @ W if added_to is None else added_to.addmm_(dy, W)


def _sum(dx: Tensor, added_to: Tensor | None) -> Tensor:
    return dx if added_to is None else added_to.add_(dx)


def forward(x: Tensor, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, R]) for x [M, K] in the dtype of the product. s is for the backward: of a layer that is merged
    and not trained it has no values."""
    (y,), s = forward_group(x, [bias], [lora])
    return y, s


def forward_group(x: Tensor, bias: Sequence[Tensor | None], lora: Sequence[Lora]) -> tuple[list[Tensor], Tensor]:
    """The same for layers that share x, which their adapters read once: their y, and their s side by side.

    Layers that go different routes go them one by one.
    """
    choices = [table.linear(one.call(x), one.backend, one.route) for one in lora]
    if _differ(choices):
        parts = [forward(x, *one) for one in zip(bias, lora)]
        return [y for y, _ in parts], torch.cat([s for _, s in parts], dim=1)
    route, run = choices[0].route, implementation(choices[0])
    if route == "merge" and not any(one.trained for one in lora):
        s = x.new_empty(x.shape[0], sum(one.A.shape[0] for one in lora))
    else:
        s = _down(run, x, lora)
    if route == "merge":
        return [_merged_product(run, x, *one) for one in zip(bias, lora)], s
    if route == "fused":
        each = zip(s.split([one.A.shape[0] for one in lora], dim=1), bias, lora)
        return [run.quant_matmul(x, one.weight, b, s_j, one.B, one.scale) for s_j, b, one in each], s
    y = [product(x, one.weight, b, one.backend) for b, one in zip(bias, lora)]
    run.lora_up_add_group_(y, s, [one.B for one in lora], [one.scale for one in lora], [None] * len(lora))
    return y, s


Keep = Literal["nothing", "outputs", "base"]  # what becomes of g and u: base, without LoRA's part, where keeps_base


def keeps_base(x: Tensor, gate: Lora, up: Lora, down: Lora, glu: Choice) -> bool:
    """Whether the gate of the MLP goes in one pass each way (kernels/lora_glu.py), for x [M, K]: then g and u stay what
    the base layers gave, and the backward, which asks this too, adds LoRA's parts to them again."""
    if glu.backend != "triton" or not table.is_split(down.call(x), down.backend, down.route, backward=True):
        return False
    if not all(table.is_split(one.call(x), one.backend, one.route) for one in (gate, up)):
        return False
    from peft_fast.kernels import lora_glu

    ranks = [one.A.shape[0] for one in (gate, up, down)]
    return lora_glu.why_not(x.dtype, gate.weight.shape[0], ranks) is None


def forward_gated(
    x: Tensor, bias: Sequence[Tensor | None], lora: Sequence[Lora], activation: str, glu: Choice, keep: Keep
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(g, u, s, h = act(g) * u) for the two layers of a gated MLP, g = gate(x) and u = up(x), x [M, K]: g, u and h are
    [M, F], s [M, R_g + R_u]. With "nothing" kept nobody reads g, u and s again. `glu`: who computes h, where not the
    kernel that adds LoRA's part to g and u."""
    choices = [table.linear(one.call(x), one.backend, one.route) for one in lora]
    if _differ(choices) or choices[0].route not in ("split", REFERENCE) or choices[0].backend != glu.backend:
        assert keep != "base"
        (g, u), s = forward_group(x, bias, lora)
        return g, u, s, implementation(glu).glu(g, u, activation, out=None if keep == "outputs" else g)
    run = implementation(choices[0])
    s = _down(run, x, lora)
    g, u = (product(x, one.weight, b, one.backend) for b, one in zip(bias, lora))
    B, scale, out = [one.B for one in lora], [one.scale for one in lora], g if keep == "nothing" else None
    h = run.lora_up_glu(g, u, s, B, scale, activation, update=keep == "outputs", out=out)
    return g, u, s, h


def backward_gated(
    dy: Tensor,
    g: Tensor,
    u: Tensor,
    s: Tensor,
    s_down: Tensor,
    gate: Lora,
    up: Lora,
    down: Lora,
    activation: str,
    glu: Choice,
    needs: tuple[bool, bool, bool],
    out: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dg [M, F], du [M, F], dA [R, F], dB [N, R]) of dy [M, N] through down and the gate, where `keeps_base`; `needs`
    = (dg and du, dA and dB of down). dg may lie over g, as `out`."""
    run, (needs_dh, needs_dA, needs_dB) = implementation(glu), needs
    ds, dB = _up(run, dy, s_down, down, needs_dA or needs_dh, needs_dB)
    B, scale = (gate.B, up.B), (gate.scale, up.scale)
    if not needs_dh:
        dA = None
        if needs_dA:
            h = run.lora_up_glu(g, u, s, B, scale, activation, update=False)
            dA = run.lora_down_backward(ds, h, down.A, down.p, down.key)
        return None, None, dA, dB
    dh = product_dx(dy, down.weight, down.backend)
    adapter = ds, down.A, down.p, down.key
    return *run.lora_glu_backward_(dh, g, u, s, B, scale, *adapter, activation, needs_dA, out), dB


def _down(run, x: Tensor, lora: Sequence[Lora]) -> Tensor:
    """s [M, sum R_j]"""
    return run.lora_down_group(x, [one.A for one in lora], [one.p for one in lora], [one.key for one in lora])


def _differ(choices: Sequence[Choice]) -> bool:
    first = choices[0]
    return len(choices) > 1 and any(
        (choice.route, choice.backend) != (first.route, first.backend) for choice in choices[1:]
    )


def _merged_product(run, x: Tensor, bias: Tensor | None, lora: Lora) -> Tensor:
    assert isinstance(lora.weight, QuantizedWeight)
    merged, _ = run.dequantize_merge(lora.weight, lora.A, lora.B, lora.scale, x.dtype)
    return F.linear(x, merged, None if bias is None else cast(bias, x.dtype))


def backward(
    dy: Tensor, x: Tensor, s: Tensor, lora: Lora, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx [M, K], dA [R, K], dB [N, R]), each None where `needs` = (x, A, B) does not ask for it."""
    dx, (dA,), (dB,) = backward_group([dy], x, s, [lora], needs[0], [needs[1]], [needs[2]])
    return dx, dA, dB


def backward_group(
    dy: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    lora: Sequence[Lora],
    needs_dx: bool,
    needs_dA: Sequence[bool],
    needs_dB: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """The same for layers that share x: dx is the sum over them, the adapters read x once and write dx once."""
    choices = [table.linear_backward(one.call(x), one.backend, one.route) for one in lora]
    if _differ(choices):
        return _backward_one_by_one(dy, x, s, lora, needs_dx, needs_dA, needs_dB)
    route, run, dx = choices[0].route, implementation(choices[0]), None
    needs_ds = any(needs_dA) or (needs_dx and route != "merge")
    ds, dB, dA = None, [None] * len(lora), [None] * len(lora)
    if needs_ds or any(needs_dB):
        ds, dB = run.lora_up_group_backward(
            dy, s, [one.B for one in lora], [one.scale for one in lora], needs_ds, any(needs_dB)
        )
    if needs_dx:
        dx = _dx(route, run, dy, ds, lora)
    added_to = dx if route not in ("merge", "fused") else None
    if any(needs_dA) or added_to is not None:  # one pass over x gives dA and adds LoRA's part to dx
        A, p, key = [one.A for one in lora], [one.p for one in lora], [one.key for one in lora]
        dA = run.lora_down_group_backward(ds, x, A, p, key, added_to, any(needs_dA))
    return dx, _needed(dA, needs_dA), _needed(dB, needs_dB)


def _dx(route: str, run, dy: Sequence[Tensor], ds: Tensor | None, lora: Sequence[Lora]) -> Tensor | None:
    """dx [M, K] of the base weights; on routes merge and fused with LoRA's part."""
    dx = None
    if route == "fused":
        assert ds is not None
        for dy_j, ds_j, one in zip(dy, ds.split([one.A.shape[0] for one in lora], dim=1), lora):
            dx = _sum(run.quant_matmul_dx(dy_j, one.weight, ds_j, one.A, one.p, one.key), dx)
        return dx
    for dy_j, one in zip(dy, lora):
        dx = _merged_dx(run, dy_j, one, dx) if route == "merge" else product_dx(dy_j, one.weight, one.backend, dx)
    return dx


def _needed(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs)]


def _backward_one_by_one(
    dy: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    lora: Sequence[Lora],
    needs_dx: bool,
    needs_dA: Sequence[bool],
    needs_dB: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    dx, dA, dB = None, [], []
    parts = s.split([one.A.shape[0] for one in lora], dim=1)
    for dy_j, s_j, one, needs_A, needs_B in zip(dy, parts, lora, needs_dA, needs_dB):
        part, of_A, of_B = backward(dy_j, x, s_j, one, (needs_dx, needs_A, needs_B))
        dx = part if dx is None or part is None else dx.add_(part)
        dA.append(of_A)
        dB.append(of_B)
    return dx, dA, dB


def backward_to_x(
    dy: Tensor, s: Tensor, lora: Lora, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, ds, dB): the first half of `backward`, for an x that can be had again only with dx (as in mlp.py)."""
    choice = table.linear_backward(lora.call(dy), lora.backend, lora.route)
    run, (needs_dx, needs_dA, needs_dB) = implementation(choice), needs
    ds, dB = _up(run, dy, s, lora, needs_dA or (needs_dx and choice.route != "merge"), needs_dB)
    if not needs_dx:
        return None, ds, dB
    if choice.route == "merge":
        return _merged_dx(run, dy, lora), ds, dB
    if choice.route == "fused":
        return run.quant_matmul_dx(dy, lora.weight, ds, lora.A, lora.p, lora.key), ds, dB
    dx = product_dx(dy, lora.weight, lora.backend)
    run.lora_down_backward(ds, dx, lora.A, lora.p, lora.key, dx, needs_dA=False)
    return dx, ds, dB


def backward_from_x(x: Tensor, ds: Tensor, lora: Lora) -> Tensor:
    """dA [R, K]: the second half."""
    choice = table.linear_backward(lora.call(x), lora.backend, lora.route)
    return implementation(choice).lora_down_backward(ds, x, lora.A, lora.p, lora.key)


def down_again(x: Tensor, lora: Lora) -> Tensor:
    """s [M, R] as `forward` gives it to `backward`; without values where only dx will be asked for."""
    if not lora.trained:
        return x.new_empty(x.shape[0], lora.A.shape[0])
    choice = table.linear_backward(lora.call(x), lora.backend, lora.route)
    return implementation(choice).lora_down(x, lora.A, lora.p, lora.key)


def _merged_dx(run, dy: Tensor, lora: Lora, added_to: Tensor | None = None) -> Tensor:
    assert isinstance(lora.weight, QuantizedWeight)
    merged, _ = run.dequantize_merge(lora.weight, lora.A, lora.B, lora.scale, dy.dtype)
    return _product(dy, merged, added_to)


def _up(run, dy: Tensor, s: Tensor, lora: Lora, needs_ds: bool, needs_dB: bool) -> tuple[Tensor | None, Tensor | None]:
    if not (needs_ds or needs_dB):
        return None, None
    return run.lora_up_backward(dy, s, lora.B, lora.scale, needs_ds, needs_dB)
