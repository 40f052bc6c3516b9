"""Names of peft.tuners.lycoris_utils."""

from .lycoris import LycorisConfig, LycorisLayer, LycorisTuner

__all__ = ["LycorisConfig", "LycorisLayer", "LycorisTuner"]
