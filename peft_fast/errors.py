"""Errors with names of their own; all are ValueErrors too, which is what the library raises elsewhere."""


class PeftError(Exception):
    """The base of peft's own errors."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """An adapter was to be put into a model that has none of the modules that its config names."""
