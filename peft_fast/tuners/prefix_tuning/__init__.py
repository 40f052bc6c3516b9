"""Prefix tuning (arXiv 2101.00190)."""

from .config import PrefixTuningConfig
from .model import PrefixEncoder

__all__ = ["PrefixEncoder", "PrefixTuningConfig"]
