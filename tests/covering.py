"""Covering arrays: few rows of values in which every pair (or triple, ...) of values of two factors occurs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def covering(factors: Mapping[str, Sequence], allowed: Callable[[Row], bool], strength: int = 2) -> list[Row]:
    """Rows {factor: value} in which every combination of `strength` values occurs that a row can have at all.

    `allowed` is asked about whole rows and about parts of them, of which it must refuse none that can become a row.
    Greedy and without chance: a row starts from a combination that is missing, each further factor takes the value that
    adds most, the one that was taken least among equals.
    """
    missing = {c: None for c in _combinations(factors, strength) if _completed(dict(c), factors, allowed) is not None}
    taken: dict[tuple[str, Any], int] = {}
    rows: list[Row] = []
    while missing:
        row = dict(next(iter(missing)))
        for name in factors:
            if name in row:
                continue
            best = None
            for value in factors[name]:
                wider = {**row, name: value}
                if _completed(wider, factors, allowed) is None:
                    continue
                score = sum(c in missing for c in _within(wider, factors, strength, name)), -taken.get((name, value), 0)
                if best is None or score > best[0]:
                    best = score, value
            assert best is not None
            row[name] = best[1]
        for combination in _within(row, factors, strength):
            missing.pop(combination, None)
        for item in row.items():
            taken[item] = taken.get(item, 0) + 1
        rows.append({name: row[name] for name in factors})
    return rows


def _combinations(factors: Mapping[str, Sequence], strength: int) -> list[tuple]:
    return [
        tuple(zip(names, values))
        for names in itertools.combinations(factors, strength)
        for values in itertools.product(*(factors[name] for name in names))
    ]


def _within(row: Row, factors: Mapping[str, Sequence], strength: int, with_: str | None = None) -> list[tuple]:
    """Those of a row, or of a part of one; `with_`: only those that have this factor."""
    items = [(name, row[name]) for name in factors if name in row]
    found = itertools.combinations(items, strength)
    return [c for c in found if with_ is None or any(name == with_ for name, _ in c)]


def _completed(row: Row, factors: Mapping[str, Sequence], allowed: Callable[[Row], bool]) -> Row | None:
    if not allowed(row):
        return None
    free = next((name for name in factors if name not in row), None)
    if free is None:
        return row
    wider = (_completed({**row, free: value}, factors, allowed) for value in factors[free])
    return next((found for found in wider if found is not None), None)
