"""A module of the base model and trained copies of it, one for each adapter; the active one's is called instead."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.dispatch import Choice
from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.names import list_of_names
from peft_fast.tuners.offload import onloaded, trainable_copy


class LNTuningLayer(BaseTunerLayer):
    """`ln_tuning_layers`: the copies. One of them at most is active, and one at most is merged: its values are then in
    the base model's own module."""

    adapter_layer_names = ("ln_tuning_layers",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any) -> None:
        super().__init__(base_layer)
        plain = {name for name, _ in base_layer.named_parameters()} <= {"weight", "bias"}
        self.weight_name = "weight" if plain and hasattr(base_layer, "weight") else ""
        self.ln_tuning_layers = nn.ModuleDict()
        self._originals: dict[str, Tensor] = {}  # the base layer's values, while a copy's are in their place
        self.update_layer(adapter_name, config)

    @torch.no_grad()
    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter, not active yet: a copy of the module as it is in the base model."""
        self.ln_tuning_layers[adapter_name] = copied = trainable_copy(self.base_layer)
        own = _tensors(copied)
        for name, value in self._originals.items():
            own[name].copy_(value)

    def base_weight(self) -> Tensor:
        return next(self.base_layer.parameters())

    def check_set_adapter(self, adapter_names: Sequence[str]) -> None:
        here = [name for name in adapter_names if name in self.ln_tuning_layers]
        if len(here) > 1:
            raise ValueError(
                f"adapters {here} each have a copy of the same module, and outputs of whole modules cannot be summed: "
                "take one of them"
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.adapters_in_effect()
        self.check_set_adapter(names)
        module = self.ln_tuning_layers[names[0]] if names else self.base_layer
        return module(x, *args, **kwargs)

    def adapters_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        wanted = self.active_adapters if adapter_names is None else list_of_names("adapter_names", adapter_names)
        here = [name for name in wanted if name in self.ln_tuning_layers]
        self.check_set_adapter(here)
        names = [name for name in here if name not in self.merged_adapters]
        if names and self.merged:
            warnings.warn(f"{self.merged_adapters} are merged already: they are unmerged first", stacklevel=4)
        return names

    def merge_problem(self, adapter_names: Sequence[str]) -> str | None:
        copies = [self.ln_tuning_layers[name] for name in adapter_names]
        if all(bool(parameter.isfinite().all()) for copied in copies for parameter in copied.parameters()):
            return None
        return f"merging {list(adapter_names)} gives inf or NaN: the adapter is broken; nothing was merged"

    @torch.no_grad()
    def add_to_base(self, adapter_names: Sequence[str], undoable: bool = True) -> None:
        if not adapter_names:
            return
        if self.merged:
            self.unmerge()
        (name,) = adapter_names
        before = self._write(_tensors(self.ln_tuning_layers[name]))
        self._originals = before if undoable else {}
        self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to undo", stacklevel=2)
            return
        self._write(self._originals)
        self._originals = {}
        self.merged_adapters.clear()

    def _write(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write `values` into the base layer. What was there."""
        with ExitStack() as stack:
            for inner in self.base_layer.modules():
                stack.enter_context(onloaded(inner, changed=True))
            own = _tensors(self.base_layer)
            before = {name: own[name].clone() for name in values}
            for name, value in values.items():
                own[name].copy_(value)
        return before

    @torch.no_grad()
    def shifted_base(self, adapter_names: Sequence[str], sign: int = 1) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of an adapter's copy, or the base layer's own for none: for merge_to_16bit."""
        source: Any = self.ln_tuning_layers[adapter_names[0]] if adapter_names else self.base_layer
        wide = torch.promote_types(source.weight.dtype, torch.float32)
        return source.weight.to(wide), getattr(source, "bias", None)

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice("copy", "copy", "the adapter's copy of the module is called in its place")
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")

    def __repr__(self) -> str:
        return f"ln_tuning.{super().__repr__()}"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
