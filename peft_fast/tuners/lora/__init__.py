from .attention import MultiheadAttention
from .bnb import Linear4bit, Linear8bitLt
from .config import LoraConfig, LoraRuntimeConfig
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .groups import set_lora_groups
from .layer import Linear, LoraLayer
from .linear_like import LinearLike
from .loraga import preprocess_loraga
from .mlp import set_lora_mlp
from .model import LoraModel
from .param_wrapper import ParamWrapper
from .recompute import set_recompute
from .subconfigs import CordaConfig, LoftQConfig, LoraGAConfig

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "CordaConfig",
    "Embedding",
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
    "preprocess_loraga",
    "set_lora_groups",
    "set_lora_mlp",
    "set_recompute",
]
