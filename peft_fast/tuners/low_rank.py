"""Linear layers whose adapters are products of two factors that a method computes from its own weights:

    y = x W^T + bias + sum over active adapters of (dropout(x) A^T) B^T

LoRA's ops take the factors as they are, so that such a method has LoRA's routes: one call of ops.lora_linear does the
base layer and the first adapter, in Triton on a GPU.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast import ops
from peft_fast.dispatch import Choice
from peft_fast.quant.weight import QuantizedWeight

from .base_weight import is_conv1d, is_touched, linear_features, matmul_weight
from .layer import BaseTunerLayer


def call_of(
    base_layer: Any, weight: Tensor | QuantizedWeight, tokens: int, R: int = 0, p: float = 0.0, trained: bool = False
) -> ops.Call:
    """The call that a forward of so many tokens, in the layer's own dtype, makes: what ops choose a route by."""
    dtype = getattr(base_layer, "compute_dtype", None) or weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    fmt = str(weight.format) if isinstance(weight, QuantizedWeight) else ""
    N, K = weight.shape
    return ops.Call(weight.device, dtype, tokens, N, K, R, fmt, p, trained)


class LowRankLinear(BaseTunerLayer):
    """Around torch.nn.Linear, transformers' Conv1D and k-bit linear layers: x [..., K] -> [..., N] in x's dtype
    (autocast's where that is on)."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = linear_features(self.get_base_layer())
        self.fan_in_fan_out = is_conv1d(self.get_base_layer())

    def product(self, name: str) -> tuple[Tensor, Tensor]:
        """A [R, K] and B [N, R] with all scales in them, differentiable."""
        raise NotImplementedError

    def dropout_of(self, name: str) -> nn.Module:
        """The module that drops elements of the adapter's input: nn.Dropout, or nn.Identity."""
        raise NotImplementedError

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """[N, K] in fp32; [K, N] for transformers' Conv1D, as it keeps its weight."""
        A, B = self.product(adapter)
        wide = torch.promote_types(A.dtype, torch.float32)
        delta = B.to(wide) @ A.to(wide)
        return delta.t() if self.fan_in_fan_out else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.adapters_in_effect()
        weight = None if args or kwargs else matmul_weight(self.base_layer)
        if not isinstance(weight, QuantizedWeight):
            if weight is None or not adapters or self._calls_dropout(adapters[0]):
                return self._plus(self.base_layer(x, *args, **kwargs), x, adapters)
            return self._plus(self._base_and(adapters[0], x, weight, None), x, adapters[1:])
        # A k-bit layer may say in which dtype to compute; an autocast region says so for every layer.
        autocasting = torch.is_autocast_enabled(x.device.type)
        dtype = None if autocasting else getattr(self.base_layer, "compute_dtype", None)
        z = x if dtype is None else x.to(dtype)
        if adapters and not self._calls_dropout(adapters[0]):
            y = self._plus(self._base_and(adapters[0], x, weight, dtype), z, adapters[1:])
        else:
            y = self._plus(ops.quant_matmul(z, weight, self.bias, backend=self.backend), z, adapters)
        return y if dtype is None else y.to(x.dtype)

    def _base_and(self, name: str, x: Tensor, weight: Tensor | QuantizedWeight, dtype: torch.dtype | None) -> Tensor:
        """The base layer and one adapter in one op, computed in `dtype` (default: autocast's or x's)."""
        A, B = self.product(name)
        return ops.lora_linear(
            x, weight, A, B, 1.0, self.bias, dtype=dtype, backend=self.backend, **self._dropout(name, x)
        )  # fmt: skip

    def _plus(self, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """y plus what these adapters make of x."""
        for name in names:
            A, B = self.product(name)
            if self._calls_dropout(name):
                y = y + F.linear(F.linear(self.dropout_of(name)(x.to(A.dtype)), A), B).to(y.dtype)
                continue
            s = ops.lora_down(x, A, backend=self.backend, **self._dropout(name, x))
            y = ops.lora_up_add(y, s.to(y.dtype), B, 1.0, backend=self.backend)
        return y

    def _calls_dropout(self, name: str) -> bool:
        """Whether the module that drops out has to be called: it is not torch's own, or has hooks."""
        dropout = self.dropout_of(name)
        return type(dropout) not in (nn.Identity, nn.Dropout) or is_touched(dropout)

    def dropout_p(self, name: str) -> float:
        """With which probability the adapter drops an element of its input now: 0 in eval mode."""
        dropout = self.dropout_of(name)
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _dropout(self, name: str, x: Tensor) -> dict[str, Any]:
        p = self.dropout_p(name)
        return {"dropout_p": p, "dropout_key": ops.new_dropout_key(x.device)} if p else {}

    def route(self, tokens: int) -> Choice:
        weight, adapters = matmul_weight(self.base_layer), self.adapters_in_effect()
        if not adapters:
            reason = f"the adapters are {self.why_idle()}"
            if not isinstance(weight, QuantizedWeight):
                return Choice("base_layer", "base", reason)
            base = ops.choose_product(call_of(self.base_layer, weight, tokens), self.backend)
            return Choice("base_layer", "base", f"{reason}; {base.route} by {base.backend}", base.backend)
        if self._calls_dropout(adapters[0]):
            return Choice("lora_linear", "added", "a dropout is not torch's own, or has hooks: it is called")
        if weight is None:
            return Choice("lora_up_add", "added", "the base layer has hooks or a forward of its own: it is called")
        with torch.no_grad():
            R = len(self.product(adapters[0])[0])
        trained = any(parameter.requires_grad for parameter in self.adapter_parameters(adapters[0]))
        call = call_of(self.base_layer, weight, tokens, R, self.dropout_p(adapters[0]), trained)
        choice = ops.choose(call, self.backend)
        return replace(choice, because=f"{choice.because}; factors of rank {R} made of the adapter's weights")
