"""BOFTConfig: every option of peft 0.21.2's, with the same defaults."""

from dataclasses import dataclass
from typing import ClassVar

from peft_fast.peft_types import PeftType
from peft_fast.tuners.options import TunerConfig


@dataclass
class BOFTConfig(TunerConfig):
    """Orthogonal finetuning by butterfly factors: the input of a layer is turned by block-diagonal rotations, with
    shuffles between them, and its output is scaled (BOFT, arXiv 2311.06243).

    boft_block_size, boft_block_num: the size of a block and their number. One of the two is given, the other is 0; it
      must divide the layer's inputs.
    boft_n_butterfly_factor: how many such rotations follow each other. Peft takes one, whatever is asked for, where it
      cannot compile a CUDA extension of its own; here there are as many as the config says, on every device. Files
      that peft has written without its extension load: what they lack turns nothing.
    boft_dropout: share of the blocks of a factor drawn at random that turn nothing in training.
    init_weights: False draws rotations and scales, so that the adapter changes the model from the start.
    bias: "none", "all", "boft_only". The others as in LoraConfig.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor")
    positive = ("boft_n_butterfly_factor",)
    counts = ("boft_block_size", "boft_block_num")
    probabilities = ("boft_dropout",)
    switches = ("init_weights", "fan_in_fan_out")
    choices: ClassVar = {"bias": ("none", "all", "boft_only")}

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BOFT

    def check(self) -> None:
        super().check()
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ValueError(
                "one of boft_block_size and boft_block_num must be given and the other be 0, as they say the same: got "
                f"boft_block_size={self.boft_block_size} and boft_block_num={self.boft_block_num}"
            )
