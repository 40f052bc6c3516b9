"""Linear layers inside an op of several: what the op is given of each, and their part of the forward and backward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_fast.dispatch import Backend, Route
from peft_fast.quant.weight import QuantizedWeight

from . import routes
from .checks import FLOATS, check_bias, check_device, check_dropout, check_floating
from .library import flatten, unflatten


class Projection(NamedTuple):
    """A linear layer [N, K] and its adapter, A [R, K] and B [N, R], as lora_linear takes them; A and B None: none."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    dropout_p: float = 0.0
    dropout_key: Tensor | None = None

    @property
    def trained(self) -> bool:
        return any(factor is not None and factor.requires_grad for factor in (self.A, self.B))

    def tensors(self) -> tuple[list[Tensor | None], str]:
        """What an op is given of it: these tensors and the weight's format."""
        weight, fmt = flatten(self.weight)
        return [self.A, self.B, self.bias, self.dropout_key if self.dropout_p else None, *weight], fmt


LEADING = 4  # A, B, bias, key come before the weight's tensors
GRADIENTS = 3  # of each projection: A, B, bias


class Layer:
    """A projection inside the op: its half of the forward and of the backward, whether it has an adapter or not."""

    def __init__(
        self,
        tensors: list[Tensor | None],
        fmt: str,
        scale: float,
        p: float,
        trained: bool,
        backend: Backend,
        route: Route,
    ) -> None:
        A, B, self.bias, key, *weight = tensors
        self.weight = unflatten(weight, fmt)  # type: ignore[arg-type]
        self.backend: Backend = backend
        self.lora: routes.Lora | None = None
        if A is not None and B is not None:
            self.lora = routes.Lora(self.weight, A, B, scale, p, key, trained, backend, route)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y [M, N], s [M, R]); R is 0 without an adapter."""
        if self.lora is None:
            return routes.product(x, self.weight, self.bias, self.backend), x.new_empty(x.shape[0], 0)
        return routes.forward(x, self.bias, self.lora)

    def down_again(self, x: Tensor) -> Tensor:
        """The s that `forward` gave."""
        return x.new_empty(x.shape[0], 0) if self.lora is None else routes.down_again(x, self.lora)

    def backward_to_x(
        self, dy: Tensor, s: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, ds, dB); see routes.backward_to_x."""
        if self.lora is not None:
            return routes.backward_to_x(dy, s, self.lora, (needs[0], needs[1], needs[2]))
        return routes.product_dx(dy, self.weight, self.backend) if needs[0] else None, None, None

    def dbias(self, dy: Tensor, needed: bool) -> Tensor | None:
        return dy.sum(0).to(self.bias.dtype) if needed and self.bias is not None else None


def forward_together(x: Tensor, parts: Sequence[Layer]) -> tuple[list[Tensor], Tensor]:
    """(y of each layer, their s side by side) for layers that share x [M, K]."""
    adapted = [part for part in parts if part.lora is not None]
    y: list[Tensor] = []
    s = x.new_empty(x.shape[0], 0)
    if adapted:
        y, s = routes.forward_group(x, [part.bias for part in adapted], [part.lora for part in adapted])  # type: ignore[misc]
    of_adapted = iter(y)
    return [
        routes.product(x, part.weight, part.bias, part.backend) if part.lora is None else next(of_adapted)
        for part in parts
    ], s


def backward_together(
    dy: Sequence[Tensor], x: Tensor, s: Tensor, parts: Sequence[Layer], needs_dx: bool, needs: Sequence[Sequence[bool]]
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """(dx, [dA, dB, dbias] of each layer) for layers that share x; `needs` = (A, B, bias) of each."""
    dx, adapted = None, [i for i, part in enumerate(parts) if part.lora is not None]
    grads: list[list[Tensor | None]] = [[None, None, part.dbias(d, n[2])] for part, d, n in zip(parts, dy, needs)]
    if adapted:
        lora = [parts[i].lora for i in adapted]
        needs_dA, needs_dB = ([needs[i][j] for i in adapted] for j in (0, 1))
        dx, dA, dB = routes.backward_group([dy[i] for i in adapted], x, s, lora, needs_dx, needs_dA, needs_dB)  # type: ignore[arg-type]
        for i, of_A, of_B in zip(adapted, dA, dB):
            grads[i][:2] = of_A, of_B
    for part, dy_j in zip(parts, dy) if needs_dx else ():
        if part.lora is None:
            dx = routes.product_dx(dy_j, part.weight, part.backend, dx)
    return dx, grads


def layers(
    projections: Sequence[list[Tensor | None]],
    fmts: list[str],
    scales: list[float],
    ps: list[float],
    trained: bool,
    backend: Backend,
    route: Route,
) -> list[Layer]:
    return [Layer(*settings, trained, backend, route) for settings in zip(projections, fmts, scales, ps)]


def rank(projection: list[Tensor | None]) -> int:
    A = projection[0]
    return 0 if A is None else A.shape[0]


def split(items: Sequence, counts: Sequence[int]) -> list[list]:
    """items, cut into lists of these lengths"""
    parts, start = [], 0
    for count in counts:
        parts.append(list(items[start : start + count]))
        start += count
    return parts


def without_repetitions(parts: list[list[Tensor | None]]) -> list[Tensor | None]:
    """All tensors, with None for those of a k-bit weight that the projection before it has too, as codebooks are:
    torch.compile takes a tensor only once."""
    before: list[list[Tensor | None]] = [[], *parts[:-1]]
    return [
        None if LEADING <= i < len(earlier) and tensor is earlier[i] else tensor
        for part, earlier in zip(parts, before)
        for i, tensor in enumerate(part)
    ]


def restored(parts: list[list]) -> list[list]:
    for part, earlier in zip(parts[1:], parts):
        part[LEADING:] = [earlier[i] if part[i] is None else part[i] for i in range(LEADING, len(part))]
    return parts


def check(x: Tensor, name: str, projection: Projection, op: str) -> None:
    """ValueError and TypeError for what an op cannot take of a layer, whatever the op; `name`: the layer's."""
    (N, K), A, B, weight = projection.weight.shape, projection.A, projection.B, projection.weight
    for factor in (A, B):
        if factor is not None and (factor.dtype not in FLOATS or factor.dim() != 2):
            check_floating(**{f"{name}.A": A, f"{name}.B": B})
    if (A is None) != (B is None):
        raise ValueError(f"{name} has one of A and B: give both, or neither for a projection without an adapter")
    if A is not None and B is not None and (A.shape != (A.shape[0], K) or B.shape != (N, A.shape[0])):
        raise ValueError(f"{name}: A must be [R, {K}] and B [{N}, R], got {tuple(A.shape)} and {tuple(B.shape)}")
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"the weight of {name} requires a gradient, which {op} does not compute: freeze it, or use lora_linear"
        )
    check_bias(projection.bias, N)
    check_dropout(projection.dropout_p, projection.dropout_key)
    data = weight if isinstance(weight, Tensor) else weight.data
    device, tensors = x.device, (data, A, B, projection.bias, projection.dropout_key)
    if any(tensor is not None and tensor.device != device for tensor in tensors):
        check_device(x, **{f"{name}.{n}": t for n, t in zip(("weight", "A", "B", "bias", "key"), tensors)})
