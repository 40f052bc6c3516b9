"""AdaLoRA: LoRA with singular values, whose ranks are allotted in training (arXiv 2303.10512)."""

from .allocator import RankAllocator
from .config import AdaLoraConfig
from .layer import AdaLoraLayer, SVDConv2d, SVDLinear
from .model import AdaLoraModel

__all__ = ["AdaLoraConfig", "AdaLoraLayer", "AdaLoraModel", "RankAllocator", "SVDConv2d", "SVDLinear"]
