"""What layers have in common that are no more than weights and a formula around one base layer."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast.dispatch import Choice

from .base_weight import is_conv1d, linear_features
from .layer import BaseTunerLayer
from .offload import onloaded
from .options import TunerConfig, is_integer


@dataclass
class SeededConfig(TunerConfig):
    """A config with a seed, which the option called `seed_option` is. Where the option save_projection is False the
    numbers that are drawn from it are in no file, and that is warned of."""

    seed_option: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not getattr(self, "save_projection", True):
            warnings.warn(
                "save_projection=False: what is drawn from projection_prng_key is not saved, and drawn again when the "
                "adapter is loaded, which another platform may do otherwise",
                stacklevel=4,
            )

    def check(self) -> None:
        super().check()
        seed = getattr(self, self.seed_option)
        if not is_integer(seed) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"{self.seed_option} must be an integer of 64 bits, a seed, got {seed!r}")


class MethodLayer(BaseTunerLayer):
    """Around one base layer. A method's layers say `make_weights`, and `adapted` or a forward of their own.

    method        what is said before the class's name
    module_names  those of adapter_layer_names whose entries are modules and not parameters
    how           what is said of a forward with adapters, for `explain`
    """

    method: ClassVar[str]
    module_names: ClassVar[tuple[str, ...]] = ()
    how: ClassVar[str] = "torch computes the adapters, and the base layer is called"

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, **options: Any) -> None:
        super().__init__(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict() if name in self.module_names else nn.ParameterDict())
        for name in self.other_param_names:
            setattr(self, name, {})
        self.update_layer(adapter_name, config=config, **options)

    def update_layer(self, adapter_name: str, *, config: Any, **options: Any) -> None:
        """Add an adapter, not active yet. The same seed gives the same weights as in peft."""
        self.make_weights(adapter_name, config, **options)
        self.place_adapter(adapter_name)

    def make_weights(self, adapter_name: str, config: Any, **options: Any) -> None:
        raise NotImplementedError

    def weight_shape(self) -> tuple[int, int]:
        """(out, in) of a linear layer; of a convolution `in` counts every input of a patch; (rows, size) of a table."""
        base: Any = self.get_base_layer()
        if isinstance(base, (nn.Conv2d, nn.Embedding)):
            return base.weight.shape[0], base.weight[0].numel()
        K, N = linear_features(base)
        return N, K

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.adapters_in_effect()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted(names, x, *args, **kwargs)

    def adapted(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with these adapters in effect."""
        raise NotImplementedError

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype) if self.cast_input_dtype_enabled else x

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice(type(self).__name__, "added", self.how)
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")

    def __repr__(self) -> str:
        return f"{self.method}.{super().__repr__()}"


class AddedLayer(MethodLayer):
    """Around a linear layer: y = base(x) + what each adapter makes of x. A method says `delta`, and `change` where
    there is a shorter way than a product with it."""

    def delta(self, name: str) -> Tensor:
        """[out, in]"""
        raise NotImplementedError

    def change(self, name: str, x: Tensor) -> Tensor:
        delta = self.delta(name)
        return F.linear(self.cast(x, delta.dtype), delta)

    def adapted(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            y = y + self.change(name, x)
        return y.to(x.dtype)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = self.delta(adapter)
        delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
        return delta.T if is_conv1d(self.get_base_layer()) else delta


class Unscaled(MethodLayer):
    """A layer whose adapters are rotations, which have no scale: it stays 1, with a warning, as in peft."""

    def set_scale(self, adapter: str, scale: float) -> None:
        if self.has_adapter(adapter):
            self._warn()

    def scale_layer(self, scale: float) -> None:
        if scale != 1 and any(map(self.has_adapter, self.active_adapters)):
            self._warn()

    def unscale_layer(self, scale: float | None = None) -> None:
        if any(map(self.has_adapter, self.active_adapters)):
            self._warn()

    def _warn(self) -> None:
        warnings.warn(f"{self.method} rotates, and a rotation has no scale: it stays 1", stacklevel=3)


def convolved(base: Any, x: Tensor, turned: Callable[[Tensor], Tensor]) -> Tensor:
    """The convolution `base` of x, with `turned` kernels of rows [out, inputs of a patch] in the place of its own."""
    with onloaded(base):
        weight = turned(base.weight.flatten(1)).reshape(base.weight.shape)
        return base._conv_forward(x, weight.to(x.dtype), base.bias).to(x.dtype)


def refuse_groups(base: Any, method: str) -> None:
    """Raise ValueError for a convolution with groups."""
    if base.groups != 1:
        raise ValueError(
            f"{method} cannot adapt a convolution with groups={base.groups}: it turns the inputs of all groups "
            "together. Name other target_modules, or use exclude_modules"
        )


def refuse_layers_with_expression(config: Any) -> None:
    """Raise ValueError where target_modules is an expression and layers are numbered besides: in the methods in which
    peft has them exclude each other."""
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, name) is not None:
            raise ValueError(
                f"{name} needs target_modules as a list, got the string {config.target_modules!r}: put the layer "
                "indices into the regular expression, or give the names as a list"
            )
