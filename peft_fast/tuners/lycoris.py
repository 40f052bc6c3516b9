"""What the methods share that LyCORIS has brought together (LoHa, LoKr): a delta of the base weight's shape, which is
scaled, and dropped by rows or as a whole in training. A method adds its weights, and says what delta they make.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .base import BaseTuner
from .base_weight import linear_features
from .matching import by_pattern
from .options import TunerConfig, check_rank_fits
from .scaling import ScaledLayer
from .targets import LORA_TARGETS


@dataclass
class LycorisConfig(TunerConfig):
    """rank_pattern, alpha_pattern: {regular expression for the end of a path: another r or alpha there}."""

    positive = ("r",)
    numbers = ("alpha",)
    probabilities = ("rank_dropout", "module_dropout")

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


class LycorisLayer(ScaledLayer):
    """Around a linear layer or a convolution: y = base(x) + x with the delta for a weight."""

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "module_dropout", "rank_dropout_scale")
    method: str  # what is said before the class's name
    adds_to_weight = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, r: int, alpha: float) -> None:
        super().__init__(base_layer)
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.rank_dropout: dict[str, float] = {}
        self.module_dropout: dict[str, float] = {}
        self.rank_dropout_scale: dict[str, bool] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.update_layer(adapter_name, r, alpha, config)

    def update_layer(self, adapter_name: str, r: int, alpha: float, config: Any) -> None:
        """Add an adapter, not active yet. The same seed gives the same weights as in peft."""
        self.r[adapter_name], self.alpha[adapter_name] = r, alpha
        self.scaling[adapter_name] = self.initial_scale(adapter_name)
        self.rank_dropout[adapter_name] = config.rank_dropout
        self.module_dropout[adapter_name] = config.module_dropout
        self.rank_dropout_scale[adapter_name] = getattr(config, "rank_dropout_scale", True)
        self.make_weights(adapter_name, r, config)
        self.place_adapter(adapter_name)

    def make_weights(self, adapter_name: str, r: int, config: Any) -> None:
        raise NotImplementedError

    def initial_scale(self, adapter: str) -> float:
        return self.alpha[adapter] / self.r[adapter]

    def weight_shape(self, whole_kernels: bool) -> tuple[int, ...]:
        """(out, in) of a linear layer, (out, in, *kernel) of a convolution; with the last ones as one number where the
        kernel is 1, or where they are not to be taken apart: not `whole_kernels`."""
        base: Any = self.get_base_layer()
        if not isinstance(base, (nn.Conv1d, nn.Conv2d)):
            K, N = linear_features(base)
            return N, K
        out, *rest = base.weight.shape
        apart = whole_kernels and any(size != 1 for size in base.kernel_size)
        return (out, *rest) if apart else (out, base.weight[0].numel())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        adapters = self.adapters_in_effect()
        for name in adapters:
            if self._is_dropped(name):
                continue
            change = self.change(name, x.to(self.adapter_parameters(name)[0].dtype))
            y = y + change if (rows := self._rows_kept(name, change)) is None else y + change * rows
        return y.to(x.dtype) if adapters else y

    def change(self, name: str, x: Tensor) -> Tensor:
        """What the adapter adds to the base layer's output."""
        raise NotImplementedError

    def _is_dropped(self, name: str) -> bool:
        p = self.module_dropout[name]
        return self.training and p > 0 and torch.rand(1).item() <= p

    def _rows_kept(self, name: str, change: Tensor) -> Tensor | None:
        """Rank dropout: a factor for each out feature, 0 or 1, or what makes their mean 1; None without it."""
        p = self.rank_dropout[name]
        if not (self.training and p):
            return None
        base: Any = self.get_base_layer()
        convolution = isinstance(base, (nn.Conv1d, nn.Conv2d))
        rows = (torch.rand(self.weight_shape(False)[0]) > p).to(change.dtype)
        if self.rank_dropout_scale[name]:
            rows = rows / rows.mean().clamp(min=1e-9)
        rows = rows.to(change.device)
        return rows.view(-1, *(1 for _ in base.kernel_size)) if convolution else rows

    def __repr__(self) -> str:
        return f"{self.method}.{super().__repr__()}"


class LycorisTuner(BaseTuner):
    target_module_mapping = LORA_TARGETS

    def layer_options(self, path: str, config: Any) -> dict[str, Any]:
        return {
            "r": by_pattern(config.rank_pattern, path, config.r),
            "alpha": by_pattern(config.alpha_pattern, path, config.alpha),
        }

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        check_rank_fits([config.r, *config.rank_pattern.values()], tensors)
