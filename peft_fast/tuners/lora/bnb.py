"""LoRA on bitsandbytes' linear layers: classes of their own as in peft, for isinstance. They compute as Linear does.

bitsandbytes is not imported here: a model that holds one of its layers has imported it.
"""

from torch import nn

from peft_fast.import_utils import is_bnb_4bit_available, is_bnb_available
from peft_fast.quant import bitsandbytes

from .layer import Linear


class Linear4bit(Linear):
    """LoRA around bitsandbytes' Linear4bit."""


class Linear8bitLt(Linear):
    """LoRA around bitsandbytes' Linear8bitLt."""


def linear_class(base_layer: nn.Module) -> type[Linear]:
    """The class for a linear layer, dense or k-bit."""
    if bitsandbytes.is_linear4bit(base_layer):
        return Linear4bit
    return Linear8bitLt if bitsandbytes.is_linear8bit(base_layer) else Linear


__all__ = ["Linear4bit", "Linear8bitLt", "is_bnb_4bit_available", "is_bnb_available", "linear_class"]
