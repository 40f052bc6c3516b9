"""Adaption prompts, LLaMA-Adapter (arXiv 2303.16199)."""

from .config import AdaptionPromptConfig
from .layer import AdaptedAttention, AdaptedAttentionGPT
from .model import AdaptionPromptModel

__all__ = ["AdaptedAttention", "AdaptedAttentionGPT", "AdaptionPromptConfig", "AdaptionPromptModel"]
