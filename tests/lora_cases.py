"""LoRA linear layers to try: random cases, and the comparison of all outputs and gradients with fp64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_fast import ops
from peft_fast.kernels import dropout, reference
from peft_fast.quant import blockwise, int8
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.testing import assert_as_accurate_as_torch

GRADIENTS = ("x", "A", "B", "bias")


@dataclass
class LoraCase:
    x: Tensor  # [M, K]
    weight: Tensor | QuantizedWeight  # [N, K]
    bias: Tensor
    A: Tensor
    B: Tensor
    scale: float
    p: float
    key: Tensor
    d_y: Tensor

    @property
    def quantized(self) -> bool:
        return isinstance(self.weight, QuantizedWeight)

    def weight_tensors(self) -> list[Tensor]:
        return self.weight.tensors() if isinstance(self.weight, QuantizedWeight) else [self.weight]

    def leaves(self, needs: Sequence[str] = GRADIENTS) -> dict[str, Tensor]:
        """Fresh leaves of the case's tensors; those in `needs` require a gradient."""
        names = ("x", "A", "B", "bias") if self.quantized else ("x", "A", "B", "bias", "weight")
        return {n: getattr(self, n).detach().requires_grad_(n in needs) for n in names}

    def call(self, backend: str, leaves: dict[str, Tensor], route: str | None = None) -> Tensor:
        weight = leaves.get("weight", self.weight)
        return ops.lora_linear(
            leaves["x"], weight, leaves["A"], leaves["B"], self.scale, leaves["bias"],
            dropout_p=self.p, dropout_key=self.key, backend=backend, route=route,
        )  # fmt: skip

    def run(self, backend: str, needs: Sequence[str] = GRADIENTS, route: str | None = None) -> dict[str, Tensor]:
        """{"y": output, name: gradient for each name in needs}"""
        leaves = self.leaves(needs)
        y = self.call(backend, leaves, route)
        grads = torch.autograd.grad(y, [leaves[n] for n in needs], self.d_y.to(y.dtype))
        return {"y": y.detach(), **dict(zip(needs, grads))}


def make_case(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, adapter: torch.dtype, base: str, p: float, device: str = "cpu"
) -> LoraCase:
    W = torch.randn(N, K) / K**0.5
    if base == "dense":
        weight: Tensor | QuantizedWeight = W.to(dtype)
    else:
        weight = int8.quantize(W.to(dtype)) if base == "int8" else blockwise.quantize(W.to(dtype), base)
    return LoraCase(
        x=torch.randn(M, K, dtype=dtype, device=device),
        weight=weight.to(device),
        bias=torch.randn(N, dtype=dtype, device=device),
        A=(torch.randn(R, K) / K**0.5).to(device, adapter),
        B=torch.randn(N, R).to(device, adapter),
        scale=1.7,
        p=p,
        key=dropout.new_key(device),
        d_y=torch.randn(M, N, dtype=dtype, device=device),
    )


def autograd_truth(
    case: LoraCase, convert: Callable[[Tensor], Tensor], under_autocast: bool = False
) -> dict[str, Tensor]:
    """The same quantities from plain torch under its own autograd, all inputs passed through `convert`.

    Without autocast fp32 adapters are rounded to x's dtype first, as a user of plain torch would have to.
    """
    leaves = {n: convert(t.detach()).requires_grad_() for n, t in case.leaves().items() if n != "weight"}
    W = case.weight if not case.quantized else reference.dequantize(case.weight, case.x.dtype)
    x, A, B = leaves["x"], leaves["A"], leaves["B"]
    if not under_autocast:
        A, B = A.to(x.dtype), B.to(x.dtype)
    y = reference.lora_linear(x, convert(W), A, B, case.scale, leaves["bias"], case.p, case.key)
    grads = torch.autograd.grad(y, list(leaves.values()), convert(case.d_y).to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads))}


def check_against_fp64(case: LoraCase, backend: str, route: str | None = None) -> None:
    """Outputs and gradients: the inputs' dtypes, and no worse than 1.5 times plain torch at this dtype.

    Route merge in fp32 is granted 4 times: the merged weight is rounded to fp32, which in torch's fp32 product nothing
    is. `auto` merges 16-bit products only.
    """
    factor = 4.0 if route == "merge" and case.x.dtype == torch.float32 else 1.5
    got = case.run(backend, route=route)
    by_torch = autograd_truth(case, lambda t: t)
    truth = autograd_truth(case, Tensor.double)
    for name, value in got.items():
        assert value.dtype == (case.x if name == "y" else getattr(case, name)).dtype, name
        assert_as_accurate_as_torch(name, value, by_torch[name], truth[name], case.x.dtype, factor)
