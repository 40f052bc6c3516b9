"""VeraConfig: every option of peft 0.21.2's, with the same defaults."""

import warnings
from dataclasses import dataclass

from peft_fast.peft_types import PeftType
from peft_fast.tuners.options import TunerConfig, is_integer


@dataclass
class VeraConfig(TunerConfig):
    """delta = diag(b) B diag(d) A: B and A are random, the same for all layers and not trained, b [out] and d [r] are
    (arXiv 2310.11454).

    target_modules, layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
    r: larger than LoRA's, as each rank costs one parameter a layer.
    projection_prng_key: the seed of A and B. save_projection: write them into the file too; without them they are drawn
      again from the seed when it is loaded, which another platform may do otherwise.
    vera_dropout: probability with which an element of the adapter's input is dropped in training.
    d_initial: what d starts from. init_weights: False draws d and makes b ones, so that the adapter changes the model.
    fan_in_fan_out: whether the targets keep their weight [in, out]; it is set by the layers.
    bias: "none", "all" or "vera_only": which biases of the base model are trained and saved.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "r", "projection_prng_key")
    positive = ("r",)
    numbers = ("d_initial",)
    probabilities = ("vera_dropout",)
    switches = ("save_projection", "fan_in_fan_out", "init_weights")
    choices = {"bias": ("none", "all", "vera_only")}  # noqa: RUF012 (ClassVar in the base)

    r: int = 256
    target_modules: set[str] | list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VERA
        if not self.save_projection:
            warnings.warn(
                "save_projection=False: the projections are not saved, and drawn again from projection_prng_key when "
                "the adapter is loaded, which another platform may do otherwise",
                stacklevel=3,
            )

    def check(self) -> None:
        super().check()
        key = self.projection_prng_key
        if not is_integer(key) or not -(2**63) <= key < 2**64:
            raise ValueError(f"projection_prng_key must be an integer of 64 bits, a seed, got {key!r}")
