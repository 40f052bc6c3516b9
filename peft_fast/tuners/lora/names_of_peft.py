"""What peft has in its module tuners/lora/layer.py, and what is in modules here that import layer.py."""

import importlib
from typing import Any

ELSEWHERE = {
    "peft_fast.tuners._buffer_dict": ("BufferDict",),
    "peft_fast.tuners.lora.attention": ("MultiheadAttention",),
    "peft_fast.tuners.lora.conv": ("Conv1d", "Conv2d", "Conv3d"),
    "peft_fast.tuners.lora.embedding": ("Embedding",),
    "peft_fast.tuners.lora.param_wrapper": ("ParamWrapper",),
    "peft_fast.tuners.tuners_utils": ("BaseTunerLayer", "check_adapters_to_merge"),
    "peft_fast.utils": ("ALLOWED_COMPUTE_DTYPES", "UPCAST_DTYPES", "PeftWarning", "transpose"),
    "peft_fast.utils.integrations": ("dequantize_module_weight", "gather_params_ctx", "get_bnb_param_type"),
    "peft_fast.utils.loftq_utils": ("loftq_init",),
}


def found_elsewhere(asked: str, name: str) -> Any:
    """For a module's __getattr__. Raises AttributeError for a name that is in none of them."""
    for module, names in ELSEWHERE.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {asked!r} has no attribute {name!r}")
