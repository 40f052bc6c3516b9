"""OFTModel."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.targets import LORA_TARGETS

from .layer import Conv2d, Embedding, Linear


class OFTModel(BaseTuner):
    """`model` with OFT adapters in it."""

    prefix = "oft_"
    target_module_mapping = LORA_TARGETS
    layer_classes: ClassVar = {nn.Linear: Linear, nn.Conv2d: Conv2d, nn.Embedding: Embedding}

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        if any(".oft_r." in key for key in state_dict):
            raise ValueError(
                "the file is an OFT adapter of a peft before 0.16, whose weights are other ones: train the adapter "
                "again, or load it with that version"
            )
        return state_dict
