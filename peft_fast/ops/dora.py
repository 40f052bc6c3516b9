"""DoRA on top of lora_linear: the norms of the rows of a merged weight that is never made, and the scaling by them."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peft_fast.dispatch import Backend, Op
from peft_fast.kernels import reference_dora
from peft_fast.quant.weight import QuantizedWeight

from . import plain
from .checks import check_bias, check_device, check_floating
from .library import apply, define, resolve
from .quant import dequantize, quant_matmul

ROWS = 1024  # of a k-bit weight: how much of it row_squares widens to fp32 at a time


def _why_not(dtype: torch.dtype, factor_dtype: torch.dtype) -> str | None:
    from peft_fast.kernels import scale_columns

    return scale_columns.why_not(dtype, factor_dtype)


SCALE_COLUMNS = Op("scale_columns", "triton", _why_not, needs_dot=False)


def _implementation(backend: Backend, z: Tensor, factor: Tensor) -> ModuleType:
    if SCALE_COLUMNS.choose(backend, z.device, z.dtype, factor.dtype).backend == "torch":
        return reference_dora
    from peft_fast.kernels import scale_columns

    return scale_columns


@define(
    "scale_columns(Tensor z, Tensor factor, Tensor? bias, str backend) -> Tensor",
    lambda z, factor, bias, backend: z.new_empty(z.shape),
)
def _scale(z: Tensor, factor: Tensor, bias: Tensor | None, backend: Backend) -> Tensor:
    return _implementation(backend, z, factor).scale_columns(z, factor, bias)


@define(
    "scale_columns_backward(Tensor dy, Tensor z, Tensor factor, bool[] needs, str backend) -> (Tensor, Tensor)",
    lambda dy, z, factor, needs, backend: tuple(
        t.new_empty(t.shape if n else (0,)) for t, n in zip((dy, factor), needs)
    ),
)
def _scale_backward(
    dy: Tensor, z: Tensor, factor: Tensor, needs: list[bool], backend: Backend
) -> tuple[Tensor, Tensor]:
    dz, dfactor = _implementation(backend, z, factor).scale_columns_backward(dy, z, factor, *needs)
    return dy.new_empty(0) if dz is None else dz, factor.new_empty(0) if dfactor is None else dfactor


class _ScaleColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(z, factor)
        ctx.bias_dtype, ctx.backend = None if bias is None else bias.dtype, backend
        return _scale(z, factor, bias, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        z, factor = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        grads: list[Tensor | None] = [None, None]
        if plain.is_differentiated_again():
            grads = plain.gradients(lambda z, factor: plain.scale_columns(z, factor, None), [z, factor], needs, [dy])
        elif any(needs):
            out = _scale_backward(dy, z, factor, needs, ctx.backend)
            grads = [g if need else None for g, need in zip(out, needs)]
        return *grads, dy.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None, None


def scale_columns(z: Tensor, factor: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y [..., N] = z [..., N] * factor [N] + bias [N], in z's dtype; the product and the sum in factor's, rounded once.

    Differentiable in z, factor and bias; keeps z. Raises ValueError for shapes that do not fit.
    """
    check_floating(z=z, factor=factor)
    N = z.shape[-1]
    if factor.shape != (N,):
        raise ValueError(f"factor must be [{N}], one value a feature, got {tuple(factor.shape)}")
    check_bias(bias, N)
    check_device(z, factor=factor, bias=bias)
    if plain.is_transformed():
        return plain.scale_columns(z, factor, bias)
    return apply(_ScaleColumns, z.reshape(-1, N), factor, bias, resolve(backend)).view(z.shape)


@torch.no_grad()
def row_squares(weight: Tensor | QuantizedWeight) -> Tensor:
    """|W[n]|**2 [N] of W [N, K], in fp32 or wider. Of a k-bit weight, as it is dequantised to its own dtype."""
    if isinstance(weight, Tensor):
        return torch.linalg.vector_norm(weight, dim=1, dtype=_wide(weight.dtype)).square_()
    dense = dequantize(weight)
    squares = [rows.to(_wide(rows.dtype)).square_().sum(1) for rows in dense.split(ROWS)]
    return torch.cat(squares) if squares else dense.new_zeros(0, dtype=_wide(dense.dtype))


@torch.no_grad()
def merged_norms(
    weight: Tensor | QuantizedWeight,
    A: Tensor,
    B: Tensor,
    scale: float,
    squares: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """|W[n] + scale * B[n] @ A| [N] of W [N, K], A [R, K] and B [N, R], in fp32 or wider; not differentiable.

    squares  row_squares(weight), for who has kept them: then W is read once, and no matrix of its size is made
    """
    squares = row_squares(weight) if squares is None else squares
    dtype = weight.dtype
    with torch.autocast(A.device.type, enabled=False):
        if isinstance(weight, Tensor):
            P = weight @ A.to(dtype).t()
        else:
            P = quant_matmul(A.to(dtype), weight, backend=backend).t()
        return reference_dora.merged_squares(squares, P, A, B, scale).sqrt_()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
