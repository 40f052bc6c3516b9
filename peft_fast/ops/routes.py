"""The steps of each route, forward and backward, on plain tensors: no autograd, no checks. table.py picks the route.

    route   forward                                        backward
    split   y = x @ W.T + bias; s = lora_down(x)           ds, dB = lora_up_backward(dy, s); dx = dy @ W
            lora_up_add_(y, s)                             dA = lora_down_backward(ds, x), which adds to dx
    fused   s = lora_down(x)                               ds, dB; dx = quant_matmul_dx(dy, W, ds, A)
            y = quant_matmul(x, W, bias, s, B)             dA = lora_down_backward(ds, x)
    merge   W' = dequantize_merge(W, A, B)                 s = lora_down(x); ds, dB; W' again; dx = dy @ W'
            y = x @ W'.T + bias                            dA = lora_down_backward(ds, x)

`reference` is split in plain torch. W of a k-bit base is written out for one product and freed after it.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from peft_fast.dispatch import Backend, Route
from peft_fast.quant import bitsandbytes_kernels
from peft_fast.quant.weight import QuantizedWeight

from . import table
from .library import implementation


@dataclass(frozen=True)
class Lora:
    """A linear layer and its adapter, as a route takes them."""

    weight: Tensor | QuantizedWeight  # [N, K]
    A: Tensor  # [R, K]
    B: Tensor  # [N, R]
    scale: float
    p: float  # dropout
    key: Tensor | None
    backend: Backend
    route: Route

    def call(self, x: Tensor, training: bool) -> table.Call:
        """What table.py is asked about, for x [M, K] in the dtype of the product."""
        (N, K), R = self.weight.shape, self.A.shape[0]
        fmt = str(self.weight.format) if isinstance(self.weight, QuantizedWeight) else ""
        return table.Call(x.device, x.dtype, x.shape[0], N, K, R, fmt, self.p, training)


def dequantize(weight: QuantizedWeight, dtype, backend: Backend, out: Tensor | None = None) -> Tensor:
    """W [N, K] in `dtype`, by whoever table.dequantization names."""
    choice = table.dequantization(backend, weight.device, dtype, str(weight.format))
    if choice.backend == "bitsandbytes" and out is None:
        return bitsandbytes_kernels.dequantize(weight, dtype)
    return implementation(choice).dequantize(weight, dtype, out)


def materialize(weight: Tensor | QuantizedWeight, dtype, backend: Backend) -> Tensor:
    """W [N, K] in `dtype`: dequantised, or cast where it has another one."""
    return weight.to(dtype) if isinstance(weight, Tensor) else dequantize(weight, dtype, backend)


def product(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, backend: Backend) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias, by whoever table.product names."""
    bias = None if bias is None else bias.to(x.dtype)
    if isinstance(weight, QuantizedWeight):
        call = table.Call(x.device, x.dtype, x.shape[0], *weight.shape, fmt=str(weight.format))
        choice = table.product(call, backend)
        if choice.route == "fused":
            return implementation(choice).quant_matmul(x, weight, bias)
        if choice.route == "bitsandbytes":
            return bitsandbytes_kernels.matmul(x, weight, bias)
    return F.linear(x, materialize(weight, x.dtype, backend), bias)


def product_dx(dy: Tensor, weight: Tensor | QuantizedWeight, backend: Backend) -> Tensor:
    """dx [M, K] = dy [M, N] @ W, by whoever table.product_dx names."""
    if isinstance(weight, QuantizedWeight):
        call = table.Call(dy.device, dy.dtype, dy.shape[0], *weight.shape, fmt=str(weight.format))
        choice = table.product_dx(call, backend)
        if choice.route == "fused":
            return implementation(choice).quant_matmul_dx(dy, weight)
    return dy @ materialize(weight, dy.dtype, backend)


def forward(x: Tensor, bias: Tensor | None, lora: Lora, training: bool) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, R]) for x [M, K] in the dtype of the product. Merging leaves s for the backward to compute."""
    choice = table.linear(lora.call(x, training), lora.backend, lora.route)
    run, W = implementation(choice), lora.weight
    if choice.route == "merge":
        assert isinstance(W, QuantizedWeight)
        merged, _ = run.dequantize_merge(W, lora.A, lora.B, lora.scale, x.dtype)
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype)), x.new_empty(x.shape[0], lora.A.shape[0])
    s = run.lora_down(x, lora.A, lora.p, lora.key)
    if choice.route == "fused":
        return run.quant_matmul(x, W, bias, s, lora.B, lora.scale), s
    y = product(x, W, bias, lora.backend)
    run.lora_up_add_(y, s, lora.B, lora.scale)
    return y, s


def backward(
    dy: Tensor, x: Tensor, s: Tensor, lora: Lora, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx [M, K], dA [R, K], dB [N, R]), each None where `needs` = (x, A, B) does not ask for it."""
    choice = table.linear_backward(lora.call(x, training=True), lora.backend, lora.route)
    run, W, (needs_dx, needs_dA, needs_dB) = implementation(choice), lora.weight, needs
    dx: Tensor | None = None
    if choice.route == "merge":
        if needs_dB:
            s = run.lora_down(x, lora.A)
        ds, dB = _up(run, dy, s, lora, needs_dA, needs_dB)
        if needs_dx:
            assert isinstance(W, QuantizedWeight)
            dx = dy @ run.dequantize_merge(W, lora.A, lora.B, lora.scale, dy.dtype)[0]
        return dx, run.lora_down_backward(ds, x, lora.A) if needs_dA else None, dB
    ds, dB = _up(run, dy, s, lora, needs_dx or needs_dA, needs_dB)
    added_to = None
    if needs_dx and choice.route == "fused":
        dx = run.quant_matmul_dx(dy, W, ds, lora.A, lora.p, lora.key)
    elif needs_dx:
        dx = added_to = product_dx(dy, W, lora.backend)
    dA = None
    if needs_dA or added_to is not None:
        dA = run.lora_down_backward(ds, x, lora.A, lora.p, lora.key, added_to, needs_dA)
    return dx, dA, dB


def _up(run, dy: Tensor, s: Tensor, lora: Lora, needs_ds: bool, needs_dB: bool) -> tuple[Tensor | None, Tensor | None]:
    if not (needs_ds or needs_dB):
        return None, None
    return run.lora_up_backward(dy, s, lora.B, lora.scale, needs_ds, needs_dB)
