"""Names of peft.tuners.shira.mask_functions."""

from .masks import random_mask

__all__ = ["random_mask"]
