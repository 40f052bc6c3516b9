from .attention import MultiheadAttention
from .config import LoraConfig, LoraRuntimeConfig
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .groups import set_lora_groups
from .layer import Linear, LoraLayer
from .linear_like import LinearLike
from .mlp import set_lora_mlp
from .model import LoraModel
from .param_wrapper import ParamWrapper
from .subconfigs import LoftQConfig

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LinearLike",
    "LoftQConfig",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MultiheadAttention",
    "ParamWrapper",
    "set_lora_groups",
    "set_lora_mlp",
]
