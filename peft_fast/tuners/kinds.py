"""Which of a method's layers takes the place of a layer of the base model."""

from typing import Any

from torch import nn

from .base_weight import is_bypassed, is_conv1d, is_dense_linear, quantized_weight
from .layer import BaseTunerLayer


def layer_class(tuner: Any, target: nn.Module, path: str) -> type[BaseTunerLayer]:
    """The class in tuner.layer_classes for `target`, which may have another method's adapters (a mixed model).

    Raises ValueError where there is none.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not is_bypassed(target):
        for kind, cls in tuner.layer_classes.items():
            if isinstance(base, kind):
                return cls
        linear = is_dense_linear(base) and (tuner.adapts_conv1d or not is_conv1d(base))
        if nn.Linear in tuner.layer_classes and (linear or quantized_weight(base) is not None):
            return tuner.layer_classes[nn.Linear]
    name = type(tuner).__name__.removesuffix("Model")
    raise ValueError(
        f"{name} cannot adapt {path}, a {type(base).__name__}: it adapts {_named(tuner)}. Name other target_modules, "
        "or use exclude_modules"
    )


def _named(tuner: Any) -> str:
    names = [kind.__name__ for kind in tuner.layer_classes if kind is not nn.Linear]
    if nn.Linear in tuner.layer_classes:
        names = ["torch.nn.Linear that is called", *(["transformers' Conv1D"] if tuner.adapts_conv1d else []), *names]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
