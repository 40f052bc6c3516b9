"""LoKr: low-rank Kronecker product (arXiv 2309.14859)."""

from .config import LoKrConfig
from .layer import Conv1d, Conv2d, Linear, LoKrLayer
from .model import LoKrModel

__all__ = ["Conv1d", "Conv2d", "Linear", "LoKrConfig", "LoKrLayer", "LoKrModel"]
