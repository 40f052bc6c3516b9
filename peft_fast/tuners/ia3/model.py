"""IA3Model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.modules_to_save import ModulesToSaveWrapper
from peft_fast.tuners.names import list_of_names
from peft_fast.tuners.targets import IA3_FEEDFORWARD, IA3_TARGETS

from .config import IA3Config
from .layer import Conv2d, Conv3d, IA3Layer, Linear


class IA3Model(BaseTuner):
    """`model` with (IA)^3 adapters in it."""

    prefix = "ia3_"
    target_module_mapping = IA3_TARGETS
    layer_classes: ClassVar = {nn.Conv2d: Conv2d, nn.Conv3d: Conv3d, nn.Linear: Linear}
    adapts_conv1d = True

    def put_in(
        self,
        adapter_name: str,
        config: Any,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        inner = self._feedforward(config)
        super().put_in(adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        config.feedforward_modules = inner

    def layer_options(self, path: str, config: Any) -> dict[str, Any]:
        inner = self._feedforward(config)
        if isinstance(inner, str):
            return {"is_feedforward": re.fullmatch(inner, path) is not None}
        return {"is_feedforward": path.endswith(tuple(inner))}

    def _feedforward(self, config: Any) -> set[str] | str:
        if config.feedforward_modules is not None:
            return config.feedforward_modules
        model_type = getattr(getattr(self.model, "config", None), "model_type", None)
        if str(model_type) not in IA3_FEEDFORWARD:
            raise ValueError(
                f"feedforward_modules must be given for a model of type {model_type!r}: there is no default for it. [] "
                "means none"
            )
        return set(IA3_FEEDFORWARD[str(model_type)])

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add a new adapter, neither active nor trained, whose vectors are the sums of those of `adapters` with these
        `weights`; where one of them has no vector, it adds nothing.

        Raises ValueError, and leaves the model as it was, for adapters that cannot be combined. An adapter of this name
        that is there already stays as it is.
        """
        if adapter_name in self.peft_config:
            return
        names = list(list_of_names("adapters", adapters))
        self._check_known(names)
        if not names or len(names) != len(weights):
            raise ValueError(f"one weight is needed for each adapter, got {names} and {list(weights)}")
        wrappers = [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]
        if any(sum(name in wrapper.modules_to_save for name in names) > 1 for wrapper in wrappers):
            raise ValueError(f"adapters {names} have copies of the same module in modules_to_save, which have no sum")
        configs: list[IA3Config] = [self.peft_config[name] for name in names]  # type: ignore[misc]
        both: dict[str, Any] = {name: _union(name, [getattr(config, name) for config in configs]) for name in _UNITED}
        self.put_in(adapter_name, replace(configs[0], **both))
        for _, layer in self.layers():
            if isinstance(layer, IA3Layer) and adapter_name in layer.ia3_l:
                _sum_into(layer, adapter_name, list(zip(names, weights)))
        self.set_requires_grad(adapter_name, False)


_UNITED = ("target_modules", "feedforward_modules")


def _union(name: str, values: list[Any]) -> set[str] | str:
    if all(isinstance(value, str) for value in values):
        return "|".join(f"({value})" for value in values)
    if any(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be names in all configs, or expressions in all, to be combined, got {values}")
    return set().union(*values)


@torch.no_grad()
def _sum_into(layer: IA3Layer, adapter_name: str, weights: list[tuple[str, float]]) -> None:
    total: Any = layer.ia3_l[adapter_name].zero_()
    for name, weight in weights:
        if name in layer.ia3_l:
            total += weight * layer.ia3_l[name]
