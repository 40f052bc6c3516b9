"""FourierFTConfig: every option of peft 0.21.2's, with the same defaults."""

from dataclasses import dataclass, field
from typing import ClassVar

from peft_fast.option_help import with_help
from peft_fast.peft_types import PeftType
from peft_fast.tuners.method import SeededConfig, refuse_layers_with_expression
from peft_fast.tuners.options import compiled, is_integer, patterns_of


@with_help
@dataclass
class FourierFTConfig(SeededConfig):
    """delta = scaling * the real part of the inverse Fourier transform of a matrix that has n_frequency learned entries
    and zeros elsewhere (FourierFT, arXiv 2405.03003).

    random_loc_seed: says which entries these are. n_frequency_pattern: {regular expression for the end of a path:
      another n_frequency there}. init_weights: True for a start as the base model; False draws the entries.
    bias: "none", "all", "fourier_only" (peft's name), "fourierft_only" (the same).
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern")
    seed_option = "random_loc_seed"
    positive = ("n_frequency",)
    numbers = ("scaling",)
    switches = ("fan_in_fan_out", "init_weights")
    choices: ClassVar = {"bias": ("none", "all", "fourier_only", "fourierft_only")}

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    fan_in_fan_out: bool = False
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FOURIERFT

    def check(self) -> None:
        super().check()
        refuse_layers_with_expression(self)
        self.n_frequency_pattern = self.n_frequency_pattern or {}
        for pattern, number in patterns_of(self, "n_frequency_pattern").items():
            compiled("n_frequency_pattern", pattern)
            if not is_integer(number) or number <= 0:
                raise ValueError(f"n_frequency_pattern[{pattern!r}] must be a positive integer, got {number!r}")
