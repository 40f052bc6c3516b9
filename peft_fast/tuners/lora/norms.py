"""RMSNorms whose outputs are not kept for the backward: ops.rms_norm in their forward's place.

As with mlp.py, a norm keeps its identity, its weight and its hooks, and the class of this one instance becomes a
subclass of its own. Which norms: torch's, and those of transformers that compute bit for bit what ops.rms_norm does on
samples in fp32 and bf16; a class of somebody else's may do more than its outputs show.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.dispatch import Choice
from peft_fast.ops.norm import KINDS, Kind, Recipe, normalised
from peft_fast.sharded import is_unit

EPS = ("variance_epsilon", "eps")  # what the attribute is called
# How a norm refuses a call with an input alone: it wants a gate, a kernel that is not here, another shape.
REFUSALS = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
UNIT = (
    "it was given to fully_shard itself, which frees its weight before the layers that read its output go backward: "
    "shard the layer around it"
)


class RecomputingNorm:
    """What the subclass of a norm's class adds to it."""

    original_class: type[nn.Module]
    known_forward: Any
    kind: Kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        known = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if not known or torch.compiler.is_compiling() or why_not_now(self) is not None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return ops.rms_norm(args[0], self.weight, _eps(self), self.kind)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: made again from the class that can be imported."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return _new, (self.original_class, self.kind), *reduced[2:]


def _new(original: Any, kind: Kind) -> nn.Module:
    cls = norm_class(original, kind)
    return cls.__new__(cls)


@functools.cache
def norm_class(original: Any, kind: Kind) -> Any:
    """The subclass of a norm's class that keeps its input alone."""
    attributes = {
        "original_class": original,
        "known_forward": staticmethod(original.forward),
        "kind": kind,
        "__module__": __name__,
    }
    return type(f"Recomputing{original.__name__}", (RecomputingNorm, original), attributes)


def looks_like_one(module: nn.Module) -> bool:
    return "RMSNorm" in type(module).__name__


def kind_of(module: Any) -> Kind | str:
    """As what ops.rms_norm computes this norm, or in a sentence that does not begin with a kind why it cannot."""
    if is_unit(module):
        return UNIT
    if "forward" in vars(module):
        return "its forward was replaced (by Liger, kernels, accelerate's offloading, ...)"
    if type(module) is not nn.RMSNorm and not type(module).__module__.startswith("transformers."):
        return f"{type(module).__name__} is of {type(module).__module__}, not torch's or transformers'"
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) > 1:
        return "it has not one weight, a vector"
    if not any(hasattr(module, name) for name in EPS):
        return f"it has none of {', '.join(EPS)}"
    other = f"{type(module).__name__} computes something else than ops.rms_norm"
    try:
        kind = _kind_by_trial(module)
    except REFUSALS as error:
        return f"{other}: called with an input alone it raises {type(error).__name__}: {error}"
    return kind or other


def _kind_by_trial(module: Any) -> Kind | None:
    """On a twin of this very norm, by its own settings, so that no hook or state of the model's is touched."""
    generator, K = torch.Generator().manual_seed(0), module.weight.shape[0]
    with torch.device("cpu"):
        trial = _twin(module, torch.randn(K, generator=generator))
        x = torch.randn(5, K, generator=generator) * 3
        for kind in KINDS:
            if all(_is_same(trial.to(dtype), x.to(dtype), kind) for dtype in (torch.float32, torch.bfloat16)):
                return kind
    return None


def _twin(module: Any, weight: Tensor) -> Any:
    cls: Any = type(module)
    trial = cls.__new__(cls)
    nn.Module.__init__(trial)
    vars(trial).update({name: value for name, value in vars(module).items() if name not in vars(trial)})
    trial.weight = nn.Parameter(weight, requires_grad=False)
    return trial


@torch.no_grad()
def _is_same(trial: Any, x: Tensor, kind: Kind) -> bool:
    y, again = trial(x), normalised(x, trial.weight, Recipe(_eps(trial), kind))
    return y.dtype == again.dtype and torch.equal(y, again)


def _eps(module: Any) -> float | None:
    return next(getattr(module, name) for name in EPS if hasattr(module, name))


def recompute_norms(model: nn.Module) -> tuple[int, dict[str, str]]:
    """Have the norms of a model keep their input alone: (how many do, {name: why not} of the others)."""
    found, refused = 0, {}
    for name, module in model.named_modules():
        if isinstance(module, RecomputingNorm):
            found += 1
        elif looks_like_one(module):
            kind = kind_of(module)
            if kind in KINDS:
                cls: Any = type(module)
                module.__class__ = norm_class(cls, kind)
                found += 1
            else:
                refused[name] = kind
    return found, refused


def restore_norms(model: nn.Module) -> None:
    for module in _recomputing(model):
        module.__class__ = module.original_class


def _recomputing(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, RecomputingNorm))


def why_not_now(norm: Any) -> str | None:
    """Why a norm that was set to keep its input alone keeps more in the next forward, or None."""
    if norm.weight.requires_grad:
        return "its weight is trained"
    if is_unit(norm):
        return UNIT
    if "forward" in vars(norm) or norm.original_class.forward is not norm.known_forward:
        return "its forward was replaced (by Liger, kernels, accelerate's offloading, ...)"
    return None


def choice(module: nn.Module, asked: bool) -> Choice | None:
    """A row of `explain`, once norms are to be recomputed (`asked`); None for other modules."""
    if isinstance(module, RecomputingNorm):
        reason = why_not_now(module)
        because = "its input is kept; what it and the layers that read it need of its output is computed again"
        return Choice("rms_norm", "recompute" if reason is None else "layers", reason or because)
    return Choice("rms_norm", "layers", kind_of(module)) if asked and looks_like_one(module) else None
