"""VeRA: shared random projections, scaled by vectors that each layer learns (arXiv 2310.11454)."""

from .config import VeraConfig
from .layer import Linear, VeraLayer
from .model import VeraModel

__all__ = ["Linear", "VeraConfig", "VeraLayer", "VeraModel"]
