from .attention import MultiheadAttention
from .bnb import Linear4bit, Linear8bitLt
from .config import LoraConfig, LoraRuntimeConfig
from .conv import Conv1d, Conv2d, Conv3d
from .converted import convert_to_lora, save_as_lora
from .embedding import Embedding
from .eva import get_eva_state_dict, initialize_lora_eva_weights
from .groups import set_lora_groups
from .layer import Linear, LoraLayer
from .linear_like import LinearLike
from .loraga import preprocess_loraga
from .mlp import set_lora_mlp
from .model import LoraModel
from .param_wrapper import ParamWrapper
from .recompute import set_recompute
from .subconfigs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
    "EvaConfig",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "LinearLike",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MultiheadAttention",
    "ParamWrapper",
    "convert_to_lora",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_loraga",
    "save_as_lora",
    "set_lora_groups",
    "set_lora_mlp",
    "set_recompute",
]
