"""Names of peft.utils.constants."""

import torch
from torch import Tensor

from peft_fast.adapter_file import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft_fast.auto import TOKENIZER_CONFIG_NAME
from peft_fast.config import CONFIG_NAME
from peft_fast.tuners.loha import LoHaModel
from peft_fast.tuners.matching import ALL_LINEAR, CLASSIFIERS
from peft_fast.tuners.targets import LORA_TARGETS
from peft_fast.tuners.tied import EMBEDDING_LAYER_NAMES

INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = LORA_TARGETS
TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING = LoHaModel.target_module_mapping
SEQ_CLS_HEAD_NAMES = list(CLASSIFIERS)
DUMMY_MODEL_CONFIG = {"model_type": "custom"}  # of models without a config
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Prefixes in the shapes that the attention of Bloom had: of each layer (keys [batch * heads, dim, tokens], values
    [batch * heads, tokens, dim]). past_key_values: [some layers, batch, heads, tokens, dim] each, all keys first."""
    keys, values = torch.cat(past_key_values).chunk(2)
    _, batch, heads, tokens, dim = keys.shape
    # The keys' numbers are read in another order than they mean, in peft as here: prefixes are trained that way.
    keys = keys.transpose(2, 3).reshape(len(keys), batch * heads, dim, tokens)
    return tuple(zip(keys, values.flatten(1, 2)))


__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "UPCAST_DTYPES",
    "WEIGHTS_NAME",
    "bloom_model_postprocess_past_key_value",
]
