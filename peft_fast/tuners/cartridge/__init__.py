"""Cartridges: keys and values of a text, trained on (arXiv 2506.06266)."""

from .config import CartridgeConfig
from .model import CartridgeEncoder

__all__ = ["CartridgeConfig", "CartridgeEncoder"]
