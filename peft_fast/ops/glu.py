"""glu: h = act(g) * u, the middle of a gated MLP, for who calls its layers one by one: lora_mlp (mlp.py) has it inside.

Kept for backward: g and u, not act(g). The kernels compute in fp32 and round once; torch rounds act(g) too.
"""

from typing import Any

import torch
from torch import Tensor

from peft_fast.dispatch import Backend, Op

from . import plain
from .checks import check_device, check_floating
from .library import apply, define, implementation, resolve

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def _why_not(dtype: torch.dtype) -> str | None:
    from peft_fast.kernels import glu

    return glu.why_not(dtype)


GLU = Op("glu", "triton", _why_not, needs_dot=False)


def _run(g: Tensor, backend: Backend) -> Any:
    return implementation(GLU.choose(backend, g.device, g.dtype))


@define(
    "glu(Tensor g, Tensor u, str activation, str backend) -> Tensor",
    lambda g, u, activation, backend: g.new_empty(g.shape),
)
def _forward(g: Tensor, u: Tensor, activation: str, backend: Backend) -> Tensor:
    """h [M, F]"""
    return _run(g, backend).glu(g, u, activation)


@define(
    "glu_backward(Tensor dh, Tensor g, Tensor u, str activation, str backend) -> (Tensor, Tensor)",
    lambda dh, g, u, activation, backend: (g.new_empty(g.shape), u.new_empty(u.shape)),
)
def _backward(dh: Tensor, g: Tensor, u: Tensor, activation: str, backend: Backend) -> tuple[Tensor, Tensor]:
    """(dg, du)"""
    dg, du, _ = _run(g, backend).glu_backward_(dh.clone(memory_format=torch.contiguous_format), g, u, activation)
    return dg, du


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, activation: str, backend: Backend) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.settings = activation, backend
        return _forward(g, u, activation, backend)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple:  # type: ignore[override]
        g, u = ctx.saved_tensors
        if plain.is_differentiated_again():

            def call(g: Tensor, u: Tensor) -> Tensor:
                return plain.glu(g, u, ctx.settings[0])

            return *plain.gradients(call, [g, u], ctx.needs_input_grad[:2], [dh]), None, None
        return *_backward(dh, g, u, *ctx.settings), None, None


def glu(g: Tensor, u: Tensor, activation: str, *, backend: str | None = None) -> Tensor:
    """h = act(g) * u in their dtype, for g and u of one shape [..., F]; differentiable in both.

    activation: "silu" (SwiGLU, arXiv 2002.05202), "gelu" (by erf) or "gelu_tanh". Raises ValueError for other names and
    shapes, TypeError for other dtypes.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_floating(g=g, u=u)
    check_device(g, u=u)
    if g.shape != u.shape or g.dtype != u.dtype:
        raise ValueError(f"g and u must be alike, got {tuple(g.shape)} {g.dtype} and {tuple(u.shape)} {u.dtype}")
    if plain.is_transformed():
        return plain.glu(g, u, activation)
    F = g.shape[-1]
    return apply(_Glu, g.reshape(-1, F), u.reshape(-1, F), activation, resolve(backend)).view(g.shape)
