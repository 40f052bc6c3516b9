"""Riemannian preconditioning (arXiv 2402.02347): the gradients of A and B in the metric of their product.

g_A <- (B^T B + reg I)^-1 g_A        g_B <- g_B (A A^T + reg I)^-1
"""

import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .pairs import damped_inverses, pairs_of, wide


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimiser of `optimizer_cls` over the trainable parameters of `model`, before each step of which the gradients
    of LoRA's A and B on linear layers are preconditioned.

    reg: added to the diagonals of the [r, r] matrices that are inverted. Other keywords go to `optimizer_cls`.
    Raises TypeError for what is no class of optimisers, ValueError for one whose step needs a closure (steps with a
    closure raise it too), for a reg below 0, and where no pair of A and B is trained.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a class of torch.optim.Optimizer, got {optimizer_cls!r}")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_cls.__name__} computes gradients again within a step, which would not be preconditioned: use "
            "one that needs no closure, such as AdamW"
        )
    if isinstance(reg, bool) or not isinstance(reg, (int, float)) or not (math.isfinite(reg) and reg >= 0):
        raise ValueError(f"reg must be a number from 0 on, got {reg!r}")
    pairs = [
        (A, B)
        for name, (A, B) in pairs_of(dict(model.named_parameters())).items()
        if ".lora_B." in name and A.dim() == B.dim() == 2 and A.requires_grad and B.requires_grad
    ]
    if not pairs:
        raise ValueError("create_riemannian_optimizer needs a model with LoRA on linear layers that is trained")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_cls(trained, lr=lr, **kwargs)  # type: ignore[call-arg]

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise ValueError("a step cannot take a closure: the gradients that it computes are not preconditioned")
        _precondition(pairs, reg)

    optimizer.register_step_pre_hook(before)
    return optimizer


@torch.no_grad()
def _precondition(pairs: list[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
    """In place."""
    there = [(A, B) for A, B in pairs if A.grad is not None or B.grad is not None]
    rows = [(wide(A), wide(B)) for A, B in there]
    of_A = damped_inverses([b.t() @ b for _, b in rows], reg)
    of_B = damped_inverses([a @ a.t() for a, _ in rows], reg)
    for (A, B), left, right in zip(there, of_A, of_B):
        if A.grad is not None:
            A.grad.copy_(left @ A.grad.to(left.dtype))
        if B.grad is not None:
            B.grad.copy_(B.grad.to(right.dtype) @ right)
