"""OFTConfig: every option of peft 0.21.2's, with the same defaults."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from packaging.version import InvalidVersion, Version

from peft_fast.peft_types import PeftType
from peft_fast.tuners.options import TunerConfig


@dataclass
class OFTConfig(TunerConfig):
    """Orthogonal finetuning: the input of a layer is rotated, block by block, before the layer multiplies by it (OFT,
    arXiv 2306.07280; of the input and not of the weight, OFTv2, arXiv 2506.19847).

    oft_block_size, r: the size of a block and their number. One of the two is given, the other is 0; what does not
      divide the layer's inputs is replaced by the divisor next to it, with a warning.
    use_cayley_neumann: the rotation is num_cayley_neumann_terms terms of the series for (I + Q)(I - Q)^-1, orthogonal
      only nearly; without, it is (I - Q)(I + Q)^-1 itself, by solving.
    coft, eps: Q is kept within a norm of eps / sqrt(blocks), in the weights themselves, at every forward.
    block_share: one block for all.
    module_dropout: peft 0.21.2 has it and applies it nowhere, and so it is here, with a warning.
    init_weights: False draws Q, so that the adapter changes the model from the start.
    bias: "none", "all", "oft_only". The others as in LoraConfig.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = (
        "peft_type", "r", "oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
    )  # fmt: skip
    probabilities = ("module_dropout",)
    positive = ("num_cayley_neumann_terms",)
    counts = ("r", "oft_block_size")
    numbers = ("eps",)
    switches = ("init_weights", "coft", "block_share", "use_cayley_neumann", "fan_in_fan_out")
    choices: ClassVar = {"bias": ("none", "all", "oft_only")}

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: set[str] | list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.OFT
        if self.module_dropout:
            warnings.warn("module_dropout has no effect: peft 0.21.2 applies it to no OFT layer", stacklevel=3)

    def check(self) -> None:
        super().check()
        if self.eps < 0 or not 1 <= self.num_cayley_neumann_terms <= 1000:
            raise ValueError(
                "eps must be from 0 on and num_cayley_neumann_terms from 1 to 1000, got "
                f"{self.eps!r} and {self.num_cayley_neumann_terms!r}"
            )
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                "one of r, the number of blocks, and oft_block_size must be given and the other be 0, as they say the "
                f"same: got r={self.r} and oft_block_size={self.oft_block_size}"
            )

    @classmethod
    def check_saved(cls, options: Mapping[str, Any]) -> None:
        """Files of older versions of peft mean other rotations. Raises ValueError for those whose weights do not fit,
        and warns of those whose series was another one."""
        if "oft_block_size" not in options:
            raise ValueError(
                "an OFT config without oft_block_size is of a peft before 0.14, whose weights are other ones: train "
                "the adapter again, or load it with that version"
            )
        try:
            old = Version(str(options.get("peft_version") or "0").partition("@")[0]) < Version("0.18.0")
        except InvalidVersion:
            old = True
        if options.get("use_cayley_neumann") and old:
            warnings.warn(
                "this OFT adapter is of a peft before 0.18, whose series for use_cayley_neumann was another one: its "
                "outputs change. Train it again, or load it with that version",
                stacklevel=4,
            )
