"""Regular expressions that would not come to an end.

A config may come from anyone, and an expression such as `(.*a)*b` takes longer than the universe on a path of 40
letters, with no way to interrupt it in this process. One that could be of this kind is first tried in another.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

SECONDS = 5.0  # a good expression takes milliseconds on the paths of any model
HARMLESS = 3  # so many repetitions, none of a group, are at worst a cube of the path's length
TRY = """
import json, re, sys
patterns, paths = json.load(sys.stdin)
for pattern in patterns:
    for text in (pattern, rf"(?:.*\\.)?(?:{pattern})", rf"(?:|.*?\\.)(?:{pattern})\\.(\\d+)\\."):
        for path in paths:
            re.match(text + r"\\Z", path), re.match(text, path)
"""


def check_patterns_end(config: Any, paths: Iterable[str]) -> None:
    """Raise ValueError for an option of `config` whose regular expression does not come to an end on these paths."""
    for option, pattern in _patterns(config):
        if _could_explode(pattern) and not _ends(pattern, paths):
            raise ValueError(
                f"{option} must be a regular expression that comes to an end, got {pattern!r}, which took more than "
                f"{SECONDS:.0f} s on the names of this model's modules: name the modules in a list instead"
            )


def _patterns(config: Any) -> list[tuple[str, str]]:
    """(option, expression): strings are expressions, in lists only those of layers_pattern, and keys of *_pattern."""
    found: list[tuple[str, str]] = []
    names = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
    for option in (*names, "rank_pattern", "alpha_pattern", "n_frequency_pattern"):
        value = getattr(config, option, None)
        if isinstance(value, str):
            found.append((option, value))
        elif option.endswith("_pattern"):
            found += [(option, pattern) for pattern in value or ()]
    return found


def _could_explode(pattern: str) -> bool:
    if re.search(r"\)\s*[*+{]", pattern) or re.search(r"\(\?P=|\\[1-9]", pattern):
        return True
    return len(re.findall(r"[*+]|\{\d*,\d*\}", pattern)) > HARMLESS


def _ends(pattern: str, paths: Iterable[str]) -> bool:
    if not sys.executable:  # Python inside of another program: there is no way to try
        return True
    texts = sorted(set(paths), key=len)
    command = [sys.executable, "-I", "-S", "-c", TRY]
    try:
        subprocess.run(command, input=json.dumps([[pattern], texts]), text=True, timeout=SECONDS, capture_output=True)
    except subprocess.TimeoutExpired:
        return False
    return True
