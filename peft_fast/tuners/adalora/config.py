"""AdaLoraConfig: every option of peft 0.21.2's, LoRA's among them, with the same defaults."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_fast.peft_types import PeftType
from peft_fast.tuners.lora.config import LoraConfig
from peft_fast.tuners.options import is_integer

# LoRA's options that mean nothing here, in peft neither: named in a warning where they are set.
IDLE = ("use_rslora", "lora_bias", "alpha_pattern", "layer_replication", "runtime_config")


@dataclass
class AdaLoraConfig(LoraConfig):
    """delta = lora_alpha / init_r * B diag(E) A, where E's least important values are set to 0 while training (arXiv
    2303.10512). The options that LoRA has too are as in LoraConfig, but for `r`, which is not used.

    init_r: the rank that every layer starts with. target_r: the mean rank at the end.
    total_step: of the training, needed. tinit: steps before the first value is dropped. tfinal: steps after the last.
      deltaT: values are dropped at every such step.
    beta1, beta2: how slowly the importance of a value, and its spread, follow their last estimates (above 0, below 1).
    orth_reg_weight: what the mean distance of A A^T and B^T B from the identity adds to the loss.
    rank_pattern: which values each layer has kept: {path of lora_E: list of bool}. Training writes it.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights: ClassVar[tuple[str, ...]] = ("peft_type", "lora_alpha", "init_r")
    patterns = ()

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Any = None  # {path of a lora_E: list of bool}

    def __post_init__(self) -> None:
        if self.loftq_config:
            raise ValueError("AdaLoRA has no LoftQ: leave loftq_config out, or use LoraConfig")
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or None
        self.peft_type = PeftType.ADALORA
        if self.r != 8:
            warnings.warn("AdaLoRA does not use r: init_r is the rank that it starts with", stacklevel=3)
        plain = LoraConfig()
        idle = [name for name in IDLE if getattr(self, name) not in (getattr(plain, name), None)]
        if self.init_lora_weights not in (True, False):
            idle.append("init_lora_weights")
        if idle:
            warnings.warn(f"AdaLoRA does not use {', '.join(idle)}: they have no effect", stacklevel=3)

    def check(self) -> None:
        pattern, self.rank_pattern = self.rank_pattern, {}  # of LoRA's it has the name only
        try:
            super().check()
        finally:
            self.rank_pattern = pattern
        if self.use_dora:
            raise ValueError("AdaLoRA has no DoRA: leave use_dora out, or use LoraConfig")
        if self.target_parameters:
            raise ValueError("AdaLoRA adapts no target_parameters: name target_modules, or use LoraConfig")
        self._check_steps()
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {beta!r}")
        weight = self.orth_reg_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"orth_reg_weight must be a finite number from 0 on, got {weight!r}")
        if pattern is not None and not _is_pattern(pattern):
            raise ValueError(f"rank_pattern must be lists of True and False by the path of a lora_E, got {pattern!r}")

    def may_be_empty(self, key: str) -> bool:
        """Those of a layer whose values were all dropped."""
        path, _, _ = key.rpartition(".lora_")
        masks = {name.rpartition(".lora_E")[0]: mask for name, mask in (self.rank_pattern or {}).items()}
        return any(path.endswith(name) and not any(mask) for name, mask in masks.items())

    def _check_steps(self) -> None:
        for name in ("init_r", "target_r", "deltaT"):
            if not is_integer(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        for name in ("tinit", "tfinal"):
            if not is_integer(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be an integer from 0 on, got {getattr(self, name)!r}")
        steps = self.total_step
        if not is_integer(steps) or not steps or steps <= 0:
            raise ValueError(f"AdaLoRA needs total_step, the number of training steps, above 0, got {steps!r}")
        if self.tinit >= steps - self.tfinal:
            raise ValueError(
                f"no step is left in which ranks are reduced: tinit={self.tinit}, tfinal={self.tfinal}, "
                f"total_step={steps}. Decrease tinit or tfinal, or increase total_step"
            )


def _is_pattern(pattern: Any) -> bool:
    return isinstance(pattern, dict) and all(
        isinstance(key, str) and isinstance(kept, list) and all(isinstance(one, bool) for one in kept)
        for key, kept in pattern.items()
    )
