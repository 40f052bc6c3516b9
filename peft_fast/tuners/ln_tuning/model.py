"""LNTuningModel."""

from typing import Any, ClassVar

from torch import nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.modules_to_save import check_trainable
from peft_fast.tuners.targets import LN_TARGETS

from .layer import LNTuningLayer


class LNTuningModel(BaseTuner):
    """`model` with trained copies of its norms. They keep the dtype of what they are copies of."""

    prefix = "ln_tuning_"
    target_module_mapping = LN_TARGETS
    layer_classes: ClassVar = {nn.Module: LNTuningLayer}

    def before_layers(self, adapter_name: str, config: Any, paths: list[str]) -> None:
        for path in paths:
            target = self.model.get_submodule(path)
            if isinstance(target, LNTuningLayer):
                continue
            check_trainable(path, target, "LNTuning's target_modules")
            if not any(True for _ in target.parameters()):
                raise ValueError(
                    f"LNTuning's target_modules cannot hold {path}: a {type(target).__name__} has no weights"
                )
            outer = next((other for other in paths if path.startswith(f"{other}.")), None)
            if outer is not None:
                raise ValueError(
                    f"LNTuning's target_modules cannot hold both {outer} and {path}, which lies in it: name one of the "
                    "two, or use exclude_modules"
                )

    def _cast_to_float32(self, adapter_name: str) -> None:
        """What comes after a norm expects the dtype that the norm had."""
