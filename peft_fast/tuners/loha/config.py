"""LoHaConfig: every option of peft 0.21.2's, with the same defaults."""

from dataclasses import dataclass

from peft_fast.option_help import with_help
from peft_fast.peft_types import PeftType
from peft_fast.tuners.lycoris import LycorisConfig


@with_help
@dataclass
class LoHaConfig(LycorisConfig):
    """Low-rank Hadamard product, delta = alpha / r * (W1a W1b) * (W2a W2b) elementwise (FedPara, arXiv 2108.06098).

    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
    rank_dropout: probability with which an out feature of the delta is dropped in training; the others are scaled so
      that their mean factor is 1. module_dropout: probability with which a layer's whole delta is.
    use_effective_conv2d: take the kernels of convolutions apart too, with a small one between (the paper's
      Proposition 3).
    init_weights: False draws all four matrices, so that the adapter changes the model from the start.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "r", "alpha", "rank_pattern", "alpha_pattern")

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOHA
