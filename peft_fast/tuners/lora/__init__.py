from .config import LoraConfig, LoraRuntimeConfig
from .layer import Linear, LoraLayer
from .model import LoraModel

__all__ = ["Linear", "LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig"]
