"""Layers whose adapters have a scale, which can be changed afterwards."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from .layer import BaseTunerLayer


class ScaledLayer(BaseTunerLayer):
    """`scaling`: the number that each adapter's output is multiplied by."""

    scaling: dict[str, Any]  # floats, or tensors of one element

    def initial_scale(self, adapter: str) -> float:
        """What the adapter's config says."""
        raise NotImplementedError

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make an adapter's scale `scale` times what its config says. A layer without this adapter stays as it is."""
        factor = checked_factor("scale", scale)
        if adapter in self.scaling:
            self._set_scales({adapter: factor * self.initial_scale(adapter)})

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        factor = checked_factor("scale", scale)
        if factor != 1:
            self._set_scales({name: self.scaling[name] * factor for name in self._scaled()})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters, or, without a number, make them what the config says."""
        if scale is None:
            return self._set_scales({name: self.initial_scale(name) for name in self._scaled()})
        divisor = checked_factor("scale", scale)
        if divisor == 0:
            raise ValueError("scale must not be 0: dividing by it has no result; unscale_layer() undoes scale_layer(0)")
        return self._set_scales({name: self.scaling[name] / divisor for name in self._scaled()})

    def _scaled(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.scaling]

    def _set_scales(self, scales: dict[str, float]) -> None:
        self._check_unmerged(name for name, scale in scales.items() if scale != self.scaling[name])
        for name, scale in scales.items():
            if isinstance(self.scaling[name], Tensor):  # see utils.hotswap
                self.scaling[name].fill_(scale)
            else:
                self.scaling[name] = scale

    def _check_unmerged(self, adapters: Iterable[str]) -> None:
        merged = [name for name in adapters if name in self.merged_adapters]
        if merged:
            raise ValueError(f"adapters {merged} are merged with the scale that they have: call unmerge_adapter first")


def checked_factor(name: str, value: Any) -> float:
    """A number of Python's or numpy's, or a tensor of one element without gradients, as a float."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        if value.requires_grad:
            raise TypeError(f"{name} must be a number, got a tensor that is trained: scales are not, detach() it")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return value
