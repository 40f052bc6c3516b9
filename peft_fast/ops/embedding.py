"""lora_embedding: a frozen embedding and its LoRA adapter as one differentiable function.

Kept for backward: the ids, and references to A and B. s is gathered again: it is [M, R], and reading it costs what
reading a kept copy would.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peft_fast.dispatch import Backend, Choice, Op
from peft_fast.kernels import reference_embedding

from . import plain
from .checks import check_device, check_floating
from .library import apply, define, resolve


def _why_not(dtype: torch.dtype) -> str | None:
    from peft_fast.kernels import lora_embedding

    return lora_embedding.why_not(dtype)


LORA_EMBEDDING = Op("lora_embedding", "split", _why_not)


def choose_embedding(weight: Tensor, backend: str | None = None) -> Choice:
    """What looks up in a table like `weight`, and why."""
    return LORA_EMBEDDING.choose(resolve(backend), weight.device, weight.dtype)


def _implementation(backend: Backend, y: Tensor) -> ModuleType:
    if LORA_EMBEDDING.choose(backend, y.device, y.dtype).backend == "torch":
        return reference_embedding
    from peft_fast.kernels import lora_embedding

    return lora_embedding


@define(
    "lora_embedding(Tensor ids, Tensor weight, Tensor A, Tensor B, float scale, str backend) -> Tensor",
    lambda ids, weight, A, B, scale, backend: weight.new_empty((ids.shape[0], weight.shape[1])),
)
def _lookup(ids: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, backend: Backend) -> Tensor:
    return _implementation(backend, weight).lora_embedding(ids, weight, A, B, scale)


@define(
    "lora_embedding_add_(Tensor(a!) y, Tensor ids, Tensor A, Tensor B, float scale, str backend) -> ()",
    lambda y, ids, A, B, scale, backend: None,
)
def _add_(y: Tensor, ids: Tensor, A: Tensor, B: Tensor, scale: float, backend: Backend) -> None:
    _implementation(backend, y).lora_embedding_add_(y, ids, A, B, scale)


@define(
    "lora_embedding_backward(Tensor dy, Tensor ids, Tensor A, Tensor B, float scale, int padding_idx, bool[] needs, "
    "str backend) -> (Tensor, Tensor)",
    lambda dy, ids, A, B, scale, padding_idx, needs, backend: tuple(
        t.new_empty(t.shape if need else (0,)) for t, need in zip((A, B), needs)
    ),
)
def _backward(
    dy: Tensor, ids: Tensor, A: Tensor, B: Tensor, scale: float, padding_idx: int, needs: list[bool], backend: Backend
) -> tuple[Tensor, Tensor]:
    run = _implementation(backend, dy)
    dA, dB = run.lora_embedding_backward(dy, ids, A, B, scale, padding_idx, *needs)
    return A.new_empty(0) if dA is None else dA, B.new_empty(0) if dB is None else dB


class _LoraEmbedding(torch.autograd.Function):
    """`base` is W [V, N], or with `adds` y [M, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        A: Tensor,
        B: Tensor,
        ids: Tensor,
        scale: float,
        padding_idx: int,
        adds: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(ids, A, B)
        ctx.settings = scale, padding_idx, backend
        ctx.vocabulary = None if adds else base.shape[0]
        if not adds:
            return _lookup(ids, base, A, B, scale, backend)
        y = base.clone(memory_format=torch.contiguous_format)  # in place only on what this call made
        _add_(y, ids, A, B, scale, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        ids, A, B = ctx.saved_tensors
        scale, padding_idx, backend = ctx.settings
        needs = list(ctx.needs_input_grad[1:3])
        grads: list[Tensor | None] = [None, None]
        again = plain.is_differentiated_again()
        if again:
            nothing = dy.new_zeros(())

            def call(A: Tensor, B: Tensor) -> Tensor:
                return plain.embedding_add(nothing, A, B, ids, scale, padding_idx)

            grads = plain.gradients(call, [A, B], needs, [dy])
        elif any(needs):
            out = _backward(dy, ids, A, B, scale, padding_idx, needs, backend)
            grads = [g if need else None for g, need in zip(out, needs)]
        base = dy if ctx.needs_input_grad[0] else None
        if base is not None and ctx.vocabulary is not None and again:
            rows = dy.masked_fill((ids == padding_idx)[:, None], 0)
            base = dy.new_zeros(ctx.vocabulary, dy.shape[1]).index_add(0, ids, rows)
        elif base is not None and ctx.vocabulary is not None:  # the table is frozen as a rule
            base = reference_embedding.segment_sum(dy, ids, ctx.vocabulary, padding_idx).to(dy.dtype)
        return base, *grads, None, None, None, None, None


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """y [..., N] = W[ids] + scale * A.T[ids] @ B.T, in W's dtype.

    ids          integers in [0, V), of any shape: outside, IndexError on a CPU and a device-side assertion on a GPU
    weight       W [V, N]
    A, B         [R, V] and [N, R], in W's dtype or in fp32: then their gradients are fp32
    padding_idx  the id whose column of A (and row of W) gets no gradient, as in torch.nn.functional.embedding

    Differentiable in W, A and B; twice the same call gives the same bits. Raises ValueError for shapes that do not fit,
    TypeError for ids that are no integers.
    """
    check_floating(weight=weight)
    if weight.dim() != 2 or weight.shape[0] != A.shape[-1]:
        raise ValueError(f"weight must be [V, N] with V={A.shape[-1]} as A has, got {tuple(weight.shape)}")
    return _run(ids, weight, weight.shape[1], A, B, scale, padding_idx, False, backend).view(
        *ids.shape, weight.shape[1]
    )


def lora_embedding_add(
    y: Tensor,
    ids: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """y [..., N] + scale * A.T[ids] @ B.T, in y's dtype, for a y that was looked up elsewhere; y is not changed.

    The other arguments and the errors are lora_embedding's. Differentiable in y, A and B.
    """
    check_floating(y=y)
    if y.shape[:-1] != ids.shape:
        raise ValueError(f"y must be [..., N] for ids of shape {tuple(ids.shape)}, got {tuple(y.shape)}")
    N = y.shape[-1]
    return _run(ids, y.reshape(-1, N), N, A, B, scale, padding_idx, True, backend).view(y.shape)


def _run(
    ids: Tensor,
    base: Tensor,
    N: int,
    A: Tensor,
    B: Tensor,
    scale: float,
    padding_idx: int | None,
    adds: bool,
    backend: str | None,
) -> Tensor:
    check_floating(A=A, B=B)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    if A.dim() != 2 or B.shape != (N, A.shape[0]):
        raise ValueError(f"A must be [R, V] and B [{N}, R], got {tuple(A.shape)} and {tuple(B.shape)}")
    V = A.shape[1]
    padding = -1 if padding_idx is None else padding_idx + V * (padding_idx < 0)
    if padding_idx is not None and not 0 <= padding < V:
        raise ValueError(f"padding_idx must be in [-{V}, {V}), got {padding_idx}")
    check_device(base, ids=ids, A=A, B=B)
    if plain.is_transformed():
        rows = ids.reshape(-1)
        y = base if adds else torch.nn.functional.embedding(rows, base, None if padding < 0 else padding)
        return plain.embedding_add(y, A, B, rows, scale, padding)
    return apply(_LoraEmbedding, base, A, B, ids.reshape(-1), scale, padding, adds, resolve(backend))
