"""dequantize and quant_matmul: k-bit weights as matrices, and as the frozen factor of a product."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_fast.dispatch import Backend
from peft_fast.quant.weight import DTYPES, Format, QuantizedWeight

from . import plain, routes
from .checks import check_bias, check_device, check_floating
from .library import apply, autocast, define, flatten, resolve, unflatten


def _dequantize_fake(weights: list[Tensor], fmts: str, dtype: torch.dtype, backend: str) -> Tensor:
    forms = [Format.parse(fmt) for fmt in fmts.split(";")]
    return weights[0].new_empty((sum(form.N for form in forms), forms[0].K), dtype=dtype)


@define("dequantize(Tensor[] weights, str fmts, ScalarType dtype, str backend) -> Tensor", _dequantize_fake)
def _dequantize(weights: list[Tensor], fmts: str, dtype: torch.dtype, backend: Backend) -> Tensor:
    """Several weights below each other; `weights` has the tensors of all, `fmts` their formats, divided by ;"""
    if ";" not in fmts:
        return routes.dequantize(QuantizedWeight.from_tensors(weights, Format.parse(fmts)), dtype, backend)
    out, row, first = _dequantize_fake(weights, fmts, dtype, backend), 0, 0
    for fmt in fmts.split(";"):
        form = Format.parse(fmt)
        weight = QuantizedWeight.from_tensors(weights[first : first + form.tensors], form)
        routes.dequantize(weight, dtype, backend, out[row : row + form.N])
        row, first = row + form.N, first + form.tensors
    return out


def dequantize(
    weight: QuantizedWeight | Sequence[QuantizedWeight],
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The weight [N, K] in `dtype` (default: the weight's own): fp32 code * scale, rounded once.

    Of several weights with the same K (siblings that share x), all rows in one matrix [sum of N, K], written in place.

    Bit for bit the same on every backend, and the same as bitsandbytes' `dequantize_4bit` wherever that is right
    (its CPU code is wrong where the block size does not divide K). Not differentiable. Raises TypeError for a dtype
    that is not float32, float16 or bfloat16, ValueError for weights that do not fit under each other.
    """
    weights = [weight] if isinstance(weight, QuantizedWeight) else list(weight)
    if len({(w.shape[1], w.device) for w in weights}) != 1:
        raise ValueError(f"weights must have one K and one device, got {[(w.shape, str(w.device)) for w in weights]}")
    dtype = dtype or weights[0].dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {DTYPES}, got {dtype}: dequantise to float32 and convert the result")
    tensors = [tensor for w in weights for tensor in w.tensors()]
    return _dequantize(tensors, ";".join(str(w.format) for w in weights), dtype, resolve(backend))


def _quant_matmul_fake(x: Tensor, weight: list[Tensor], fmt: str, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], Format.parse(fmt).N))


@define(
    "quant_matmul(Tensor x, Tensor[] weight, str fmt, Tensor? bias, str backend) -> Tensor",
    _quant_matmul_fake,
)
def _quant_matmul(x: Tensor, weight: list[Tensor], fmt: str, bias: Tensor | None, backend: Backend) -> Tensor:
    return routes.product(x, unflatten(weight, fmt), bias, backend)


def _quant_matmul_dx_fake(dy: Tensor, weight: list[Tensor], fmt: str, backend: str) -> Tensor:
    return dy.new_empty((dy.shape[0], Format.parse(fmt).K))


@define("quant_matmul_dx(Tensor dy, Tensor[] weight, str fmt, str backend) -> Tensor", _quant_matmul_dx_fake)
def _quant_matmul_dx(dy: Tensor, weight: list[Tensor], fmt: str, backend: Backend) -> Tensor:
    return routes.product_dx(dy, unflatten(weight, fmt), backend)


class _QuantMatmul(torch.autograd.Function):
    """Keeps nothing but references to the weight's own tensors; the dequantised weight is made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, fmt: str, backend: str, *weight: Tensor) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.fmt, ctx.backend = fmt, backend
        return _quant_matmul(x, list(weight), fmt, bias, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        weight = list(ctx.saved_tensors)
        dx: Tensor | None = None
        if ctx.needs_input_grad[0] and plain.is_differentiated_again():
            dx = dy @ plain.dense(weight, ctx.fmt, dy.dtype)
        elif ctx.needs_input_grad[0]:
            dx = _quant_matmul_dx(dy, weight, ctx.fmt, ctx.backend)
        dbias = dy.sum(0) if ctx.needs_input_grad[1] else None
        return dx, dbias, None, None, *(None for _ in weight)


def quant_matmul(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias, in x's dtype; differentiable in x and bias, saves neither x nor W.

    Under autocast x is cast first. Raises ValueError where x does not have K columns, TypeError for integers.
    """
    check_floating(x=x)
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"x must have K={K} features for a weight of shape {weight.shape}, got {tuple(x.shape)}")
    check_bias(bias, N)
    check_device(x, weight=weight.data, bias=bias)
    x = autocast(x)
    tensors, fmt = flatten(weight)
    if plain.is_transformed():
        return plain.linear(x, None, None, bias, 1.0, 0.0, None, x.dtype, fmt, *tensors)
    y = apply(_QuantMatmul, x.reshape(-1, K), bias, fmt, resolve(backend), *tensors)
    return y.view(*x.shape[:-1], N)
