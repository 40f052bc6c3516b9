"""peft's module paths: `from peft.utils.X import Y` becomes `from peft_fast.utils.X import Y`."""

from peft_fast.adapter_file import load_peft_weights
from peft_fast.base_state import get_base_model_state_dict, set_base_model_state_dict
from peft_fast.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from peft_fast.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
from peft_fast.peft_types import PeftType, TaskType

from .constants import ALLOWED_COMPUTE_DTYPES, UPCAST_DTYPES
from .error import NoMatchingPeftModuleError, PeftError
from .integrations import map_cache_to_layer_device_map
from .loftq_utils import replace_lora_weights_loftq
from .other import (
    CONFIG_NAME,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    _get_input_embeddings_name,
    _get_submodules,
    bloom_model_postprocess_past_key_value,
    get_quantization_config,
    infer_device,
    shift_tokens_right,
    transpose,
)
from .warning import PeftWarning

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "UPCAST_DTYPES",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "TrainableTokensWrapper",
    "_get_input_embeddings_name",
    "_get_submodules",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "get_quantization_config",
    "infer_device",
    "load_peft_weights",
    "map_cache_to_layer_device_map",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "transpose",
]
