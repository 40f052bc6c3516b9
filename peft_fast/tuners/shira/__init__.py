"""SHiRA: a few of the base weight's own entries, trained (arXiv 2406.13175)."""

from .config import ShiraConfig
from .layer import Linear, ShiraLayer
from .masks import random_mask
from .model import ShiraModel

__all__ = ["Linear", "ShiraConfig", "ShiraLayer", "ShiraModel", "random_mask"]
