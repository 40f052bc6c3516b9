"""MultitaskPromptTuningConfig."""

from dataclasses import dataclass
from enum import Enum

from peft_fast.option_help import with_help
from peft_fast.peft_types import PeftType
from peft_fast.tuners.prompt_tuning.config import PromptTuningConfig


class MultitaskPromptTuningInit(str, Enum):
    """What prompts are made from at first: a text, random numbers, or a file of prompts trained on source tasks, of
    which the mean over tasks is taken, one task, or only what the tasks share."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


FROM_FILE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@with_help
@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """One prompt that tasks share, times a matrix of rank num_ranks for each of num_tasks (arXiv 2303.02861).

    prompt_tuning_init: see MultitaskPromptTuningInit. prompt_tuning_init_state_dict_path: the file of an adapter, for
      those that start from one; prompt_tuning_init_task: which of its tasks, for EXACT_SOURCE_TASK.
    Every forward takes `task_ids` [batch]; so does generate.
    """

    tied_to_weights = ("peft_type", "num_virtual_tokens", "num_tasks", "num_ranks")

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MULTITASK_PROMPT_TUNING

    @classmethod
    def inits(cls) -> type[Enum]:
        return MultitaskPromptTuningInit

    def check(self) -> None:
        super().check()
        for name in ("num_ranks", "num_tasks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        init = MultitaskPromptTuningInit(self.prompt_tuning_init).value
        if init in FROM_FILE and not self.inference_mode:
            if not self.prompt_tuning_init_state_dict_path:
                raise ValueError(
                    f"prompt_tuning_init={init!r} needs prompt_tuning_init_state_dict_path, the "
                    "file of an adapter for several tasks"
                )
            if init != "ONLY_SOURCE_SHARED" and self.num_tasks != 1:
                raise ValueError(
                    f"prompt_tuning_init={init!r} makes a prompt for one task: num_tasks must be "
                    f"1, got {self.num_tasks}"
                )
