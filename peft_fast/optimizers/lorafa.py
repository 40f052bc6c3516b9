"""LoRA-FA (arXiv 2308.03303): A stays as it began, and B steps along the gradient that comes closest to the whole
weight's, as in LoRA-Pro (arXiv 2407.18242):

    g_B / scale^2 (A A^T)^-1

Activations of A's inputs need not be kept for A's sake. All else that is trained takes AdamW's steps.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .pairs import MARKS, damped_inverses, name_of_a, pairs_of, scale_of, wide

DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW, whose steps for B of LoRA are those of LoRA-FA.

    params: groups with `names` and `scaling_factors` beside `params`, an entry each: create_lorafa_optimizer makes
    them. A B is found together with its A by name, in one group; a B alone takes AdamW's steps.
    correct_bias: of the moments in the first steps, as in Adam. Raises ValueError for numbers out of range, KeyError
    for groups without names.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name} must be a number from 0 on, got {value!r}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be from 0 to below 1, got {betas!r}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            named = dict(zip(group["names"], group["params"]))
            scales = dict(zip(group["names"], group["scaling_factors"]))
            pairs = {name: pair for name, pair in pairs_of(named).items() if pair[1].grad is not None}
            rows = [wide(A) for A, _ in pairs.values()]
            inverses = dict(zip(pairs, damped_inverses([A @ A.t() for A in rows], DAMPING)))
            frozen = {name_of_a(name) for name in pairs}
            for name, parameter in named.items():
                if parameter.grad is None or name in frozen:
                    continue
                gradient = parameter.grad
                if name in pairs:
                    projected = wide(gradient) @ inverses[name] / scales[name] ** 2
                    gradient = projected.view(parameter.shape).to(gradient.dtype)
                self._update(parameter, gradient, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        (beta1, beta2), rate = group["betas"], group["lr"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = rate
        if group["correct_bias"]:
            step *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-step)
        if group["weight_decay"]:
            parameter.mul_(1 - rate * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> LoraFAOptimizer:
    """A LoraFAOptimizer for the trainable parameters of `model`, whose A's are frozen by this call.

    r, lora_alpha: as in peft, where they count no more either: each layer's own rank and scale do. use_rslora: peft's,
    deprecated; must be that of the active adapters.
    Raises ValueError for a model in which no LoRA adapter is trained.
    """
    configs, active = getattr(model, "peft_config", {}), getattr(model, "active_adapters", [])
    if use_rslora is not None:
        others = [name for name in active if getattr(configs[name], "use_rslora", False) != use_rslora]
        if others:
            raise ValueError(
                f"use_rslora is {use_rslora} here and not so in the configs of the active adapters {others}: leave it "
                "out, the configs count"
            )
        warnings.warn("use_rslora has no effect here: the adapters' configs count", FutureWarning, stacklevel=2)
    parameters = dict(model.named_parameters())
    pairs = {name: pair for name, pair in pairs_of(parameters).items() if pair[1].requires_grad}
    if not pairs:
        raise ValueError("create_lorafa_optimizer needs a model with a LoRA adapter that is trained, and found none")
    for name, parameter in parameters.items():
        if any(a in name for a, _ in MARKS):
            parameter.requires_grad_(False)
    needed = {name_of_a(name) for name in pairs}
    named = {n: parameter for n, parameter in parameters.items() if parameter.requires_grad or n in needed}
    group = {
        "params": list(named.values()),
        "names": list(named),
        "scaling_factors": [scale_of(model, name) if name in pairs else None for name in named],
    }
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay)
