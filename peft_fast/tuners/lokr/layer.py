"""LoKr around linear layers and convolutions.

A Kronecker product need not be made to multiply by it: with x as a matrix [c, d], (W1 (x) W2) x is W1 x W2^T. That
takes b * c * (a + d) operations a token in one order and a * d * (b + c) in the other, where the delta [a * b, c * d]
takes a * b * c * d and has to be made first: x goes the cheapest way.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast.dispatch import Choice
from peft_fast.tuners.lycoris import LycorisLayer

FIRST = ("lokr_w1", "lokr_w1_a", "lokr_w1_b")
SECOND = ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
WAYS = {"delta": "the delta as a matrix", "first": "W1, then W2", "second": "W2, then W1"}


class LoKrLayer(LycorisLayer):
    """lokr_w1 [a, c], or lokr_w1_a [a, r] and lokr_w1_b [r, c]; lokr_w2 [b, d, *kernel], or lokr_w2_a [b, r] and
    lokr_w2_b [r, d * kernel]; where kernels are taken apart too lokr_t2 [r, r, *kernel], and lokr_w2_a [r, b],
    lokr_w2_b [r, d]. N = a * b, K = c * d."""

    lokr_w1: nn.ParameterDict
    lokr_w1_a: nn.ParameterDict
    lokr_w1_b: nn.ParameterDict
    lokr_w2: nn.ParameterDict
    lokr_w2_a: nn.ParameterDict
    lokr_w2_b: nn.ParameterDict
    lokr_t2: nn.ParameterDict
    method = "lokr"
    adapter_layer_names = (*FIRST, *SECOND)

    def make_weights(self, adapter_name: str, r: int, config: Any) -> None:
        (a, b), (c, d), kernel = self.factors(config.decompose_factor)
        whole = not (config.decompose_both and r < max(a, c) / 2)
        shapes: dict[str, tuple[int, ...]] = (
            {"lokr_w1": (a, c)} if whole else {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)}
        )
        if r >= max(b, d) / 2:
            shapes["lokr_w2"] = (b, d, *kernel)
        elif config.use_effective_conv2d and any(size != 1 for size in kernel):
            shapes |= {"lokr_t2": (r, r, *kernel, 1)[:4], "lokr_w2_a": (r, b), "lokr_w2_b": (r, d)}
        else:
            shapes |= {"lokr_w2_a": (b, r), "lokr_w2_b": (r, d * math.prod(kernel))}
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[config.init_weights]
        for name, shape in shapes.items():
            getattr(self, name)[adapter_name] = nn.Parameter(torch.empty(shape))
        order = (*FIRST, "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        if config.init_weights == "lycoris":
            order = (*FIRST, "lokr_w2", "lokr_w2_b", "lokr_w2_a", "lokr_t2")
        for name in (name for name in order if name in shapes):  # in peft's order, for the same numbers
            weight = getattr(self, name)[adapter_name]
            if name in zero:
                nn.init.zeros_(weight)
            else:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def factors(self, factor: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
        """((a, b), (c, d), kernel)"""
        out, into, *kernel = self.weight_shape(True)
        base: Any = self.get_base_layer()
        if isinstance(base, (nn.Conv1d, nn.Conv2d)):
            into, kernel = base.in_channels // base.groups, list(base.kernel_size)
        return factorization(out, factor), factorization(into, factor), tuple(kernel)

    def pair(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W1 [a, c] and W2 [b, d, *kernel], or [b, d * kernel]."""
        of = {attribute: getattr(self, attribute) for attribute in self.adapter_layer_names}
        w = {attribute: weights[name].to(dtype) for attribute, weights in of.items() if name in weights}
        first = w["lokr_w1"] if "lokr_w1" in w else w["lokr_w1_a"] @ w["lokr_w1_b"]
        if "lokr_w2" in w:
            return first, w["lokr_w2"]
        if "lokr_t2" in w:
            return first, torch.einsum("ijkl,ip,jr->prkl", w["lokr_t2"], w["lokr_w2_a"], w["lokr_w2_b"])
        return first, w["lokr_w2_a"] @ w["lokr_w2_b"]

    def delta(self, name: str, dtype: torch.dtype) -> Tensor:
        """[N, K], or of a convolution [N, K, *kernel], in the base weight's shape."""
        first, second = self.pair(name, dtype)
        if second.dim() == 3:
            # Of a W2 [b, d, kernel] torch.kron takes W1 for [1, a, c], so that these and (a, b), (c, d) are mixed up in
            # the result [b, a * d, c * kernel]. It is so in peft, and what its adapters mean.
            delta = first[None, :, None, :, None] * second[:, None, :, None]
        else:
            kernel = second.shape[2:]
            delta = first.reshape(len(first), 1, -1, 1, *(1 for _ in kernel)) * second[:, None]  # [a, b, c, d, *kernel]
            delta = delta.flatten(2, 3).flatten(0, 1)
        base: Any = self.get_base_layer()
        shape = base.weight.shape if isinstance(base, (nn.Conv1d, nn.Conv2d)) else delta.shape
        return (self.scaling[name] * delta).reshape(shape)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.delta(adapter, torch.promote_types(self.adapter_parameters(adapter)[0].dtype, torch.float32))


class Linear(LoKrLayer):
    """LoKr around torch.nn.Linear and k-bit linear layers: x [..., K]."""

    def change(self, name: str, x: Tensor) -> Tensor:
        way = self.way(name, x.numel() // max(x.shape[-1], 1))
        if way == "delta":
            return F.linear(x, self.delta(name, x.dtype))
        first, second = self.pair(name, x.dtype)
        x = x.unflatten(-1, (first.shape[1], second.shape[1]))
        if way == "first":
            y = F.linear(torch.matmul(self.scaling[name] * first, x), second)
        else:
            y = torch.matmul(self.scaling[name] * first, F.linear(x, second))
        return y.flatten(-2)

    def way(self, name: str, tokens: int) -> str:
        """The one of WAYS that takes the fewest operations."""
        (a, b), (c, d) = self.sizes(name)
        operations = {
            "first": tokens * a * d * (b + c),
            "second": tokens * b * c * (a + d),
            "delta": (tokens + 1) * a * b * c * d,
        }
        return min(operations, key=lambda way: operations[way])

    def sizes(self, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """((a, b), (c, d))"""
        a = (self.lokr_w1 if name in self.lokr_w1 else self.lokr_w1_a)[name].shape[0]
        c = (self.lokr_w1 if name in self.lokr_w1 else self.lokr_w1_b)[name].shape[1]
        N, K = self.weight_shape(False)
        return (a, N // a), (c, K // c)

    def route(self, tokens: int) -> Choice:
        names = self.adapters_in_effect()
        if not names:
            return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")
        how = WAYS[self.way(names[0], tokens)]
        return Choice("linear", "added", f"the base layer is called; {how} takes the fewest operations")


class _ConvNd(LoKrLayer):
    def change(self, name: str, x: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        return base._conv_forward(x, self.delta(name, x.dtype), None)

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice("convolution", "added", "torch's own convolutions compute the base layer and the delta")
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")


class Conv1d(_ConvNd):
    """LoKr around torch.nn.Conv1d: x [batch, in, length]."""


class Conv2d(_ConvNd):
    """LoKr around torch.nn.Conv2d: x [batch, in, height, width]."""


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """(m, n), m <= n unless `factor` divides the dimension and is the larger, with m * n the dimension: m is `factor`
    where that divides it, else the divisor next to the root that is at most `factor` (-1: any)."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    largest = math.isqrt(dimension) if factor < 0 else min(factor, math.isqrt(dimension))
    m = next(m for m in range(max(largest, 1), 0, -1) if dimension % m == 0)
    return m, dimension // m
