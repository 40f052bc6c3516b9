"""Names of peft.tuners.tuners_utils."""

from .base import BaseTuner
from .layer import BaseTunerLayer

__all__ = ["BaseTuner", "BaseTunerLayer"]
