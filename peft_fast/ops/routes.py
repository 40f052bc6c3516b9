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
    trained: bool  # A or B want gradients, now or when a checkpoint runs this forward again
    backend: Backend
    route: Route

    def call(self, x: Tensor) -> table.Call:
        """What table.py is asked about, for x [M, K] in the dtype of the product: the same in forward and backward."""
        (N, K), R = self.weight.shape, self.A.shape[0]
        fmt = str(self.weight.format) if isinstance(self.weight, QuantizedWeight) else ""
        return table.Call(x.device, x.dtype, x.shape[0], N, K, R, fmt, self.p, self.trained)


def dequantize(weight: QuantizedWeight, dtype, backend: Backend, out: Tensor | None = None) -> Tensor:
    """W [N, K] in `dtype`, by whoever table.dequantization names; into `out`, if given."""
    choice = table.dequantization(backend, weight.device, dtype, str(weight.format))
    if choice.backend == "bitsandbytes":
        W = bitsandbytes_kernels.dequantize(weight, dtype)
        return W if out is None else out.copy_(W)
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
        if choice.route == "bitsandbytes" and weight.data.data_ptr() % 16 == 0:  # it reads 16 bytes at a time
            return bitsandbytes_kernels.matmul(x, weight, bias)
    return F.linear(x, materialize(weight, x.dtype, backend), bias)


def product_dx(
    dy: Tensor, weight: Tensor | QuantizedWeight, backend: Backend, added_to: Tensor | None = None
) -> Tensor:
    """dx [M, K] = dy [M, N] @ W, by whoever table.product_dx names; `added_to`, in place, if given."""
    if isinstance(weight, QuantizedWeight):
        call = table.Call(dy.device, dy.dtype, dy.shape[0], *weight.shape, fmt=str(weight.format))
        choice = table.product_dx(call, backend)
        if choice.route == "fused":
            return _sum(implementation(choice).quant_matmul_dx(dy, weight), added_to)
    return _product(dy, materialize(weight, dy.dtype, backend), added_to)


def _product(dy: Tensor, W: Tensor, added_to: Tensor | None) -> Tensor:
    return dy @ W if added_to is None else added_to.addmm_(dy, W)


def _sum(dx: Tensor, added_to: Tensor | None) -> Tensor:
    return dx if added_to is None else added_to.add_(dx)


def forward(x: Tensor, bias: Tensor | None, lora: Lora) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, R]) for x [M, K] in the dtype of the product. Merging leaves s for the backward to compute."""
    choice = table.linear(lora.call(x), lora.backend, lora.route)
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
    dy: Tensor, x: Tensor, s: Tensor, lora: Lora, needs: tuple[bool, bool, bool], dx: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx [M, K], dA [R, K], dB [N, R]), each None where `needs` = (x, A, B) does not ask for it.

    `dx`: another layer's gradient of the same x, which this one is added to, in place.
    """
    choice = table.linear_backward(lora.call(x), lora.backend, lora.route)
    run, (needs_dx, needs_dA, needs_dB) = implementation(choice), needs
    if choice.route == "merge":
        dx = _merged_dx(run, dy, lora, dx) if needs_dx else None
        return dx, *backward_from_x(dy, x, None, None, lora, (needs_dA, needs_dB))
    ds, dB = _up(run, dy, s, lora, needs_dx or needs_dA, needs_dB)
    if needs_dx and choice.route == "fused":
        dx = _sum(run.quant_matmul_dx(dy, lora.weight, ds, lora.A, lora.p, lora.key), dx)
        return dx, *backward_from_x(dy, x, ds, dB, lora, (needs_dA, needs_dB))
    dx = product_dx(dy, lora.weight, lora.backend, dx) if needs_dx else None
    dA = None
    if needs_dA or needs_dx:  # one pass over x gives dA and adds LoRA's part to dx
        dA = run.lora_down_backward(ds, x, lora.A, lora.p, lora.key, dx, needs_dA)
    return dx, dA, dB


def backward_to_x(
    dy: Tensor, s: Tensor, lora: Lora, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, ds, dB): the first half of `backward`, for an x that can be had again only with dx (as in mlp.py).

    ds and dB may be None although they are needed: backward_from_x then computes them.
    """
    choice = table.linear_backward(lora.call(dy), lora.backend, lora.route)
    run, (needs_dx, needs_dA, needs_dB) = implementation(choice), needs
    if choice.route == "merge":
        return _merged_dx(run, dy, lora) if needs_dx else None, None, None
    ds, dB = _up(run, dy, s, lora, needs_dx or needs_dA, needs_dB)
    if not needs_dx:
        return None, ds, dB
    if choice.route == "fused":
        return run.quant_matmul_dx(dy, lora.weight, ds, lora.A, lora.p, lora.key), ds, dB
    dx = product_dx(dy, lora.weight, lora.backend)
    run.lora_down_backward(ds, dx, lora.A, lora.p, lora.key, dx, needs_dA=False)
    return dx, ds, dB


def backward_from_x(
    dy: Tensor, x: Tensor, ds: Tensor | None, dB: Tensor | None, lora: Lora, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dA, dB), None where `needs` does not ask for it: the second half."""
    choice = table.linear_backward(lora.call(x), lora.backend, lora.route)
    run, (needs_dA, needs_dB) = implementation(choice), needs
    if choice.route == "merge":
        s = run.lora_down(x, lora.A) if needs_dB else x.new_empty(x.shape[0], lora.A.shape[0])
        ds, dB = _up(run, dy, s, lora, needs_dA, needs_dB)
    dA = run.lora_down_backward(ds, x, lora.A, lora.p, lora.key) if needs_dA else None
    return dA, dB


def down_again(x: Tensor, lora: Lora) -> Tensor:
    """s [M, R] as `forward` gives it to `backward`; merging needs none."""
    choice = table.linear_backward(lora.call(x), lora.backend, lora.route)
    if choice.route == "merge":
        return x.new_empty(x.shape[0], lora.A.shape[0])
    return implementation(choice).lora_down(x, lora.A, lora.p, lora.key)


def _merged_dx(run, dy: Tensor, lora: Lora, added_to: Tensor | None = None) -> Tensor:
    assert isinstance(lora.weight, QuantizedWeight)
    merged, _ = run.dequantize_merge(lora.weight, lora.A, lora.B, lora.scale, dy.dtype)
    return _product(dy, merged, added_to)


def _up(run, dy: Tensor, s: Tensor, lora: Lora, needs_ds: bool, needs_dB: bool) -> tuple[Tensor | None, Tensor | None]:
    if not (needs_ds or needs_dB):
        return None, None
    return run.lora_up_backward(dy, s, lora.B, lora.scale, needs_ds, needs_dB)
