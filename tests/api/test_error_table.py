"""The table of errors and warnings: every row in both libraries, and errors.md as the table has it.

python tests/api/test_error_table.py      writes errors.md
"""

import re
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError

import peft
import pytest
from safetensors import SafetensorError

import peft_fast

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from error_table import TABLE, Row, Tools

FILE = Path(__file__).with_name("errors.md")
# All that a row may expect of either library; NotImplementedError is a RuntimeError.
ERRORS = (
    ValueError, TypeError, RuntimeError, LookupError, NameError, AttributeError, ImportError, OSError, AssertionError,
    re.error, SafetensorError, UnpicklingError,
)  # fmt: skip
ROWS = [pytest.param(row, id=row.what) for rows in TABLE.values() for row in rows]


def what_happens(call) -> list[BaseException | Warning]:
    """The error, or else the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            call()
        except ERRORS as error:
            return [error]
    return [one.message for one in said if isinstance(one.message, Warning)]


@pytest.mark.parametrize("row", ROWS)
def test_both_libraries(row: Row, llama, llama_4bit, tmp_path):
    for library in (peft, peft_fast):
        (tmp_path / library.__name__).mkdir()
    tools = Tools(llama, llama_4bit, tmp_path / "peft")
    found = [e for e in what_happens(lambda: row.call(peft, tools)) if row.peft and isinstance(e, row.peft)]
    assert any(row.theirs in str(one) for one in found) == (row.peft is not None), found
    tools = Tools(llama, llama_4bit, tmp_path / "peft_fast")
    ours = what_happens(lambda: row.call(peft_fast, tools))
    if row.silent:
        assert ours == []
        return
    expected = row.ours or row.peft
    fitting = [str(one) for one in ours if isinstance(one, expected) and in_order(row.says, str(one))]
    assert fitting, f"wanted {expected} with {row.says}, got {ours}"


def in_order(parts: tuple[str, ...], text: str) -> bool:
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def test_what_differs_says_why():
    for rows in TABLE.values():
        for row in rows:
            differs = row.silent or row.peft is None or (row.ours is not None and row.ours != row.peft)
            assert bool(row.why) == differs, row.what


def text() -> str:
    lines = ["# Errors and warnings, peft 0.21.2's and ours", ""]
    lines += ["Made from error_table.py by test_error_table.py, which triggers each row in both libraries.", ""]
    for part, rows in TABLE.items():
        lines += [f"## {part}", "", "| what | peft | peft_fast | where we differ |", "|---|---|---|---|"]
        for row in rows:
            ours = "nothing" if row.silent else names(row.ours or row.peft)
            lines.append(f"| {row.what} | {names(row.peft)} | {ours} | {row.why} |")
        lines.append("")
    return "\n".join(lines)


def names(types) -> str:
    if types is None:
        return "nothing"
    return " or ".join(one.__name__ for one in types) if isinstance(types, tuple) else types.__name__


def test_the_file_is_the_table():
    assert FILE.read_text() == text(), f"run python {Path(__file__)}"


if __name__ == "__main__":
    FILE.write_text(text())
