"""What the methods share that learn prompts and leave the model as it is: prefix tuning, prompt tuning, ...

A method is a config and an encoder, a line in PROMPT_METHODS. From here it gets

    tuner.py        its life: adding, activating, switching off, deleting, saving, loading
    inputs.py       the prompt in the inputs of each task's forward
    cache.py        prefixes as transformers' caches
    generation.py   the first step of generating
    sizes.py        the base model's sizes
"""

from .encoder import BasePromptEncoder
from .tuner import PromptTuner

__all__ = ["BasePromptEncoder", "PromptTuner"]
