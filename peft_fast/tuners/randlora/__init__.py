"""RandLoRA: full-rank updates as scaled sums of random low-rank bases (arXiv 2502.00987)."""

from .config import RandLoraConfig
from .layer import Linear, RandLoraLayer
from .model import RandLoraModel

__all__ = ["Linear", "RandLoraConfig", "RandLoraLayer", "RandLoraModel"]
