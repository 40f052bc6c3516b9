"""Names of peft.peft_model."""

from .adapter_file import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from .checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .config import PeftConfig
from .mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from .model import PeftModel
from .peft_types import PeftType, TaskType
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .tuners import BaseTuner, BaseTunerLayer
from .utils.constants import DUMMY_MODEL_CONFIG
from .utils.integrations import map_cache_to_layer_device_map
from .utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper, infer_device, shift_tokens_right

__all__ = [
    "DUMMY_MODEL_CONFIG",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "TrainableTokensWrapper",
    "TunerLayerStatus",
    "TunerModelStatus",
    "get_layer_status",
    "get_model_status",
    "get_peft_model_state_dict",
    "infer_device",
    "load_peft_weights",
    "map_cache_to_layer_device_map",
    "set_peft_model_state_dict",
    "shift_tokens_right",
]
