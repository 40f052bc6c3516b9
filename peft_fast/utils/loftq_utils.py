"""peft's module path for it."""

from peft_fast.tuners.lora.initialisation.replace_loftq import replace_lora_weights_loftq

__all__ = ["replace_lora_weights_loftq"]
