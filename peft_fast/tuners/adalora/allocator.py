"""Which singular values an AdaLoRA adapter keeps: by their importance, within a budget that shrinks (arXiv 2303.10512).

The sensitivity of a weight is |w * dL/dw|; of its running mean and of the running mean of its distance from that the
product is its importance. That of a value of E is its own, plus the means over its row of A and its column of B.
"""

from typing import Any

import torch
from torch import Tensor, nn

FACTORS = ("lora_A", "lora_B", "lora_E")


class RankAllocator:
    """`model`: the user's model, with the adapter in it. Names are those of its parameters."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str) -> None:
        self.peft_config = peft_config
        self.adapter_name = adapter_name
        self.beta1, self.beta2 = peft_config.beta1, peft_config.beta2
        self.reset_ipt()
        ranks = [len(parameter) for _, parameter in self._parameters(model, "lora_A")]
        self.init_bgt = sum(ranks)
        self.target_bgt = peft_config.target_r * len(ranks)

    def set_total_step(self, total_step: int) -> None:
        self.peft_config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forget all importances."""
        self.ipt: dict[str, Tensor] = {}
        self.exp_avg_ipt: dict[str, Tensor] = {}
        self.exp_avg_unc: dict[str, Tensor] = {}

    def _parameters(self, model: nn.Module, *factors: str) -> list[tuple[str, nn.Parameter]]:
        ends = tuple(f".{factor}.{self.adapter_name}" for factor in factors)
        return [(name, parameter) for name, parameter in model.named_parameters() if f".{name}".endswith(ends)]

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """(how many values all layers together keep at this step, whether some are dropped at it)"""
        config = self.peft_config
        if step <= config.tinit:
            return self.init_bgt, False
        if step > config.total_step - config.tfinal:
            return self.target_bgt, True
        left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        budget = int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt)
        return budget, step % config.deltaT == 0

    @torch.no_grad()
    def update_ipt(self, model: nn.Module) -> None:
        """Take the gradients into account, where they are finite. Raises ValueError, with nothing changed, where there
        are none."""
        found = self._parameters(model, *FACTORS)
        without = [name for name, parameter in found if parameter.grad is None]
        if without:
            raise ValueError(
                f"update_and_allocate needs gradients, and {without[0]} has none: call it after loss.backward() and "
                "before zero_grad()"
            )
        for name, parameter in found:
            gradient: Any = parameter.grad
            now = (parameter * gradient).abs()
            nothing = torch.zeros_like(now)
            mean, spread = self.exp_avg_ipt.get(name, nothing), self.exp_avg_unc.get(name, nothing)
            counts = now.isfinite()  # an overflow, whose step a GradScaler leaves out, would stay in the means for good
            mean = torch.where(counts, self.beta1 * mean + (1 - self.beta1) * now, mean)
            spread = torch.where(counts, self.beta2 * spread + (1 - self.beta2) * (now - mean).abs(), spread)
            self.ipt[name], self.exp_avg_ipt[name], self.exp_avg_unc[name] = now, mean, spread

    def _scores(self, name_E: str) -> Tensor:
        """The importance of a layer's values: [r]."""
        of = {factor: name_E.replace(".lora_E.", f".{factor}.") for factor in FACTORS}
        score = {factor: self.exp_avg_ipt[name] * self.exp_avg_unc[name] for factor, name in of.items()}
        return score["lora_E"].view(-1) + (score["lora_A"].mean(1) + score["lora_B"].mean(0))

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Set all values but the `budget` most important ones to 0. Which are kept, by the name of their lora_E."""
        values = self._parameters(model, "lora_E")
        scores = {name: self._scores(name) for name, _ in values}
        drop = self.init_bgt - budget
        everything = torch.cat([score.flatten().cpu() for score in scores.values()])
        threshold = everything.kthvalue(drop).values.item() if drop > 0 else float("-inf")
        kept = {name: score > threshold for name, score in scores.items()}
        for name, parameter in values:
            parameter.masked_fill_(~kept[name].view(-1, 1), 0.0)
        return {name: mask.tolist() for name, mask in kept.items()}

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """(the budget, which values are kept where some were dropped at this step)"""
        if global_step < self.peft_config.total_step - self.peft_config.tfinal:
            self.update_ipt(model)
        budget, drops = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if drops or force_mask else None

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict[str, list[bool]]) -> None:
        """Set the values to 0 that training has dropped before, and the optimiser has changed since."""
        kept = {in_file(name): mask for name, mask in rank_pattern.items()}
        for name, parameter in self._parameters(model, "lora_E"):
            mask = kept.get(in_file(name))
            if mask is not None and len(mask) == len(parameter):
                parameter.masked_fill_(~torch.tensor(mask, device=parameter.device).view(-1, 1), 0.0)


def in_file(name: str) -> str:
    """The name of a lora_E without its adapter's: as the rank_pattern of a file has it."""
    path, _, _ = name.rpartition("lora_E")
    return f"{path}lora_E"
