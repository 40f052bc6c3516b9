"""What the documentation of a config says of each option, where parsers of arguments look: field.metadata["help"]."""

import copy
import inspect
import re
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

NOT_DESCRIBED = "an option of peft's that is not built here: see NOT_BUILT"


def with_help(cls: Class) -> Class:
    """The dataclass, with a help text for each field, out of the docstrings of the class and its bases.

    A docstring says "name: text" or "name, other: text", up to the next such; or it names the option in a sentence.
    """
    made: Any = cls
    names = {field.name for field in fields(made)}
    docs = [" ".join(inspect.cleandoc(base.__dict__.get("__doc__") or "").split()) for base in made.__mro__]
    docs = [doc.split(" Raises ")[0] for doc in docs]
    texts: dict[str, str] = {}
    for doc in docs:
        texts = listed(doc, names) | texts
    for doc in docs:
        texts = mentioned(doc, names) | texts
    for name, field in made.__dataclass_fields__.items():
        own = copy.copy(field)  # a base's field is the base's
        own.metadata = MappingProxyType({**field.metadata, "help": texts.get(name, NOT_DESCRIBED)})
        made.__dataclass_fields__[name] = own
    return cls


def listed(doc: str, names: set[str]) -> dict[str, str]:
    """{name: what is said of it after a colon}"""
    heads = [
        (match.start(), match.end(), named)
        for match in re.finditer(r"(?:^|(?<=[.:;] ))(\w+(?:, \w+)*): ", doc)
        if names.issuperset(named := match[1].split(", "))
    ]
    ends = [start for start, _, _ in heads[1:]] + [len(doc)]
    return {name: doc[start:end].strip() for (_, start, named), end in zip(heads, ends) for name in named}


def mentioned(doc: str, names: set[str]) -> dict[str, str]:
    """{name: the first sentence that has it as a word}"""
    found: dict[str, str] = {}
    for sentence in re.split(r"(?<=\.) ", doc):
        for name in names - found.keys():
            if re.search(rf"\b{name}\b", sentence):
                found[name] = sentence
    return found
