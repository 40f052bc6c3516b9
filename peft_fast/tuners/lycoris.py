"""What the methods share that LyCORIS has brought together (LoHa, LoKr): a delta of the base weight's shape, which is
scaled, and dropped by rows or as a whole in training. A method adds its weights, and says what delta they make.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_fast.config import PeftConfig

from .base import BaseTuner
from .base_weight import is_bypassed, is_conv1d, is_dense_linear, linear_features, quantized_weight
from .layer import BaseTunerLayer
from .matching import by_pattern
from .scaling import ScaledLayer
from .targets import LORA_TARGETS


@dataclass
class LycorisConfig(PeftConfig):
    """rank_pattern, alpha_pattern: {regular expression for the end of a path: another r or alpha there}."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name, None), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Raise ValueError or TypeError for options that cannot be."""
        options: Any = self
        ranks = {"r": options.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
                raise ValueError(f"{name} must be a positive integer, got {rank!r}")
        alphas = {"alpha": options.alpha} | {f"alpha_pattern[{key!r}]": a for key, a in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha != alpha:
                raise ValueError(f"{name} must be a number, got {alpha!r}")
        for name in ("rank_dropout", "module_dropout"):
            p = getattr(self, name)
            if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
                raise ValueError(f"{name} must be a probability from 0 to 1, got {p!r}")
        self._check_names()

    def _check_names(self) -> None:
        options: Any = self
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(options, name)
            if isinstance(value, str):
                _compile(name, value)
            elif value is not None and not all(isinstance(one, str) for one in value):
                raise TypeError(f"{name} must be names of modules or one regular expression, got {value!r}")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                _compile(name, pattern)
        if options.layers_pattern and options.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: the indices within that list of layers")
        saved = options.modules_to_save
        if saved is not None and (isinstance(saved, str) or not all(isinstance(one, str) for one in saved)):
            raise TypeError(f"modules_to_save must be a list of module names, got {saved!r}")


def _compile(name: str, text: str) -> None:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} must be a regular expression, got {text!r}: {error}") from error


class LycorisLayer(ScaledLayer):
    """Around a linear layer or a convolution: y = base(x) + x with the delta for a weight."""

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "module_dropout")
    method: str  # what is said before the class's name

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, r: int, alpha: float) -> None:
        super().__init__(base_layer)
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.rank_dropout: dict[str, float] = {}
        self.module_dropout: dict[str, float] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.update_layer(adapter_name, r, alpha, config)

    def update_layer(self, adapter_name: str, r: int, alpha: float, config: Any) -> None:
        """Add an adapter, not active yet. The same seed gives the same weights as in peft."""
        self.r[adapter_name], self.alpha[adapter_name] = r, alpha
        self.scaling[adapter_name] = self.initial_scale(adapter_name)
        self.rank_dropout[adapter_name] = config.rank_dropout
        self.module_dropout[adapter_name] = config.module_dropout
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
        """Rank dropout: a factor for each out feature, 0 or what makes their mean 1; None without it."""
        p = self.rank_dropout[name]
        if not (self.training and p):
            return None
        base: Any = self.get_base_layer()
        convolution = isinstance(base, (nn.Conv1d, nn.Conv2d))
        rows = (torch.rand(self.weight_shape(False)[0]) > p).to(change.dtype)
        rows = (rows / rows.mean().clamp(min=1e-9)).to(change.device)
        return rows.view(-1, *(1 for _ in base.kernel_size)) if convolution else rows

    def __repr__(self) -> str:
        return f"{self.method}.{super().__repr__()}"


class LycorisTuner(BaseTuner):
    """`layer_classes`: the layer around each kind of base layer."""

    target_module_mapping = LORA_TARGETS
    layer_classes: ClassVar[Mapping[type[nn.Module], type[LycorisLayer]]]

    def adapt(self, target: nn.Module, path: str, adapter_name: str, config: Any) -> nn.Module:
        r = by_pattern(config.rank_pattern, path, config.r)
        alpha = by_pattern(config.alpha_pattern, path, config.alpha)
        if isinstance(target, LycorisLayer) and type(target) in self.layer_classes.values():
            target.update_layer(adapter_name, r, alpha, config)
            return target
        return self._layer_class(target, path)(target, adapter_name, config=config, r=r, alpha=alpha)

    def _layer_class(self, target: nn.Module, path: str) -> type[LycorisLayer]:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not is_bypassed(target):
            for kind, cls in self.layer_classes.items():
                if isinstance(base, kind):
                    return cls
            linear = is_dense_linear(base) and not is_conv1d(base)
            if linear or quantized_weight(base) is not None:
                return self.layer_classes[nn.Linear]
        name = type(self).__name__.removesuffix("Model")
        raise ValueError(
            f"{name} cannot adapt {path}, a {type(base).__name__}: it adapts torch.nn.Linear that is called, Conv1d "
            "and Conv2d. Name other target_modules, or use exclude_modules"
        )

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        rank = max(config.r, *config.rank_pattern.values(), 0)
        largest = max((max(t.shape) for t in tensors.values() if isinstance(t, Tensor) and t.dim()), default=0)
        if largest and rank > largest:
            raise ValueError(
                f"the config says rank {rank}, and the file's tensors do not fit that: none has a dimension above "
                f"{largest}. Are adapter_config.json and the weights of one adapter?"
            )
