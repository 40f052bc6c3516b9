"""HRAConfig: every option of peft 0.21.2's, with the same defaults."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

from peft_fast.peft_types import PeftType
from peft_fast.tuners.method import refuse_layers_with_expression
from peft_fast.tuners.options import TunerConfig


@dataclass
class HRAConfig(TunerConfig):
    """Householder reflection adaptation: the weight times r learned reflections, W (I - 2 u1 u1^T) ... (I - 2 ur ur^T),
    with unit vectors u (HRA, arXiv 2405.17484).

    r: how many; an even number starts as the base model, with pairs of equal vectors, an odd one does not.
    apply_GS: make the vectors orthogonal to each other first.
    init_weights: False draws all of them, so that the adapter changes the model from the start.
    bias: "none", "all", "hra_only". The others as in LoraConfig.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "r", "apply_GS")
    positive = ("r",)
    switches = ("apply_GS", "init_weights")
    choices: ClassVar = {"bias": ("none", "all", "hra_only")}

    r: int = 8
    apply_GS: bool = False
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HRA
        if self.apply_GS and self.init_weights and not self.inference_mode:
            warnings.warn(
                "apply_GS cannot make the pairs of equal vectors orthogonal that init_weights=True starts with: their "
                "second vectors come out as rounding has them. Use init_weights=False with it",
                stacklevel=3,
            )

    def check(self) -> None:
        super().check()
        refuse_layers_with_expression(self)
