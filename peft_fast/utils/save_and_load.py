"""Names of peft.utils.save_and_load."""

from peft_fast.adapter_file import load_peft_weights
from peft_fast.base_state import get_base_model_state_dict, set_base_model_state_dict
from peft_fast.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
