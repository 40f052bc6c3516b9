"""HRA around linear layers and convolutions.

A product of r reflections is I - V T V^T, with the unit vectors as the columns of V [in, r] and a triangular T [r, r]
(Schreiber and Van Loan 1989, the compact WY form): so x is reflected by two products of rank r, as LoRA multiplies,
where peft makes matrices [in, in], one reflection after the other, and multiplies the weight by them. The base layer is
called with what comes out; so any format of its weight will do.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners.method import Unscaled, convolved, refuse_groups


class HRALayer(Unscaled):
    """hra_u: {adapter: vectors [in, r]}, of any length; of a convolution `in` counts every input of a patch."""

    hra_u: nn.ParameterDict
    hra_r: dict[str, int]
    hra_apply_GS: dict[str, bool]
    method = "hra"
    adapter_layer_names = ("hra_u",)
    other_param_names = ("hra_r", "hra_apply_GS")

    def make_weights(self, adapter_name: str, config: Any, **options: Any) -> None:
        size, r = self.weight_shape()[1], config.r
        self.hra_r[adapter_name], self.hra_apply_GS[adapter_name] = r, config.apply_GS
        pairs = config.init_weights and r % 2 == 0
        if config.init_weights and not pairs:
            warnings.warn(f"r={r} is odd, so that the adapter changes the model from the start", stacklevel=2)
        vectors = torch.empty(size, r // 2 if pairs else r)
        nn.init.kaiming_uniform_(vectors, a=math.sqrt(5))
        self.hra_u[adapter_name] = nn.Parameter(vectors.repeat_interleave(2, dim=1) if pairs else vectors)

    def reflections(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(V [in, r], P [r, in]): the product of the reflections is I - V P."""
        vectors = self.hra_u[name]
        with torch.autocast(vectors.device.type, enabled=False):
            wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
            if self.hra_apply_GS[name]:
                V = torch.linalg.qr(wide).Q
                P = 2 * V.T
            else:
                V = wide / wide.norm(dim=0)
                triangle = (V.T @ V).triu(1) + 0.5 * torch.eye(V.shape[1], device=V.device, dtype=V.dtype)
                P = torch.linalg.solve_triangular(triangle, V.T, upper=True)
        return V.to(dtype), P.to(dtype)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str, reverse: bool = False) -> Tensor:
        """What merging multiplies the weight by, [in, in], and no difference to be added; `reverse`: its inverse."""
        V, P = self.reflections(adapter, torch.promote_types(self.hra_u[adapter].dtype, torch.float32))
        product = torch.eye(len(V), device=V.device, dtype=V.dtype) - V @ P
        return product.T if reverse else product

    @torch.no_grad()
    def shifted_weight(self, weight: Tensor, adapter_names: Sequence[str], sign: int) -> Tensor:
        rows = weight.reshape(len(weight), -1)
        for name in adapter_names if sign > 0 else reversed(adapter_names):
            V, P = self.reflections(name, rows.dtype)
            rows = rows - (rows @ V) @ P if sign > 0 else rows - (rows @ P.T) @ V.T
        return rows.reshape(weight.shape)


class HRALinear(HRALayer):
    """HRA around torch.nn.Linear and k-bit linear layers: x [..., in]."""

    how = "the input is reflected by two products of rank r, and the base layer is called with it"

    def adapted(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reflected = x
        for name in reversed(names):  # the weight meets them in the order of the names
            vectors = self.hra_u[name]
            V, P = self.reflections(name, vectors.dtype)
            reflected = self.cast(reflected, vectors.dtype)
            reflected = reflected - (reflected @ P.to(reflected.dtype).T) @ V.to(reflected.dtype).T
        return self.base_layer(reflected.to(x.dtype), *args, **kwargs).to(x.dtype)


class HRAConv2d(HRALayer):
    """HRA around torch.nn.Conv2d without groups: x [batch, in, height, width]."""

    how = "the kernels are reflected, and torch's own convolution takes them"

    def make_weights(self, adapter_name: str, config: Any, **options: Any) -> None:
        refuse_groups(self.get_base_layer(), "HRA")
        super().make_weights(adapter_name, config)

    def adapted(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def turned(rows: Tensor) -> Tensor:
            for name in names:
                V, P = self.reflections(name, self.hra_u[name].dtype)
                rows = rows.to(V.dtype)
                rows = rows - (rows @ V) @ P
            return rows

        return convolved(self.get_base_layer(), x, turned)
