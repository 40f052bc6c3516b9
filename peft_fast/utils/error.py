"""Names of peft.utils.error."""

from peft_fast.errors import NoMatchingPeftModuleError, PeftError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]
