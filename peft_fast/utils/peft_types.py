"""Names of peft.utils.peft_types."""

from peft_fast.peft_types import PeftType, TaskType

__all__ = ["PeftType", "TaskType"]
