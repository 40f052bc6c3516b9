"""What the configs of methods that adapt layers have in common: the rules for their options, in one place.

A config names its options by rule (`positive`, `numbers`, ...). Options that say which modules are meant go by the same
rules in every config that has them.
"""

import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_fast.config import PeftConfig

PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")  # names, or one expression


@dataclass
class TunerConfig(PeftConfig):
    """Raises ValueError or TypeError for options that cannot be: when it is made, and again before it is used, as
    attributes can be set."""

    sets: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "feedforward_modules")  # lists become such
    positive: ClassVar[tuple[str, ...]] = ()  # integers from 1 on
    counts: ClassVar[tuple[str, ...]] = ()  # integers from 0 on
    numbers: ClassVar[tuple[str, ...]] = ()  # finite ones
    probabilities: ClassVar[tuple[str, ...]] = ()
    switches: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.sets:
            if isinstance(getattr(self, name, None), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self.check()

    def check(self) -> None:
        self._check_numbers()
        for name in self.switches:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, values in self.choices.items():
            value = getattr(self, name)
            if not any(value is one or (isinstance(one, str) and value == one) for one in values):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, values))}, got {value!r}")
        check_names(self)

    def _check_numbers(self) -> None:
        for name, value in self._values(self.positive):
            if not is_integer(value) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, value in self._values(self.counts):
            if not is_integer(value) or value < 0:
                raise ValueError(f"{name} must be an integer from 0 on, got {value!r}")
        for name, value in self._values(self.numbers):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        for name, value in self._values(self.probabilities):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability from 0 to 1, got {value!r}")

    def _values(self, names: tuple[str, ...]) -> list[tuple[str, Any]]:
        """These options, and the values that rank_pattern and alpha_pattern put in the place of r and alpha."""
        found = [(name, getattr(self, name)) for name in names]
        for name, option in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
            if name in names and hasattr(self, option):
                found += [(f"{option}[{key!r}]", value) for key, value in patterns_of(self, option).items()]
        return found


def patterns_of(config: Any, option: str) -> Mapping[str, Any]:
    value = getattr(config, option)
    if not isinstance(value, Mapping):
        raise TypeError(f"{option} must be a dict from patterns to numbers, got {value!r}")
    return value


def check_names(config: Any) -> None:
    """The options that say which modules are meant."""
    for name in PATTERNS:
        value = getattr(config, name, None)
        if isinstance(value, str):
            compiled(name, value)
        elif value is not None and not are_strings(value):
            raise TypeError(f"{name} must be names of modules or one regular expression, got {value!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(value := getattr(config, name, None), Mapping):
            for pattern in value:
                compiled(name, pattern)
    layers = getattr(config, "layers_to_transform", None)
    if layers is not None and not are_indices(layers):
        raise TypeError(f"layers_to_transform must be an index or a list of indices, got {layers!r}")
    if getattr(config, "layers_pattern", None) and layers is None:
        raise ValueError("layers_pattern needs layers_to_transform: the indices within that list of layers")
    saved = getattr(config, "modules_to_save", None)
    if saved is not None and not (are_strings(saved) and all(saved)):
        raise TypeError(f"modules_to_save must be a list of module names, got {saved!r}")


def compiled(name: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} must be a regular expression, got {text!r}: {error}") from error


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def are_indices(values: Any) -> bool:
    return all(is_integer(index) for index in (values if isinstance(values, (list, tuple, set)) else [values]))


def are_strings(values: Any) -> bool:
    """Whether it is a list of names, or a set, a dict's keys, ..."""
    is_list = isinstance(values, Collection) and not isinstance(values, (str, bytes, Mapping))
    return is_list and all(isinstance(value, str) for value in values)


def set_fan_in_fan_out(config: Any, conv1d: bool) -> None:
    """Only transformers' Conv1D keeps its weight [in, out]: peft sets the option by the layer with a warning, and so do
    we."""
    if config.fan_in_fan_out != conv1d:
        kind = "Conv1D layers, which keep" if conv1d else "linear layers, which do not keep"
        warnings.warn(f"the targets are {kind} their weight [in, out]: fan_in_fan_out is set to {conv1d}", stacklevel=2)
        config.fan_in_fan_out = conv1d


def check_rank_fits(ranks: Collection[int], tensors: Mapping[str, Any]) -> None:
    """Raise ValueError for a rank that no tensor of a file is for: before memory is taken for it."""
    shapes = [tuple(tensor.shape) for tensor in tensors.values() if hasattr(tensor, "shape")]
    largest = max((max(shape) for shape in shapes if shape), default=0)
    if largest and max(ranks) > largest:
        raise ValueError(
            f"the config says rank {max(ranks)}, and the file's tensors do not fit that: none has a dimension above "
            f"{largest}. Are adapter_config.json and the weights of one adapter?"
        )
