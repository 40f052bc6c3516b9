"""LoKrConfig: every option of peft 0.21.2's, with the same defaults."""

from dataclasses import dataclass

from peft_fast.peft_types import PeftType
from peft_fast.tuners.lycoris import LycorisConfig
from peft_fast.tuners.options import is_integer


@dataclass
class LoKrConfig(LycorisConfig):
    """Low-rank Kronecker product, delta = alpha / r * W1 (x) W2, W2 = W2a W2b (LyCORIS, arXiv 2309.14859).

    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
    r: of W2's product, which is one matrix where r is at least half of its larger dimension.
    decompose_factor: into which factors the dimensions are taken apart: this one where it divides them, else the
      largest below it; -1: about their square roots. decompose_both: W1 is a product of rank r too, where that is less.
    rank_dropout: probability with which an out feature of the delta is dropped in training; rank_dropout_scale: the
      others are scaled so that their mean factor is 1. module_dropout: probability with which a layer's whole delta is.
    use_effective_conv2d: take the kernels of convolutions apart too, with a small one between (FedPara, arXiv
      2108.06098, Proposition 3).
    init_weights: True begins with W1 zero, "lycoris" with W2 zero, as that library does; False draws all weights, so
      that the adapter changes the model from the start.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "r", "alpha", "rank_pattern", "alpha_pattern")
    switches = ("use_effective_conv2d", "decompose_both", "rank_dropout_scale")
    choices = {"init_weights": (True, False, "lycoris")}  # noqa: RUF012

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOKR

    def check(self) -> None:
        super().check()
        factor = self.decompose_factor
        if not is_integer(factor) or (factor < 1 and factor != -1):
            raise ValueError(f"decompose_factor must be a positive integer, or -1 for about the root, got {factor!r}")
