"""Names of peft.utils.warning."""


class PeftWarning(UserWarning):
    """For `filterwarnings` of code that was written for peft. Our warnings are plain UserWarnings."""
