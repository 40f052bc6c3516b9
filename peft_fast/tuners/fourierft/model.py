"""FourierFTModel."""

from typing import Any, ClassVar

from torch import nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.matching import by_pattern
from peft_fast.tuners.targets import FOURIERFT_TARGETS

from .layer import FourierFTLinear


class FourierFTModel(BaseTuner):
    """`model` with FourierFT adapters in it."""

    prefix = "fourierft_"
    target_module_mapping = FOURIERFT_TARGETS
    layer_classes: ClassVar = {nn.Linear: FourierFTLinear}
    adapts_conv1d = True

    def layer_options(self, path: str, config: Any) -> dict[str, Any]:
        return {"n_frequency": by_pattern(config.n_frequency_pattern, path, config.n_frequency)}
