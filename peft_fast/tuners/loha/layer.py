"""LoHa around linear layers and convolutions.

The elementwise product of two matrices of rank r has a rank of r * r at most, and is the product of a [N, r * r] and a
[r * r, K] made of theirs: x goes through these, as through a LoRA adapter of that rank, where that takes fewer
operations than making the delta [N, K] does, and the delta where it does not.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast.dispatch import Choice
from peft_fast.tuners.lycoris import LycorisLayer

MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
KERNELS = ("hada_t1", "hada_t2")


class LoHaLayer(LycorisLayer):
    """hada_w1_a, hada_w2_a [N, r], hada_w1_b, hada_w2_b [r, K]; where kernels are taken apart too hada_t1, hada_t2
    [r, r, *kernel], and the others [r, N] and [r, K]."""

    hada_w1_a: nn.ParameterDict
    hada_w1_b: nn.ParameterDict
    hada_w2_a: nn.ParameterDict
    hada_w2_b: nn.ParameterDict
    hada_t1: nn.ParameterDict
    hada_t2: nn.ParameterDict
    method = "loha"
    adapter_layer_names = (*MATRICES, *KERNELS)

    def make_weights(self, adapter_name: str, r: int, config: Any) -> None:
        out, into, *kernel = self.weight_shape(config.use_effective_conv2d)
        shapes = dict.fromkeys(("hada_w1_a", "hada_w2_a"), (r, out) if kernel else (out, r))
        shapes |= dict.fromkeys(("hada_w1_b", "hada_w2_b"), (r, into))
        if kernel:
            shapes |= dict.fromkeys(KERNELS, (r, r, *kernel, 1)[:4])  # type: ignore[arg-type]
        for name, shape in shapes.items():
            getattr(self, name)[adapter_name] = nn.Parameter(torch.empty(shape))
        for name in (*MATRICES, *(KERNELS if kernel else ())):  # in peft's order, for the same numbers
            if name == "hada_w2_b" and config.init_weights:
                nn.init.zeros_(self.hada_w2_b[adapter_name])
            else:
                nn.init.kaiming_uniform_(getattr(self, name)[adapter_name], a=math.sqrt(5))

    def matrices(self, name: str) -> list[Tensor]:
        return [getattr(self, attribute)[name] for attribute in MATRICES]

    def delta(self, name: str, dtype: torch.dtype) -> Tensor:
        """[N, K], or of a convolution [N, K, *kernel], in the base weight's shape."""
        w1a, w1b, w2a, w2b = (matrix.to(dtype) for matrix in self.matrices(name))
        if name in self.hada_t1:
            first, second = (t[name].to(dtype) for t in (self.hada_t1, self.hada_t2))
            one = torch.einsum("ijkl,jr,ip->prkl", first, w1b, w1a)
            delta = one * torch.einsum("ijkl,jr,ip->prkl", second, w2b, w2a)
        else:
            delta = (w1a @ w1b) * (w2a @ w2b)
        base: Any = self.get_base_layer()
        shape = base.weight.shape if isinstance(base, (nn.Conv1d, nn.Conv2d)) else delta.shape
        return (self.scaling[name] * delta).reshape(shape)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.delta(adapter, torch.promote_types(self.hada_w1_a[adapter].dtype, torch.float32))


class Linear(LoHaLayer):
    """LoHa around torch.nn.Linear and k-bit linear layers: x [..., K]."""

    def change(self, name: str, x: Tensor) -> Tensor:
        if not self.is_factored(name, x.numel() // max(x.shape[-1], 1)):
            return F.linear(x, self.delta(name, x.dtype))
        w1a, w1b, w2a, w2b = self.matrices(name)
        down = (w1b[:, None] * w2b[None]).flatten(0, 1)  # [r * r, K]
        up = (w1a[:, :, None] * w2a[:, None]).flatten(1)  # [N, r * r]
        return F.linear(F.linear(x, down), self.scaling[name] * up)

    def is_factored(self, name: str, tokens: int) -> bool:
        """Whether products of rank r * r take fewer operations than the delta."""
        (N, _), (r, K) = self.hada_w1_a[name].shape, self.hada_w1_b[name].shape
        return (tokens + 1) * r * r * (N + K) < (tokens + 2 * r + 1) * N * K

    def route(self, tokens: int) -> Choice:
        names = self.adapters_in_effect()
        if not names:
            return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")
        r = self.r[names[0]]
        how = f"two products of rank {r * r}" if self.is_factored(names[0], tokens) else "the delta as a matrix"
        return Choice("linear", "added", f"the base layer is called; {how} takes fewer operations than the other way")


class _ConvNd(LoHaLayer):
    def change(self, name: str, x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        return base._conv_forward(x, self.delta(name, x.dtype), None)

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice("convolution", "added", "torch's own convolutions compute the base layer and the delta")
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")


class Conv1d(_ConvNd):
    """LoHa around torch.nn.Conv1d: x [batch, in, length]."""


class Conv2d(_ConvNd):
    """LoHa around torch.nn.Conv2d: x [batch, in, height, width]."""
