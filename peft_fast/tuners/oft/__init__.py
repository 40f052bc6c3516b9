"""OFT: orthogonal finetuning, with rotations of the layer's input (arXiv 2306.07280, 2506.19847)."""

from .config import OFTConfig
from .layer import Conv2d, Embedding, Linear, OFTLayer, OFTRotationModule
from .model import OFTModel

__all__ = ["Conv2d", "Embedding", "Linear", "OFTConfig", "OFTLayer", "OFTModel", "OFTRotationModule"]
