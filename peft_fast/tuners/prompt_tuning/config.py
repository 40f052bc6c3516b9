"""PromptTuningConfig."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from peft_fast.config import PromptLearningConfig
from peft_fast.option_help import with_help
from peft_fast.peft_types import PeftType


class PromptTuningInit(str, Enum):
    """What a prompt is made from at first: a text, tokens of the vocabulary drawn at random, or random numbers."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@with_help
@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Trained embeddings before those of the input (arXiv 2104.08691).

    prompt_tuning_init: see PromptTuningInit. For TEXT: prompt_tuning_init_text, cut or repeated to the number of
      virtual tokens; tokenizer_name_or_path, and tokenizer_kwargs for its from_pretrained.
    Raises ValueError for options that do not go together.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        self.prompt_tuning_init = named(self.inits(), "prompt_tuning_init", self.prompt_tuning_init)
        from_text = self.prompt_tuning_init == "TEXT"
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if from_text and not getattr(self, name):
                raise ValueError(f"prompt_tuning_init='TEXT' needs {name}, got {getattr(self, name)!r}")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError("tokenizer_kwargs are for prompt_tuning_init='TEXT', got them for another: leave them out")

    @classmethod
    def inits(cls) -> type[Enum]:
        return PromptTuningInit


def named(kind: type[Enum], option: str, value: Any) -> Any:
    """The member of an enum that an option's value names. Raises ValueError where there is none."""
    names = [member.value for member in kind]
    if value not in names:
        raise ValueError(f"{option} must be one of {names}, got {value!r}")
    return kind(value)
