"""SHiRA around linear layers: y = x (W + D)^T + bias, where D has a few entries that are not zero.

Neither W + D nor D is kept for backward: they are made again there, and of the gradient of D only its entries are
taken. In fp32 the sum is multiplied by, one product for both. In 16 bits most of D would be lost in that sum, so that
there, and for weights of a few bits, the base layer is called, and D takes a product of its own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.dispatch import Choice
from peft_fast.ops.plain import is_transformed
from peft_fast.tuners._buffer_dict import BufferDict
from peft_fast.tuners.base_weight import linear_features, matmul_weight
from peft_fast.tuners.scaling import ScaledLayer


class _Sparse(torch.autograd.Function):
    """x [M, K] (W + D)^T in x's dtype; `weight` W [N, K], or None for zeros; D [N, K] has `values` at `places`, counted
    along its rows. Differentiable in x and values, any number of times; `_multiplied` is for torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Tensor, shape: tuple[int, int], weight: Any) -> Tensor:
        ctx.save_for_backward(x, values, places, weight)
        ctx.shape = shape
        return _multiplied(x, values, places, shape, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        x, values, places, weight = ctx.saved_tensors
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _summed(values, places, ctx.shape, weight, x.dtype)
        if ctx.needs_input_grad[1]:
            dvalues = (dy.t() @ x).flatten()[places].to(values.dtype)
        return dx, dvalues, None, None, None


def _summed(values: Tensor, places: Tensor, shape: tuple[int, int], weight: Any, dtype: torch.dtype) -> Tensor:
    if weight is None:
        total = values.new_zeros(math.prod(shape)).index_add_(0, places, values)
    else:
        total = weight.detach().to(values.dtype).contiguous().view(-1).index_add(0, places, values)
    return total.view(shape).to(dtype)


def _multiplied(x: Tensor, values: Tensor, places: Tensor, shape: tuple[int, int], weight: Any) -> Tensor:
    return x @ _summed(values, places, shape, weight, x.dtype).t()


class ShiraLayer(ScaledLayer):
    """shira_weight [n], n = r * (N + K), by adapter; shira_indices [2, n]: the row and the column of each. Those of a
    mask of one's own are on the meta device until a file brings them."""

    adapter_layer_names = ("shira_weight",)
    other_param_names = ("r", "scaling", "shira_indices")

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = linear_features(self.get_base_layer())
        self.r: dict[str, int] = {}
        self.scaling: dict[str, Any] = {}
        self.shira_weight = nn.ParameterDict()
        self.shira_indices = BufferDict()
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter, not active yet. The same seed gives the same weights as in peft."""
        K, N, r = self.in_features, self.out_features, config.r
        n = r * (N + K)
        if n > N * K:
            raise ValueError(
                f"SHiRA of rank {r} trains {n} entries of a weight, and one of {N} x {K} has {N * K}: take a smaller r"
            )
        self.r[adapter_name], self.scaling[adapter_name] = r, 1.0
        places = self._places_of(config, n)
        self.shira_weight[adapter_name] = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n))
        self.shira_indices[adapter_name] = places
        self.place_adapter(adapter_name)

    def _places_of(self, config: Any, n: int) -> Tensor:
        if config.mask_fn is None:
            return torch.empty(2, n, dtype=torch.int, device="meta")
        with torch.device("cpu"):  # also where weights are made on the meta device
            seed = {"random_seed": config.random_seed} if config.mask_type == "random" else {}
            mask = config.mask_fn(self.get_base_layer(), config.r, **seed)
        shape = (self.out_features, self.in_features)
        if not isinstance(mask, Tensor) or mask.shape != shape or int((mask == 1).sum()) != n:
            got = f"{tuple(mask.shape)} with {int((mask == 1).sum())}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"mask_fn must give a tensor {shape} with {n} ones, r * (in + out), got {got}")
        return torch.stack(torch.where(mask == 1)).to(torch.int)

    def initial_scale(self, adapter: str) -> float:
        return 1.0

    def adapter_state_keys(self, adapter_name: str) -> dict[str, str]:
        keys = super().adapter_state_keys(adapter_name)
        return keys | ({"shira_indices": f"shira_indices.{adapter_name}"} if keys else {})

    def places(self, name: str) -> Tensor:
        """Of the adapter's entries, counted along the rows of the weight: [n]."""
        if self.shira_indices[name].is_meta:
            raise ValueError(
                f"SHiRA's adapter {name!r} has no places for its values: its mask_type is no built-in one, and "
                "config.mask_fn was not set before the model was made, nor was a file loaded"
            )
        rows, columns = self.shira_indices[name].to(self.shira_weight[name].device).long()
        return rows * self.in_features + columns

    def entries(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(values, places) of these adapters together, scales in the values: an entry may be there several times."""
        values = torch.cat([self.shira_weight[name] * self.scaling[name] for name in names])
        return values, torch.cat([self.places(name) for name in names])

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """[N, K] in fp32, dense."""
        values, places = self.entries([adapter])
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return _summed(wide, places, (self.out_features, self.in_features), None, wide.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., in_features] -> [..., out_features] in x's dtype (autocast's where that is on)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.adapters_in_effect()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        values, places = self.entries(names)
        shape = (self.out_features, self.in_features)
        multiplied = _multiplied if is_transformed() else _Sparse.apply
        if self._why_apart() is None and not (args or kwargs) and x.dtype == torch.float32 and not _autocasts(x):
            y = multiplied(x.reshape(-1, x.shape[-1]), values, places, shape, self.weight)
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        y = self.base_layer(x, *args, **kwargs)
        z = x.to(torch.get_autocast_dtype(x.device.type)) if _autocasts(x) else x
        with torch.autocast(x.device.type, enabled=False):
            change = multiplied(z.reshape(-1, z.shape[-1]), values, places, shape, None)
        return y + change.view(y.shape).to(y.dtype)

    def _why_apart(self) -> str | None:
        """Why the base weight and the adapter are not added before they are multiplied by, or None."""
        weight = matmul_weight(self.base_layer)
        if weight is None:
            return "the base layer has hooks or a forward of its own"
        if not isinstance(weight, Tensor):
            return "the weight has few bits"
        if weight.dtype != torch.float32:
            return f"little would be left of the adapter in a sum of {weight.dtype}"
        return "the base weight is trained" if weight.requires_grad else None

    def route(self, tokens: int) -> Choice:
        if not self.adapters_in_effect():
            return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")
        reason = self._why_apart()
        if reason is None and not torch.is_autocast_enabled(self.weight.device.type):
            return Choice(
                "linear", "sum", "torch multiplies by the sum of base weight and adapter, made anew at each call"
            )
        reason = reason or "autocast casts the sum, and little would be left of the adapter in it"
        return Choice("linear", "added", f"the base layer is called, {reason}; the adapter has a product of its own")

    def __repr__(self) -> str:
        return f"shira.{super().__repr__()}"


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


class Linear(ShiraLayer):
    """SHiRA around torch.nn.Linear and k-bit linear layers: x [..., K]."""
