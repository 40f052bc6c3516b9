"""What a method needs that is a config, a layer for each kind of base layer, and a formula: and no more than that.

A method declares its options (MethodConfig), its weights and what they do to a layer (MethodLayer), and which kinds of
base layers that is for (MethodTuner). Injection, activation, merging, status and files are the shared mechanism's.
"""

import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_fast.config import PeftConfig
from peft_fast.dispatch import Choice

from .base import BaseTuner
from .base_weight import is_bypassed, is_conv1d, is_dense_linear, linear_features, quantized_weight
from .layer import BaseTunerLayer
from .targets import LORA_TARGETS


@dataclass
class MethodConfig(PeftConfig):
    """Lists of targets become sets, as in peft. Raises ValueError or TypeError for options that cannot be."""

    positive: ClassVar[tuple[str, ...]] = ()  # integers from 1 on
    counts: ClassVar[tuple[str, ...]] = ()  # integers from 0 on
    numbers: ClassVar[tuple[str, ...]] = ()  # finite ones
    probabilities: ClassVar[tuple[str, ...]] = ()
    switches: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name, None), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self.check()

    def check(self) -> None:
        for names, least in ((self.positive, 1), (self.counts, 0)):
            for name in names:
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    rule = "a positive integer" if least else "an integer from 0 on"
                    raise ValueError(f"{name} must be {rule}, got {value!r}")
        for name in (*self.numbers, *self.probabilities):
            value = getattr(self, name)
            is_number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
            if name in self.probabilities and not (is_number and 0 <= value <= 1):
                raise ValueError(f"{name} must be a probability from 0 to 1, got {value!r}")
            if not is_number:
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        for name in self.switches:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, values in self.choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, values))}, got {getattr(self, name)!r}")
        self._check_targets()

    def _check_targets(self) -> None:
        options: Any = self
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(options, name, None)
            if isinstance(value, str):
                check_expression(name, value)
            elif value is not None and not _are_names(value):
                raise TypeError(f"{name} must be names of modules or one regular expression, got {value!r}")
        layers = options.layers_to_transform
        indices = layers if isinstance(layers, (list, tuple, set)) else [layers]
        if layers is not None and any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
            raise TypeError(f"layers_to_transform must be an index or a list of indices, got {layers!r}")
        if options.layers_pattern and layers is None:
            raise ValueError("layers_pattern needs layers_to_transform: the indices within that list of layers")
        saved = options.modules_to_save
        if saved is not None and not _are_names(saved):
            raise TypeError(f"modules_to_save must be a list of module names, got {saved!r}")


def refuse_layers_with_expression(options: Any) -> None:
    """Raise ValueError where target_modules is an expression and the layers are numbered besides: for methods in which
    peft has them exclude each other."""
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(options.target_modules, str) and getattr(options, name) is not None:
            raise ValueError(
                f"{name} needs target_modules as a list, got the string {options.target_modules!r}: put the layer "
                "indices into the regular expression, or give the names as a list"
            )


def check_expression(name: str, text: str) -> None:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} must be a regular expression, got {text!r}: {error}") from error


def _are_names(value: Any) -> bool:
    is_list = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
    return is_list and all(isinstance(one, str) for one in value)


class MethodLayer(BaseTunerLayer):
    """Around one base layer. A method's layers say `make_weights`, and `adapted` or a forward of their own.

    method        what is said before the class's name
    module_names  those of adapter_layer_names whose entries are modules and not parameters
    how           what is said of a forward with adapters, for `explain`
    """

    method: ClassVar[str]
    module_names: ClassVar[tuple[str, ...]] = ()
    how: ClassVar[str] = "torch computes the adapters, and the base layer is called"

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, **options: Any) -> None:
        super().__init__(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict() if name in self.module_names else nn.ParameterDict())
        for name in self.other_param_names:
            setattr(self, name, {})
        self.update_layer(adapter_name, config=config, **options)

    def update_layer(self, adapter_name: str, *, config: Any, **options: Any) -> None:
        """Add an adapter, not active yet. The same seed gives the same weights as in peft."""
        self.make_weights(adapter_name, config, **options)
        self.place_adapter(adapter_name)

    def make_weights(self, adapter_name: str, config: Any) -> None:
        raise NotImplementedError

    def weight_shape(self) -> tuple[int, int]:
        """(out, in) of a linear layer; of a convolution `in` counts every input of a patch; (rows, size) of a table."""
        base: Any = self.get_base_layer()
        if isinstance(base, (nn.Conv2d, nn.Embedding)):
            return base.weight.shape[0], base.weight[0].numel()
        K, N = linear_features(base)
        return N, K

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.adapters_in_effect()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted(names, x, *args, **kwargs)

    def adapted(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with these adapters in effect."""
        raise NotImplementedError

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype) if self.cast_input_dtype_enabled else x

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice(type(self).__name__, "added", self.how)
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")

    def __repr__(self) -> str:
        return f"{self.method}.{super().__repr__()}"


class Unscaled(MethodLayer):
    """A layer whose adapters are rotations, which have no scale: it stays 1, with a warning, as in peft."""

    def set_scale(self, adapter: str, scale: float) -> None:
        if self.has_adapter(adapter):
            self._warn()

    def scale_layer(self, scale: float) -> None:
        if scale != 1 and any(map(self.has_adapter, self.active_adapters)):
            self._warn()

    def unscale_layer(self, scale: float | None = None) -> None:
        if any(map(self.has_adapter, self.active_adapters)):
            self._warn()

    def _warn(self) -> None:
        warnings.warn(f"{self.method} rotates, and a rotation has no scale: it stays 1", stacklevel=3)


class MethodTuner(BaseTuner):
    """layer_classes: {kind of layer of the base model: the class that takes its place}; nn.Linear stands for k-bit
    linear layers too, and for transformers' Conv1D where `adapts_conv1d`."""

    target_module_mapping = LORA_TARGETS
    layer_classes: ClassVar[Mapping[type[nn.Module], type[MethodLayer]]]
    adapts_conv1d: ClassVar[bool] = False

    def adapt(self, target: nn.Module, path: str, adapter_name: str, config: Any) -> nn.Module:
        options = self.layer_options(path, config)
        if isinstance(target, MethodLayer) and type(target) in self.layer_classes.values():
            target.update_layer(adapter_name, config=config, **options)
            return target
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        cls = None if is_bypassed(target) else self._layer_class(base)
        if cls is None:
            kinds = ", ".join(kind.__name__ for kind in self.layer_classes)
            raise ValueError(
                f"{type(self).__name__.removesuffix('Model')} cannot adapt {path}, a {type(base).__name__}: it adapts "
                f"layers that are called, of the kinds {kinds}. Name other target_modules, or use exclude_modules"
            )
        if hasattr(config, "fan_in_fan_out") and config.fan_in_fan_out != is_conv1d(base):
            config.fan_in_fan_out = is_conv1d(base)
            kind = "Conv1D layers, which keep" if config.fan_in_fan_out else "layers that do not keep"
            warnings.warn(f"the targets are {kind} their weight [in, out]: fan_in_fan_out is set right", stacklevel=2)
        return cls(target, adapter_name, config=config, **options)

    def layer_options(self, path: str, config: Any) -> dict[str, Any]:
        """What a layer's weights are made with, beside the config."""
        return {}

    def _layer_class(self, base: nn.Module) -> type[MethodLayer] | None:
        found = next((cls for kind, cls in self.layer_classes.items() if isinstance(base, kind)), None)
        linear = is_dense_linear(base) and (self.adapts_conv1d or not is_conv1d(base))
        return self.layer_classes.get(nn.Linear) if linear or quantized_weight(base) is not None else found
