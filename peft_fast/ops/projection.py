"""A linear layer inside an op of several: what the op is given of it, and its part of the forward and backward."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from peft_fast.dispatch import Backend, Route
from peft_fast.quant.weight import QuantizedWeight

from . import routes
from .library import flatten, unflatten


@dataclass(frozen=True)
class Projection:
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

    def backward(
        self, dy: Tensor, x: Tensor, s: Tensor, needs: Sequence[bool], dx: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(dx, [dA, dB, dbias]) for `needs` = (x, A, B, bias); added to the `dx` that is given."""
        dA = dB = None
        if self.lora is not None:
            dx, dA, dB = routes.backward(dy, x, s, self.lora, (needs[0], needs[1], needs[2]), dx)
        elif needs[0]:
            dx = routes.product_dx(dy, self.weight, self.backend, dx)
        return dx, [dA, dB, self.dbias(dy, needs[3])]

    def backward_to_x(
        self, dy: Tensor, s: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, ds, dB); see routes.backward_to_x."""
        if self.lora is not None:
            return routes.backward_to_x(dy, s, self.lora, (needs[0], needs[1], needs[2]))
        return routes.product_dx(dy, self.weight, self.backend) if needs[0] else None, None, None

    def dbias(self, dy: Tensor, needed: bool) -> Tensor | None:
        return dy.sum(0).to(self.bias.dtype) if needed and self.bias is not None else None


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
