"""ShiraConfig: every option of peft 0.21.2's, with the same defaults."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft_fast.peft_types import PeftType
from peft_fast.tuners.options import TunerConfig, is_integer

from .masks import random_mask


@dataclass
class ShiraConfig(TunerConfig):
    """r * (N + K) entries of each adapted weight [N, K] are trained, as many as LoRA of rank r has (arXiv 2406.13175).

    target_modules, modules_to_save: as in LoraConfig.
    mask_type: "random". Another name is for a function of your own, which is set as `config.mask_fn` before the model
      is made: mask_fn(base_layer, r) gives a tensor [N, K] with r * (N + K) ones and zeros elsewhere.
    random_seed: of the random places; None: the same ones every time.
    fan_in_fan_out: only linear layers that keep their weight [out, in] can be adapted; it is set by the layers.
    init_weights: False draws the values, so that the adapter changes the model from the start.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "r")
    positive = ("r",)
    switches = ("fan_in_fan_out", "init_weights")

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    target_modules: set[str] | list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SHIRA
        self.mask_fn: Callable[..., Any] | None = random_mask if self.mask_type == "random" else None
        if self.mask_fn is None and not self.inference_mode:
            warnings.warn(
                f"mask_type {self.mask_type!r} is none that comes with SHiRA: set config.mask_fn to your function",
                stacklevel=3,
            )

    def check(self) -> None:
        super().check()
        if not isinstance(self.mask_type, str):
            raise TypeError(f"mask_type must be a name, got {self.mask_type!r}")
        seed = self.random_seed
        if seed is not None and (not is_integer(seed) or not -(2**63) <= seed < 2**64):
            raise ValueError(f"random_seed must be an integer of 64 bits, or None, got {seed!r}")
