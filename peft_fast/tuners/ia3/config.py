"""IA3Config: every option of peft 0.21.2's, with the same defaults."""

from dataclasses import dataclass

from peft_fast.peft_types import PeftType
from peft_fast.tuners.options import TunerConfig


@dataclass
class IA3Config(TunerConfig):
    """Each adapted layer's output is multiplied by a learned vector (arXiv 2205.05638).

    target_modules, exclude_modules, modules_to_save: as in LoraConfig.
    feedforward_modules: which of the targets have their input multiplied, and not their output: names (the ends of
      paths) or an expression for whole paths; None: by the model's type, as in peft.
    fan_in_fan_out: whether the targets keep their weight [in, out]; it is set by the layers.
    init_ia3_weights: False draws the vectors, so that the adapter changes the model from the start.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "feedforward_modules")
    switches = ("fan_in_fan_out", "init_ia3_weights")

    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    feedforward_modules: set[str] | list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3

    def check(self) -> None:
        super().check()
        inner, outer = self.feedforward_modules, self.target_modules
        if isinstance(inner, set) and isinstance(outer, set) and not inner <= outer:
            raise ValueError(
                f"feedforward_modules must be a part of target_modules, and {sorted(inner - outer)} are not: add them "
                "there, or leave them out"
            )
