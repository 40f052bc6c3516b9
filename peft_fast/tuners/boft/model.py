"""BOFTModel."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.targets import LORA_TARGETS

from .layer import BOFTLayer, Conv2d, Linear


class BOFTModel(BaseTuner):
    """`model` with BOFT adapters in it."""

    prefix = "boft_"
    target_module_mapping = LORA_TARGETS
    layer_classes: ClassVar = {nn.Linear: Linear, nn.Conv2d: Conv2d}

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        """Files of one factor, which peft writes without its CUDA extension whatever the config says, get the others:
        zeros, which turn nothing."""
        result = dict(state_dict)
        for path, layer in self.layers():
            value = result.get(key := f"{prefix}{path}.boft_R")
            if not isinstance(layer, BOFTLayer) or not isinstance(value, Tensor) or not layer.has_adapter(adapter_name):
                continue
            missing = len(layer.boft_R[adapter_name]) - 1
            if missing and value.ndim == 4 and len(value) == 1:
                result[key] = value.new_zeros(missing + 1, *value.shape[1:]).index_copy_(
                    0, value.new_zeros(1).long(), value
                )
        return result
