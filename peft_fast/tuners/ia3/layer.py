"""(IA)^3 around linear layers and convolutions: y = l * base(x), or base(l * x) where the layer is a feedforward one.

The vectors of several active adapters are multiplied with each other.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.dispatch import Choice
from peft_fast.tuners.base_weight import is_conv1d, linear_features
from peft_fast.tuners.layer import BaseTunerLayer


class IA3Layer(BaseTunerLayer):
    """ia3_l: [N, 1] for the output, [1, K] for the input; of a convolution [1, channels, 1, ...] for either."""

    adapter_layer_names = ("ia3_l",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, is_feedforward: bool) -> None:
        super().__init__(base_layer)
        self.ia3_l = nn.ParameterDict()
        self.is_feedforward = is_feedforward
        self.in_features, self.out_features = self.features()
        self.update_layer(adapter_name, config, is_feedforward)

    def features(self) -> tuple[int, int]:
        return linear_features(self.get_base_layer())

    def shape(self) -> tuple[int, ...]:
        return (1, self.in_features) if self.is_feedforward else (self.out_features, 1)

    def update_layer(self, adapter_name: str, config: Any, is_feedforward: bool) -> None:
        """Add an adapter, not active yet. The same seed gives the same weights as in peft."""
        if is_feedforward != self.is_feedforward:
            what = {True: "input", False: "output"}
            raise ValueError(
                f"all adapters of a layer must scale the same: its {what[self.is_feedforward]} is scaled by those that "
                f"are there, and {adapter_name!r} would scale its {what[is_feedforward]}. Give feedforward_modules as "
                "they are in the other config"
            )
        vector = torch.randn(self.shape())
        self.ia3_l[adapter_name] = nn.Parameter(torch.ones_like(vector) if config.init_ia3_weights else vector)
        self.place_adapter(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.adapters_in_effect()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        factor = self.factor(names)
        if self.is_feedforward:
            return self.base_layer((x.to(factor.dtype) * factor).to(x.dtype), *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        return (y * factor).to(y.dtype)

    def factor(self, adapter_names: Sequence[str]) -> Tensor:
        """What the input or the output is multiplied by: [K] or [N], of a convolution [1, channels, 1, ...]."""
        product = self.ia3_l[adapter_names[0]]
        for name in adapter_names[1:]:
            product = product * self.ia3_l[name]
        return product.flatten()

    def factor_of_weight(self, adapter_names: Sequence[str]) -> Tensor:
        """The same for the base weight, in its layout: [1, K] or [N, 1], transposed for transformers' Conv1D."""
        vector = self.factor(adapter_names)
        by_column = self.is_feedforward != is_conv1d(self.get_base_layer())
        return vector[None] if by_column else vector[:, None]

    def shifted_weight(self, weight: Tensor, adapter_names: Sequence[str], sign: int) -> Tensor:
        if not adapter_names:
            return weight
        factor = self.factor_of_weight(adapter_names).to(weight)
        return weight * factor if sign > 0 else weight / factor

    def shifted_bias(self, bias: Tensor | None, adapter_names: Sequence[str], sign: int) -> Tensor | None:
        if bias is None or self.is_feedforward or not adapter_names:
            return None
        factor = self.factor(adapter_names).flatten().to(torch.promote_types(bias.dtype, torch.float32))
        return bias * factor if sign > 0 else bias / factor

    def must_keep_base(self, adapter_names: Sequence[str]) -> bool:
        """Dividing again is exact to rounding, but not by a zero."""
        return super().must_keep_base(adapter_names) or bool((self.factor(adapter_names) == 0).any())

    def unmerge(self) -> None:
        if self.merged and self._unmerged is None:
            warnings.warn(
                "the base weights are divided by the vectors of (IA)^3 that were merged: they are what they were up to "
                "rounding",
                stacklevel=2,
            )
        super().unmerge()

    def route(self, tokens: int) -> Choice:
        if not self.adapters_in_effect():
            return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")
        what = "input" if self.is_feedforward else "output"
        return Choice("base_layer", "added", f"the base layer is called, its {what} is multiplied by a vector")


class Linear(IA3Layer):
    """Around torch.nn.Linear, transformers' Conv1D and k-bit linear layers: x [..., K]."""


class _ConvNd(IA3Layer):
    def features(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        return base.in_channels, base.out_channels

    def shape(self) -> tuple[int, ...]:
        base: Any = self.get_base_layer()
        return (1, self.in_features if self.is_feedforward else self.out_features, *(1 for _ in base.kernel_size))

    def factor(self, adapter_names: Sequence[str]) -> Tensor:
        return super().factor(adapter_names).view(self.shape())

    def factor_of_weight(self, adapter_names: Sequence[str]) -> Tensor:
        """[out, in / groups or 1, 1, ...]"""
        base: Any = self.get_base_layer()
        factor = self.factor(adapter_names)
        if not self.is_feedforward:
            return factor.transpose(0, 1)
        by_group = factor.view(base.groups, -1, *factor.shape[2:])
        return by_group.repeat_interleave(self.out_features // base.groups, dim=0)


class Conv2d(_ConvNd):
    """Around torch.nn.Conv2d: x [batch, in, height, width]."""


class Conv3d(_ConvNd):
    """Around torch.nn.Conv3d: x [batch, in, depth, height, width]."""
