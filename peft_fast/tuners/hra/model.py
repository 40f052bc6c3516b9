"""HRAModel."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.options import check_rank_fits
from peft_fast.tuners.targets import LORA_TARGETS

from .layer import HRAConv2d, HRALinear


class HRAModel(BaseTuner):
    """`model` with HRA adapters in it."""

    prefix = "hra_"
    target_module_mapping = LORA_TARGETS
    layer_classes: ClassVar = {nn.Linear: HRALinear, nn.Conv2d: HRAConv2d}

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        check_rank_fits([config.r], tensors)
