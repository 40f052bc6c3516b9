"""rms_norm: RMSNorm (arXiv 1910.07467) that keeps its input alone, and tensors that remember how they were made.

    y = weight * x / sqrt(mean(x^2) + eps)

A transformer keeps three tensors around each norm: x widened to fp32 by the norm, and y by the layers that read it. Of
these x in its own dtype is enough, which is the residual stream. `rms_norm` keeps that, and leaves on y where it comes
from; lora_linear, lora_group and lora_mlp, called with this very y, keep its source in its place, and their backward
makes y again: one pass over x more for the norm and one for each op that reads y.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import plain
from .checks import check_device, check_floating

Kind = Literal["llama", "gemma", "torch"]
KINDS: tuple[Kind, ...] = ("llama", "gemma", "torch")
SOURCE = "_peft_fast_source"  # on a tensor: (its Source, versions of all three when it was made)


class Recipe(NamedTuple):
    """What of a norm is no tensor."""

    eps: float | None
    kind: Kind


class Source(NamedTuple):
    """What y was made of."""

    x: Tensor
    weight: Tensor
    recipe: Recipe


def normalised(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """y, in plain torch, with the roundings of each kind: see rms_norm."""
    K = (x.shape[-1],)
    if recipe.kind == "torch":
        return F.rms_norm(x, K, weight, recipe.eps)
    if recipe.kind == "llama":
        wide = x.dtype == torch.float64  # which transformers narrows
        y = F.rms_norm(x.float(), K, None, recipe.eps).to(x.dtype) if wide else F.rms_norm(x, K, None, recipe.eps)
        return weight * y
    return (F.rms_norm(x.float(), K, None, recipe.eps) * (1.0 + weight.float())).type_as(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        with plain.without_autocast(x):
            return normalised(x, weight, recipe)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None, None
        x, weight = ctx.saved_tensors
        if plain.is_differentiated_again():
            (dx,) = plain.gradients(lambda x: normalised(x, weight, ctx.recipe), [x], [True], [dy])
            return dx, None, None
        with torch.enable_grad(), plain.without_autocast(x):
            own = x.detach().requires_grad_()
            y = normalised(own, weight, ctx.recipe)
        return torch.autograd.grad(y, own, dy)[0], None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float | None, kind: Kind = "llama") -> Tensor:
    """y [..., K] = weight [K] * x [..., K] / sqrt(mean(x^2) + eps); keeps x, and not y where an op of ours reads it.

    kind    where it rounds: "llama" normalises in fp32, rounds to x's dtype and multiplies then; "gemma" multiplies by
            1 + weight in fp32 and rounds once; "torch" is torch.nn.functional.rms_norm
    eps     None: what torch.nn.functional.rms_norm takes then, which differs by version and dtype

    Differentiable in x. Raises ValueError for another kind, shapes that do not fit, and a weight that requires a
    gradient, which is not computed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check_floating(x=x, weight=weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [K] with K={x.shape[-1]} as x has, got {tuple(weight.shape)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("the norm's weight requires a gradient, which rms_norm does not compute: freeze it")
    check_device(x, weight=weight)
    recipe = Recipe(None if eps is None else float(eps), kind)
    if plain.is_transformed() or not torch.is_grad_enabled():
        with plain.without_autocast(x):
            return normalised(x, weight, recipe)
    y = _RMSNorm.apply(x, weight, recipe)
    if not (x.is_inference() or weight.is_inference()):  # which do not count what is written to them
        setattr(y, SOURCE, (Source(x, weight, recipe), (y._version, x._version, weight._version)))
    return y


def source_of(y: Tensor) -> Source | None:
    """What y was made of, where rms_norm has made this very tensor and nobody has written to y, x or weight since."""
    if torch.compiler.is_compiling():
        return None
    source, versions = getattr(y, SOURCE, (None, None))
    if source is None:
        return None
    return source if (y._version, source.x._version, source.weight._version) == versions else None


def to_keep(x: Tensor, source: Source | None) -> tuple[list[Tensor], Recipe | None]:
    """What an op keeps for its input x, and what it has to tell `made_again`."""
    return ([x], None) if source is None else ([source.x, source.weight], source.recipe)


def made_again(kept: Sequence[Tensor], recipe: Recipe | None) -> tuple[Tensor, list[Any]]:
    """(x [M, K], what was kept beside it) of an op's saved tensors, `to_keep`'s in front."""
    if recipe is None:
        return kept[0], list(kept[1:])
    weight = kept[1]
    if weight.untyped_storage().nbytes() < weight.nbytes:
        raise RuntimeError(
            "the backward makes a norm's output again from its weight, and that has been freed: something that shards "
            "weights has taken it away too early. Call set_recompute(model, norms=False), or shard the layer around it"
        )
    with plain.without_autocast(kept[0]):
        x = normalised(kept[0], weight, recipe)
    return x.reshape(-1, x.shape[-1]), list(kept[2:])
