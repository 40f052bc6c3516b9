"""LNTuningConfig: every option of peft 0.21.2's, with the same defaults."""

from dataclasses import dataclass

from peft_fast.peft_types import PeftType
from peft_fast.tuners.options import TunerConfig


@dataclass
class LNTuningConfig(TunerConfig):
    """Norms, or whatever target_modules name, are trained as copies beside the base model's (arXiv 2312.11420).

    target_modules, exclude_modules, modules_to_save: as in LoraConfig.
    Raises ValueError or TypeError for options that cannot be.
    """

    sets = ()  # a list stays one, as in peft

    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    modules_to_save: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LN_TUNING
