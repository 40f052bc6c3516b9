"""Options of single initialisations, as objects: fields of LoraConfig that are dicts in a file."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from peft_fast.option_help import with_help


@with_help
@dataclass
class LoftQConfig:
    """loftq_bits: 4 (NF4 in blocks of 64) or 8 (a scale a row). loftq_iter: how often quantising and decomposing
    alternate."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@with_help
@dataclass
class CordaConfig:
    """corda_method: "ipm" (the adapter gets the largest singular values: it learns fastest) or "kpm" (the smallest:
      what the sample data need stays in the base weight).
    cache_file, covariance_file: where preprocess_corda keeps its result and what it has counted, and takes them from
      where they are there.
    use_float16_for_covariance: half the memory, less exact. verbose: a progress bar. prune_temporary_fields: False
      leaves the covariances at the layers.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        _check_choice("corda_method", self.corda_method, ("ipm", "kpm"))


@with_help
@dataclass
class EvaConfig:
    """rho: how many times r a layer's rank may become, from 1 (every layer keeps r) on.
    tau: how alike a component has to be before and after a batch, as a cosine, to count as found.
    use_label_mask, label_mask_value: tokens with this label do not count, where the data have labels.
    whiten: divide each component by the root of its singular value.
    adjust_scaling_factors: change lora_alpha with a layer's rank, so that its scale stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        for name, least, most in (("rho", 1, math.inf), ("tau", 0, 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                reach = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise ValueError(f"{name} must be a number, {reach}, got {value!r}")


@with_help
@dataclass
class LoraGAConfig:
    """direction: which of the gradient's singular vectors A and B take, of 2 r: every other one ("ArBr"), A the second
    half and B the first ("A2rBr"), the reverse ("ArB2r"), or both the same at random ("random").
    scale: of B: "stable" (the fourth root of the out features, by the root of stable_gamma), "weight_svd" (the weight's
      largest singular value), "gd_scale" (both factors divided by the adapter's scale) or "unit" (none).
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        _check_choice("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        _check_choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        gamma = self.stable_gamma
        if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not gamma > 0:
            raise ValueError(f"stable_gamma must be a positive number, got {gamma!r}")


def made(name: str, value: Any, cls: Any) -> Any:
    """An option that is such an object, or a dict as a file has it, or None. Raises TypeError for anything else."""
    if value is None or isinstance(value, cls):
        return value
    known = [field.name for field in fields(cls)]
    if not isinstance(value, dict) or not set(value) <= set(known):
        raise TypeError(f"{name} must be a {cls.__name__}, or a dict of its options {known}, got {value!r}")
    return cls(**value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
