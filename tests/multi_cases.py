"""Batches of many adapters to try: random cases, and the comparison of all outputs and gradients with fp64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast import ops
from peft_fast.kernels import reference, reference_multi
from peft_fast.kernels.segments import Drop, Segments, of_rows
from peft_fast.quant import blockwise, int8
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.testing import assert_as_accurate_as_torch


@dataclass
class MultiCase:
    x: Tensor  # [M, K]
    weight: Tensor | QuantizedWeight | None  # [N, K]
    bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    scales: list[float]
    segments: Segments
    p: list[float]
    keys: Tensor  # int32 [T, 2]
    d_y: Tensor

    def leaves(self) -> list[Tensor]:
        """x, the A_t, the B_t, the bias: fresh leaves that require gradients."""
        tensors = [self.x, *self.A, *self.B, *([] if self.bias is None else [self.bias])]
        return [t.detach().requires_grad_() for t in tensors]

    def names(self) -> list[str]:
        T = range(len(self.A))
        return ["x", *(f"A{t}" for t in T), *(f"B{t}" for t in T), *([] if self.bias is None else ["bias"])]

    def run(self, backend: str, needs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """{"y": output, name: gradient for each name in `needs`, default all}"""
        named = dict(zip(self.names(), self.leaves()))
        needs = list(named) if needs is None else needs
        for name, leaf in named.items():
            leaf.requires_grad_(name in needs)
        T = range(len(self.A))
        adapters = ops.Adapters([named[f"A{t}"] for t in T], [named[f"B{t}"] for t in T], self.scales, self.p)
        y = ops.lora_linear_multi(
            named["x"], self.weight, adapters, self.segments, named.get("bias"), dropout_keys=self.keys, backend=backend
        )
        grads = torch.autograd.grad(y, [named[n] for n in needs], self.d_y) if needs else []
        return {"y": y.detach(), **dict(zip(needs, grads))}


def make_case(
    adapter: Sequence[int],
    ranks: Sequence[int],
    K: int = 64,
    N: int = 48,
    dtype: torch.dtype = torch.float32,
    factors: torch.dtype | None = None,
    base: str | None = "dense",
    p: Sequence[float] = (0.0,),
    device: str = "cpu",
) -> MultiCase:
    """adapter: of each row, -1 for none; ranks: of each adapter; p: dropouts, in turn; base: None for no base layer."""
    factors, M, T = factors or dtype, len(adapter), len(ranks)
    weight: Tensor | QuantizedWeight | None = None
    if base is not None:
        W = (torch.randn(N, K) / K**0.5).to(dtype)
        weight = W if base == "dense" else int8.quantize(W) if base == "int8" else blockwise.quantize(W, base)
        weight = weight.to(device)
    return MultiCase(
        x=torch.randn(M, K, dtype=dtype, device=device),
        weight=weight,
        bias=None if base is None else torch.randn(N, dtype=dtype, device=device),
        A=[(torch.randn(R, K) / K**0.5).to(device, factors) for R in ranks],
        B=[torch.randn(N, R).to(device, factors) for R in ranks],
        scales=[(1.0, 1.7, -0.3)[t % 3] for t in range(T)],
        segments=of_rows(torch.tensor(adapter, dtype=torch.int64, device=device), T),
        p=[p[t % len(p)] for t in range(T)],
        keys=torch.randint(-(1 << 31), (1 << 31) - 1, (T, 2), dtype=torch.int32).to(device),
        d_y=torch.randn(M, N, dtype=dtype, device=device),
    )


def autograd_truth(case: MultiCase, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The same from plain torch, one adapter after the other, all inputs passed through `convert`; factors are rounded
    to x's dtype first."""
    leaves = [convert(leaf.detach()).requires_grad_() for leaf in case.leaves()]
    T = len(case.A)
    rounded = [t.to(case.x.dtype).to(t.dtype) if t.dtype == torch.float64 else t.to(leaves[0].dtype) for t in leaves]
    x, A, B = rounded[0], rounded[1 : T + 1], rounded[T + 1 : 2 * T + 1]
    y = reference_multi.lora_multi(x, A, B, case.scales, case.segments, Drop(case.p, case.keys))
    if case.weight is not None:
        W = case.weight if isinstance(case.weight, Tensor) else reference.dequantize(case.weight, case.x.dtype)
        y = (y if T else 0) + F.linear(x, convert(W), rounded[-1])
    grads = torch.autograd.grad(y, leaves, convert(case.d_y).to(y.dtype), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(case.names(), grads))}


def check_against_fp64(case: MultiCase, backend: str) -> None:
    """Outputs and gradients: the inputs' dtypes, and no worse than 1.5 times plain torch at this dtype. An adapter with
    one row may have torch lucky in one sum: 1 eps is granted."""
    got = case.run(backend)
    by_torch = autograd_truth(case, lambda t: t)
    truth = autograd_truth(case, Tensor.double)
    dtypes = dict(zip(["y", *case.names()], [case.x.dtype, *(leaf.dtype for leaf in case.leaves())]))
    for name, value in got.items():
        assert value.dtype == dtypes[name], name
        assert_as_accurate_as_torch(name, value, by_torch[name], truth[name], case.x.dtype, eps=1.0)


def check_to_1e_5(case: MultiCase, backend: str) -> None:
    """In fp32: no output or gradient is further from fp64 than 1e-5, or that part of the largest one. For cases that
    nobody has looked at, where one element may hang on a sum in which torch is lucky."""
    got, truth = case.run(backend), autograd_truth(case, Tensor.double)
    for name, value in got.items():
        assert value.shape == truth[name].shape, name
        if value.numel():
            distance = (value.double() - truth[name]).abs().max().item()
            assert distance <= 1e-5 * max(1.0, truth[name].abs().max().item()), (name, distance)
