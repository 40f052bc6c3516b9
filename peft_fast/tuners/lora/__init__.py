from .config import LoraConfig, LoraRuntimeConfig
from .layer import Linear, LoraLayer
from .mlp import set_lora_mlp
from .model import LoraModel

__all__ = ["Linear", "LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig", "set_lora_mlp"]
