"""Names of peft.mapping_func."""

from .config import PeftConfig, PromptLearningConfig
from .mapping import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    get_peft_model,
)
from .mixed_model import PeftMixedModel
from .model import PeftModel
from .tuners import BaseTuner, BaseTunerLayer, LoraConfig, LoraModel

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "BaseTuner",
    "BaseTunerLayer",
    "LoraConfig",
    "LoraModel",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PromptLearningConfig",
    "get_peft_model",
]
