"""Names of peft.utils.constants."""

import torch
from torch import Tensor

from peft_fast.adapter_file import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft_fast.config import CONFIG_NAME
from peft_fast.tuners.matching import ALL_LINEAR
from peft_fast.tuners.targets import LORA_TARGETS
from peft_fast.tuners.tied import EMBEDDING_LAYER_NAMES

INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = LORA_TARGETS


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Prefixes in the shapes that the attention of Bloom had: of each layer (keys [batch * heads, dim, tokens], values
    [batch * heads, tokens, dim]). past_key_values: [some layers, batch, heads, tokens, dim] each, all keys first."""
    keys, values = torch.cat(past_key_values).chunk(2)
    _, batch, heads, tokens, dim = keys.shape
    # The keys' numbers are read in another order than they mean, in peft as here: prefixes are trained that way.
    keys = keys.transpose(2, 3).reshape(len(keys), batch * heads, dim, tokens)
    return tuple(zip(keys, values.flatten(1, 2)))


__all__ = [
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "bloom_model_postprocess_past_key_value",
]
