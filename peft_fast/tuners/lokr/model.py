"""LoKrModel."""

from typing import ClassVar

from torch import nn

from peft_fast.tuners.lycoris import LycorisTuner

from .layer import Conv1d, Conv2d, Linear


class LoKrModel(LycorisTuner):
    """`model` with LoKr adapters in it."""

    prefix = "lokr_"
    layer_classes: ClassVar = {nn.Conv2d: Conv2d, nn.Conv1d: Conv1d, nn.Linear: Linear}
