"""What a PeftModel says of its adapters: their configs, and which of them are active."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import PeftConfig, checked_config


class KnowsAdapters(nn.Module):
    """A part of PeftModel."""

    base_model: Any
    _tuner: Any
    _is_prompt_learning: bool
    _adapters_disabled: bool
    _label: tuple[str, list[str]] | None = None  # what active_adapter was set to, and what was active then

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self._tuner.peft_config

    @peft_config.setter
    def peft_config(self, value: Mapping[str, PeftConfig]) -> None:
        """Other configs for the adapters that are there: the layers stay. Raises ValueError for other names."""
        there = self.peft_config
        if not isinstance(value, Mapping) or value.keys() != there.keys():
            names = sorted(value) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise ValueError(
                f"peft_config must be a dict with a config for each adapter of the model, {sorted(there)}, got {names}:"
                " add_adapter and delete_adapter change which there are"
            )
        self._tuner.peft_config = {name: checked_config(config) for name, config in value.items()}

    @property
    def active_adapters(self) -> list[str]:
        return self._tuner.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name; a list unless it is exactly one.

        Setting it says which adapter's config active_peft_config is, and which prompt is used where prompts are
        learned. As in peft it changes nothing in the model's layers, which is warned of: `set_adapter` does.
        """
        names = self.active_adapters
        if self._label is not None and self._label[1] == names:
            return self._label[0]
        return names[0] if len(names) == 1 else names

    @active_adapter.setter
    def active_adapter(self, name: str) -> None:
        if not isinstance(name, str) or name not in self.peft_config:
            raise ValueError(f"active_adapter must be one of the adapters {sorted(self.peft_config)}, got {name!r}")
        if self._is_prompt_learning:
            self._tuner.activate([name])
            return
        if [name] != self.active_adapters:
            warnings.warn(
                f"active_adapter = {name!r} names a config: in the layers {self.active_adapters} stay active. "
                f"set_adapter({name!r}) activates it there",
                stacklevel=2,
            )
        self._label = (name, list(self.active_adapters))

    @property
    def active_peft_config(self) -> PeftConfig:
        name = self.active_adapter
        if not name:
            raise ValueError("no adapter is active: every one was deleted")
        return self.peft_config[name if isinstance(name, str) else name[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether some adapter is active and adapters are not switched off."""
        if self._is_prompt_learning:
            return bool(self.active_adapters) and not self._adapters_disabled
        return bool(self.active_adapters) and not all(
            holder.disable_adapters for _, holder in self.base_model.holders()
        )

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model, "dtype", None)

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None
