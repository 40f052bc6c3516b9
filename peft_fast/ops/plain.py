"""The ops in plain torch, under torch's own autograd: for who looks inside of them.

An op's kernels give gradients once, and no transform of torch.func sees into them. So where a backward is to be
differentiated itself (create_graph=True), it takes the gradients of the functions here; and inside of torch.func's
transforms and forward-mode differentiation the functions here are called in place of the ops. Slower, more memory, and
any number of derivatives.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from peft_fast.kernels import reference, reference_experts, reference_multi
from peft_fast.kernels.segments import Drop, Groups, Segments
from peft_fast.quant.weight import QuantizedWeight

from .library import unflatten
from .projection import split


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_differentiated_again() -> bool:
    """In a backward: whether its own derivatives are wanted."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients(
    call: Callable[..., Any], inputs: Sequence[Tensor | None], needs: Sequence[bool], dy: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of `call(*inputs)`, one tensor or several, for those of `inputs` that `needs` asks for, in a way
    that can be differentiated again. `dy`: of each output, None for none."""
    # Views of their own: where one input depends on another, its gradient is not to go on through that.
    own = [t if t is None or not need else t.view_as(t) for t, need in zip(inputs, needs)]
    wanted = [t for t, need in zip(own, needs) if need and t is not None]
    if not wanted:
        return [None] * len(own)
    y = call(*own)
    used = [(y_j, d) for y_j, d in zip([y] if isinstance(y, Tensor) else y, dy) if d is not None]
    found = iter(
        torch.autograd.grad(
            [y_j for y_j, _ in used], wanted, [d for _, d in used], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if need and t is not None else None for t, need in zip(own, needs)]


def without_autocast(x: Tensor) -> Any:
    return torch.autocast(x.device.type, enabled=False)


def dense(tensors: Sequence[Tensor], fmt: str, dtype: torch.dtype) -> Tensor:
    """W [N, K]"""
    weight = unflatten(list(tensors), fmt)
    return reference.dequantize(weight, dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


def down(x: Tensor, A: Tensor, p: float, key: Tensor | None) -> Tensor:
    """s [M, R]"""
    with without_autocast(x):
        return reference.apply_dropout(x, p, key if p else None) @ A.to(x.dtype).t()


def up_add(y: Tensor, s: Tensor, B: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    with without_autocast(y):
        y = y + scale * (s @ B.to(s.dtype).t())
        return y if bias is None else y + bias.to(y.dtype)


def linear(
    x: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    scale: float,
    p: float,
    key: Tensor | None,
    dtype: torch.dtype,
    fmt: str,
    *weight: Tensor,
) -> Tensor:
    """y [M, N] in `dtype`; A and B None: without an adapter."""
    with without_autocast(x):
        z = x.to(dtype)
        y = F.linear(z, dense(weight, fmt, dtype), None if bias is None else bias.to(dtype))
        return y if A is None or B is None else up_add(y, down(z, A, p, key), B, None, scale)


def group(
    x: Tensor,
    counts: list[int],
    fmts: list[str],
    scales: list[float],
    ps: list[float],
    dtype: torch.dtype,
    *tensors: Any,
) -> list[Tensor]:
    """y [M, N] of each layer; `tensors`: A, B, bias, key and those of the weight, of each."""
    return [
        linear(x, A, B, bias, scale, p, key, dtype, fmt, *weight)
        for (A, B, bias, key, *weight), fmt, scale, p in zip(split(tensors, counts), fmts, scales, ps)
    ]


def mlp(
    x: Tensor,
    counts: list[int],
    fmts: list[str],
    scales: list[float],
    ps: list[float],
    activation: str,
    dtype: torch.dtype,
    *tensors: Any,
) -> Tensor:
    *both, of_down = split(tensors, counts)
    given = [tensor for part in both for tensor in part]
    g, u = group(x, counts[:2], fmts[:2], scales[:2], ps[:2], dtype, *given)
    with without_autocast(x):
        h = glu(g, u, activation)
    return group(h, counts[2:], fmts[2:], scales[2:], ps[2:], dtype, *of_down)[0]


def glu(g: Tensor, u: Tensor, activation: str) -> Tensor:
    return reference.activated(g, activation) * u


def linear_multi(
    x: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    bias: Tensor | None,
    segments: Segments,
    scales: Sequence[float],
    drop: Drop,
    dtype: torch.dtype,
    fmt: str,
    weight: Sequence[Tensor],
) -> Tensor:
    """y [M, N] in `dtype`; without a weight the adapters' part alone."""
    with without_autocast(x):
        z = x.to(dtype)
        y = reference_multi.lora_multi(z, A, B, scales, segments, drop) if A else None
        if not weight:
            assert y is not None
            return y
        of_base = F.linear(z, dense(weight, fmt, dtype), None if bias is None else bias.to(dtype))
        return of_base if y is None else of_base + y


def experts(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: str,
    is_transposed: bool,
    groups: Groups,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    """y [M, N] of lora_experts"""
    E = groups.starts.shape[0] - 1
    with without_autocast(x):
        W = dense(weight, fmt, x.dtype) if fmt else weight[0]
        W = W.unflatten(0, (E, -1)) if W.dim() == 2 else W
        stacked = [
            (a.unflatten(0, (E, -1)), b.unflatten(1, (-1, E)).permute(2, 0, 1), scale)
            for a, b, scale in zip(A, B, scales)
        ]
        return reference_experts.lora_experts(x, W.mT if is_transposed else W, stacked, groups)


def scale_columns(z: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    y = z.to(factor.dtype) * factor
    return (y if bias is None else y + bias.to(y.dtype)).to(z.dtype)


def embedding_add(y: Tensor, A: Tensor, B: Tensor, ids: Tensor, scale: float, padding_idx: int) -> Tensor:
    """padding_idx: -1 for none"""
    s = F.embedding(ids, A.t(), None if padding_idx < 0 else padding_idx)
    return up_add(y, s.to(y.dtype), B, None, scale)
