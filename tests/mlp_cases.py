"""Gated MLPs with LoRA to try: random cases, and the comparison of the output and every gradient with fp64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast import ops
from peft_fast.kernels import dropout, reference
from peft_fast.ops import Projection
from peft_fast.quant import blockwise, int8
from peft_fast.testing import assert_as_accurate_as_torch

NAMES = ("gate", "up", "down")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}


@dataclass
class MlpCase:
    x: Tensor
    projections: dict[str, Projection]
    activation: str
    d_y: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """All that gradients can be asked for: x, and "gate.A", "gate.B", "gate.bias", ..."""
        found = {"x": self.x}
        for name, projection in self.projections.items():
            tensors = {"A": projection.A, "B": projection.B, "bias": projection.bias}
            found |= {f"{name}.{part}": tensor for part, tensor in tensors.items() if tensor is not None}
        return found

    def fresh(self, needs: Sequence[str]) -> dict[str, Tensor]:
        return {name: t.detach().requires_grad_(name in needs) for name, t in self.leaves().items()}

    def call(self, leaves: dict[str, Tensor], **options) -> Tensor:
        parts = []
        for name, projection in self.projections.items():
            own = {part: leaves.get(f"{name}.{part}") for part in ("A", "B", "bias")}
            parts.append(projection._replace(**own))
        return ops.lora_mlp(leaves["x"], *parts, self.activation, **options)

    def run(self, needs: Sequence[str] | None = None, **options) -> dict[str, Tensor]:
        """{"y": output, name: gradient for each name in needs, all unless given}"""
        needs = list(self.leaves()) if needs is None else needs
        leaves = self.fresh(needs)
        y = self.call(leaves, **options)
        grads = torch.autograd.grad(y, [leaves[name] for name in needs], self.d_y.to(y.dtype))
        return {"y": y.detach(), **dict(zip(needs, grads))}


def make_projection(
    N: int, K: int, R: int, dtype: torch.dtype, adapter: torch.dtype, base: str, p: float, device: str
) -> Projection:
    """R = 0: without an adapter."""
    W = torch.randn(N, K).to(dtype) / K**0.5
    if base != "dense":
        W = int8.quantize(W) if base == "int8" else blockwise.quantize(W, base)
    factors = {}
    if R:
        factors = {"A": (torch.randn(R, K) / K**0.5).to(device, adapter), "B": torch.randn(N, R).to(device, adapter)}
        factors |= {"scale": 0.7, "dropout_p": p, "dropout_key": dropout.new_key(device)}
    return Projection(W.to(device), torch.randn(N, dtype=dtype, device=device), **factors)


def make_case(
    M: int, K: int, N: int, ranks: tuple[int, int, int], dtype: torch.dtype, adapter: torch.dtype, base: str,
    p: float, activation: str = "silu", device: str = "cpu",
) -> MlpCase:  # fmt: skip
    """x [M, K], an inner width of N and an output as wide as x."""
    sizes = {"gate": (N, K), "up": (N, K), "down": (K, N)}
    projections = {
        name: make_projection(*size, R, dtype, adapter, base, p, device)
        for (name, size), R in zip(sizes.items(), ranks)
    }
    x, d_y = (torch.randn(M, K, dtype=dtype, device=device) for _ in range(2))
    return MlpCase(x, projections, activation, d_y)


def autograd_truth(case: MlpCase, convert: Callable[[Tensor], Tensor], product_dtype=None) -> dict[str, Tensor]:
    """The same quantities from the unfused layers in plain torch under its own autograd, inputs through `convert`.

    `product_dtype`: what x and h are cast to before each product, as layers that compute in a dtype of their own do; by
    default nothing is cast but fp32 adapters to x's dtype.
    """
    leaves = {name: convert(t.detach()).requires_grad_() for name, t in case.leaves().items()}

    def layer(name: str, x: Tensor) -> Tensor:
        projection = case.projections[name]
        dtype, z = x.dtype, x if product_dtype is None else x.to(product_dtype)
        W, bias = projection.weight, leaves[f"{name}.bias"].to(z.dtype)
        if not isinstance(W, Tensor):
            W = reference.dequantize(W, z.dtype if case.x.dtype != torch.float64 else torch.float32)
        W = convert(W).to(z.dtype)
        if projection.A is None:
            return F.linear(z, W, bias).to(dtype)
        A, B = (leaves[f"{name}.{part}"].to(z.dtype) for part in "AB")
        p, key = projection.dropout_p, projection.dropout_key
        return reference.lora_linear(z, W, A, B, projection.scale, bias, p, key).to(dtype)

    act = ACTIVATIONS[case.activation]
    y = layer("down", act(layer("gate", leaves["x"])) * layer("up", leaves["x"]))
    grads = torch.autograd.grad(y, list(leaves.values()), convert(case.d_y).to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads))}


def truth(case: MlpCase) -> dict[str, Tensor]:
    """In fp64, on the weights rounded to the dtype of the products, which is the case's own."""
    exact = {}
    for name, projection in case.projections.items():
        weight = projection.weight
        if not isinstance(weight, Tensor):
            weight = reference.dequantize(weight, case.x.dtype)
        exact[name] = projection._replace(weight=weight)
    return autograd_truth(replace(case, projections=exact), Tensor.double)


def check_against_fp64(case: MlpCase, **options) -> None:
    """Output and gradients: the inputs' dtypes, and no worse than 1.5 times plain torch at this dtype."""
    got, by_torch, exact = case.run(**options), autograd_truth(case, lambda t: t), truth(case)
    leaves = case.leaves()
    for name, value in got.items():
        assert value.dtype == (case.x if name == "y" else leaves[name]).dtype, name
        assert_as_accurate_as_torch(name, value, by_torch[name], exact[name], case.x.dtype)
