"""LoRA around torch.nn.Conv1d, Conv2d and Conv3d: y = conv(x) + sum over active adapters of scale * B(A(dropout(x))).

A is a convolution of the base layer's kernel, stride and padding to r channels, B one of kernel 1 from these, both of
the base layer's class and by torch's own kernels (cuDNN on a GPU).
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.dispatch import Choice
from peft_fast.tuners.mixed_batch import one_by_one

from . import dora
from .config import LoraConfig
from .constants import WithConstants


class _ConvNd(WithConstants):
    adds_to_weight = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: LoraConfig, r: int, lora_alpha: float):
        super().__init__(base_layer)
        base: Any = self.get_base_layer()
        self.in_features: int = base.in_channels
        self.out_features: int = base.out_channels
        if base.padding == "same" and any(step != 1 for step in base.dilation):
            raise ValueError(
                "LoRA cannot adapt a convolution with padding='same' and dilation: A would have to be dilated too, and "
                "is not in peft, so that an adapter would mean two things. Give the padding in numbers"
            )
        self.update_layer(adapter_name, r, lora_alpha, config)
        if base.groups > 1:
            warnings.warn(
                f"the adapter of a convolution of {base.groups} groups mixes channels that the layer keeps apart: it "
                "cannot be merged",
                stacklevel=2,
            )

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig) -> None:
        base: Any = self.get_base_layer()
        if r % base.groups:
            raise ValueError(
                f"the rank must be divisible by the {base.groups} groups of a {type(base).__name__}, got {r}: give "
                "these layers another with rank_pattern, or leave them out"
            )
        if config.use_dora:
            self._check_can_be_merged("use_dora is not for")
        super().update_layer(adapter_name, r, lora_alpha, config)

    def make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        base: Any = self.get_base_layer()
        convolution, one = type(base), (1,) * len(base.kernel_size)
        self.lora_A[adapter_name] = convolution(
            self.in_features, r, base.kernel_size, base.stride, base.padding, base.dilation, bias=False
        )
        self.lora_B[adapter_name] = convolution(
            r, self.out_features, one, one, groups=base.groups, bias=config.lora_bias
        )  # fmt: skip

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """[out, in, *kernel]. NotImplementedError with groups: A mixes what the base layer keeps apart."""
        self._check_can_be_merged("an adapter cannot be merged into")
        A, B = self.factors(adapter)
        wide = torch.promote_types(A.weight.dtype, torch.float32)
        delta = B.weight.to(wide).flatten(1) @ A.weight.to(wide).flatten(1)
        return self.scaling[adapter] * delta.view(-1, *A.weight.shape[1:])

    def adapters_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = super().adapters_to_merge(adapter_names)
        if names:
            self._check_can_be_merged("an adapter cannot be merged into")
        return names

    def _check_can_be_merged(self, what: str) -> None:
        base: Any = self.get_base_layer()
        if base.groups > 1:
            raise NotImplementedError(
                f"{what} a convolution of {base.groups} groups: an adapter mixes channels that the layer keeps apart. "
                "Keep it as plain LoRA, unmerged"
            )
        if base.padding_mode != "zeros":
            raise NotImplementedError(
                f"{what} a convolution with padding_mode {base.padding_mode!r}: an adapter pads with zeros itself, as "
                "in peft. Keep it as plain LoRA, unmerged"
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.mixed_batch is not None:
            return one_by_one(self, x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        out = y
        for name in self.adapters_in_effect():
            A, B = self.factors(name)
            if name in self.lora_magnitude_vector:
                out = self._with_magnitude(name, x, out)
            else:
                out = out + self.scaling[name] * B(A(self.dropped(name, x)))
        return out.to(y.dtype)

    def _with_magnitude(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """DoRA: see dora.py."""
        base: Any = self.get_base_layer()
        (A, B), dropout, d = self.factors(name), self.lora_dropout[name], self.dropped(name, x)
        one = [1 for _ in base.kernel_size]
        factor = dora.factor(self, name).view(1, -1, *one)
        lora = self.scaling[name] * B(A(d))
        if isinstance(dropout, nn.Dropout) and dropout.training:
            of_dropped = base._conv_forward(d.to(base.weight.dtype), base.weight, None)
        else:
            of_dropped = y if base.bias is None else y - base.bias.view(1, -1, *one)
        return y + (factor - 1) * of_dropped + factor * lora

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice("convolution", "added", "torch's own convolutions compute the base layer, A and B")
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")


class Conv1d(_ConvNd):
    """LoRA around torch.nn.Conv1d: x [batch, in, length]."""

    dora_layer = dora.DoraConv1dLayer


class Conv2d(_ConvNd):
    """LoRA around torch.nn.Conv2d: x [batch, in, height, width]."""

    dora_layer = dora.DoraConv2dLayer


class Conv3d(_ConvNd):
    """LoRA around torch.nn.Conv3d: x [batch, in, depth, height, width]."""

    dora_layer = dora.DoraConv3dLayer
