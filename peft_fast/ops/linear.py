"""lora_linear: a frozen linear layer, dense or 4-bit, and its LoRA adapter as one differentiable function.

Routes, of which one is chosen inside the op (dispatch.py):

    split       y = x @ W.T + bias by cuBLAS, then lora_down and lora_up_add_ in Triton
    reference   the same three steps in plain torch

Kept for backward: x as it came (its cast under autocast), s [M, R], the dropout key; never W, a mask, or a fp32 copy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_fast.dispatch import Backend, Choice, Op
from peft_fast.quant.weight import QuantizedWeight

from .checks import check_bias, check_device, check_dropout
from .library import autocast, autocasting, define, flatten, implementation, resolve, unflatten, weight_shape
from .quant import materialize


def _why_not(dtype: torch.dtype) -> str | None:
    from peft_fast.kernels import lora_down, lora_up_add

    return lora_down.why_not(dtype) or lora_up_add.why_not(dtype)


LORA_LINEAR = Op("lora_linear", "split", _why_not)


def choose(x_dtype: torch.dtype, device: torch.device, backend: str | None = None) -> Choice:
    """The route that lora_linear takes for x of this dtype on this device, with the reason."""
    return LORA_LINEAR.choose(resolve(backend), device, x_dtype)


def _forward_fake(x, weight, fmt, bias, A, B, scale, p, key, backend):
    M = x.shape[0]
    return x.new_empty((M, weight_shape(weight, fmt)[0])), x.new_empty((M, A.shape[0]))


@define(
    "lora_linear(Tensor x, Tensor[] weight, str fmt, Tensor? bias, Tensor A, Tensor B, float scale, float p, "
    "Tensor? key, str backend) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward(
    x: Tensor,
    weight: list[Tensor],
    fmt: str,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    key: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, R])"""
    run = implementation(LORA_LINEAR.choose(backend, x.device, x.dtype))
    W = materialize(unflatten(weight, fmt), x.dtype, backend)
    y = F.linear(x, W, None if bias is None else bias.to(x.dtype))
    s = run.lora_down(x, A, p, key)
    run.lora_up_add_(y, s, B, scale)
    return y, s


def _backward_fake(dy, x, s, weight, fmt, A, B, scale, p, key, needs, backend):
    like = [t.new_empty(t.shape if need else (0,)) for t, need in zip((x, A, B), needs)]
    return tuple(like)


@define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor s, Tensor[] weight, str fmt, Tensor A, Tensor B, float scale, "
    "float p, Tensor? key, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: list[Tensor],
    fmt: str,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    key: Tensor | None,
    needs: list[bool],
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [M, K], dA [R, K], dB [N, R]); an empty tensor for each that `needs` = (x, A, B) does not ask for."""
    run = implementation(LORA_LINEAR.choose(backend, x.device, x.dtype))
    needs_dx, needs_dA, needs_dB = needs
    ds, dB = run.lora_up_backward(dy, s, B, scale, needs_dx or needs_dA, needs_dB)
    dx = dy @ materialize(unflatten(weight, fmt), dy.dtype, backend) if needs_dx else None
    dA = run.lora_down_backward(ds, x, A, p, key, dx, needs_dA) if needs_dx or needs_dA else None
    return tuple(t.new_empty(0) if g is None else g for g, t in ((dx, x), (dA, A), (dB, B)))  # type: ignore[return-value]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scale: float,
        p: float,
        key: Tensor | None,
        fmt: str,
        backend: str,
        *weight: Tensor,
    ) -> Tensor:
        y, s = _forward(x, list(weight), fmt, bias, A, B, scale, p, key, backend)
        ctx.save_for_backward(x, s, A, B, key, *weight)
        ctx.scale, ctx.p, ctx.fmt, ctx.backend = scale, p, fmt, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        x, s, A, B, key, *weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        grads: list[Tensor | None] = [None, None, None]
        if any(needs):
            out = _backward(dy, x, s, weight, ctx.fmt, A, B, ctx.scale, ctx.p, key, needs, ctx.backend)
            grads = [g if need else None for g, need in zip(out, needs)]
        dbias = dy.sum(0) if ctx.needs_input_grad[3] else None
        # The base is frozen as a rule; who unfreezes a dense one gets its gradient.
        dW = (dy.t() @ x).to(weight[0].dtype) if ctx.needs_input_grad[9] else None
        return *grads, dbias, None, None, None, None, None, dW, *(None for _ in weight[1:])


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias + scale * dropout(x) @ A.T @ B.T     (LoRA, arXiv 2106.09685)

    weight  W [N, K] in x's dtype (any float dtype under autocast), or a QuantizedWeight
    A, B    [R, K] and [N, R], in x's dtype or in fp32: then their gradients are fp32 and x is still not copied
    scale   multiplies the adapter's output: alpha / r, or alpha / sqrt(r) for rsLoRA
    dropout_p, dropout_key   probability in [0, 1], rounded to 1/65536, and new_dropout_key(x.device)
    backend "auto" | "triton" | "torch"; None: the process's (dispatch.use_backend)

    Differentiable in x, A, B, bias and a dense weight. Under autocast x is cast to autocast's dtype first. Raises
    ValueError for shapes that do not fit, TypeError for dtypes that do not, TritonUnsupported where Triton was asked
    for by name and cannot take the call.
    """
    x = autocast(x)
    tensors, fmt = flatten(weight)
    N, K = weight.shape
    R = A.shape[0]
    if x.shape[-1] != K:
        raise ValueError(f"x must have K={K} features for a weight of shape {(N, K)}, got {tuple(x.shape)}")
    if A.shape != (R, K) or B.shape != (N, R):
        raise ValueError(f"A must be [R, {K}] and B [{N}, R], got {tuple(A.shape)} and {tuple(B.shape)}")
    if not fmt and tensors[0].dtype != x.dtype and not autocasting(x.device.type):
        raise TypeError(
            f"x is {x.dtype} but the weight is {tensors[0].dtype}: cast one of them, or run under torch.autocast"
        )
    check_bias(bias, N)
    check_dropout(dropout_p, dropout_key)
    check_device(x, weight=tensors[0], A=A, B=B, bias=bias, dropout_key=dropout_key)
    y = _LoraLinear.apply(
        x.reshape(-1, K),
        A,
        B,
        bias,
        scale,
        dropout_p,
        dropout_key if dropout_p else None,
        fmt,
        resolve(backend),
        *tensors,
    )
    return y.view(*x.shape[:-1], N)
