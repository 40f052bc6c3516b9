"""Context-aware prompt tuning (arXiv 2410.17222)."""

from .config import CPTConfig
from .model import CPTEmbedding

__all__ = ["CPTConfig", "CPTEmbedding"]
