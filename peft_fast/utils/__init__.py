"""peft's module paths: `from peft.utils.X import Y` becomes `from peft_fast.utils.X import Y`."""

from peft_fast.adapter_file import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from peft_fast.checkpoint import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft_fast.config import CONFIG_NAME
from peft_fast.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
from peft_fast.peft_types import PeftType, TaskType
from peft_fast.tuners import ModulesToSaveWrapper

from .other import EMBEDDING_LAYER_NAMES, _get_submodules

__all__ = [
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "ModulesToSaveWrapper",
    "PeftType",
    "TaskType",
    "_get_submodules",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
