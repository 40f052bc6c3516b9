"""RandLoraConfig: every option of peft 0.21.2's, with the same defaults."""

from dataclasses import dataclass
from typing import ClassVar

from peft_fast.option_help import with_help
from peft_fast.peft_types import PeftType
from peft_fast.tuners.method import SeededConfig


@with_help
@dataclass
class RandLoraConfig(SeededConfig):
    """delta = alpha / r * sum over j of B_j diag(lambda_j) A diag(gamma_j): A and the B_j are random, the same for all
    layers and not trained; there are so many of them that the sum has full rank (RandLoRA, arXiv 2502.00987).

    r: of each basis; the smaller, the more there are, and the more is trained. sparse, very_sparse: bases of -1, 0
      and 1, of which 2/3 are 0, or all but 2 / sqrt(the smaller size).
    projection_prng_key, save_projection: the bases' seed, and whether files have them. randlora_alpha, init_weights,
      randlora_dropout: as lora_alpha, init_lora_weights, lora_dropout.
    """

    tied_to_weights = ("peft_type", "r", "randlora_alpha", "projection_prng_key", "sparse", "very_sparse")
    seed_option = "projection_prng_key"
    positive, numbers, probabilities = ("r",), ("randlora_alpha",), ("randlora_dropout",)
    switches = ("save_projection", "sparse", "very_sparse", "fan_in_fan_out", "init_weights")
    choices: ClassVar = {"bias": ("none", "all", "randlora_only")}

    r: int = 32
    target_modules: set[str] | list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.RANDLORA
