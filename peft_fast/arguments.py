"""Arguments of a PeftModel's methods that are not for every model: which are refused, and which only noted."""

import warnings
from typing import Any

from .config import PeftConfig
from .peft_types import PeftType


def check_trainable_file(config: PeftConfig, is_trainable: bool) -> None:
    if config.is_prompt_learning and is_trainable:
        raise ValueError(
            "a prompt cannot be trainable when it is loaded, as its file lacks the encoder that it came out of: load "
            "it with is_trainable=False. A prompt without an encoder can be loaded into a new adapter that is being "
            "trained, with set_peft_model_state_dict"
        )


def note_offload(config: Any, ephemeral_gpu_offload: bool) -> None:
    if hasattr(config, "runtime_config"):
        config.runtime_config.ephemeral_gpu_offload = ephemeral_gpu_offload
    elif ephemeral_gpu_offload:
        kind = PeftType(config.peft_type).value
        warnings.warn(f"ephemeral_gpu_offload=True has no effect on {kind} adapters: leave it out", stacklevel=3)
