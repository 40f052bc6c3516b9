"""The measured tables of README.md and bench/results/README.md, made from the CSVs under bench/results.

    python -m bench.readme            writes them
    python -m bench.readme --check    says, by its exit status, whether they are up to date

What stands between `<!-- bench.readme: NAME -->` and `<!-- end -->` is replaced by the table of that name. Of a
setting that was run more than once on a device the last run counts.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from bench.harness import RESULTS
from bench.plot import ratios

FILES = (RESULTS.parents[1] / "README.md", RESULTS / "README.md")
MARKED = re.compile(r"(<!-- bench\.readme: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _rows(results: Path, name: str) -> list[dict[str, str]]:
    """Of every device's file of this name, in the order of the devices."""
    found = []
    for path in sorted(results.glob(f"*/{name}")):
        with path.open(newline="") as file:
            found += list(csv.DictReader(file))
    return found


def _last(rows: list[dict[str, str]], *keys: str) -> list[dict[str, str]]:
    """Of rows that agree in `keys` the last, where the first of them stood."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], numbers_from: int) -> str:
    rule = ["---" if i < numbers_from else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)) + "\n"


def compare(results: Path) -> str:
    """A training step beside peft's and Unsloth's."""
    head = ("device", "setting", "library", "tokens/s", "speed", "peak MiB", "kept MiB", "largest difference of a loss")
    rows = _last(_rows(results, "compare.csv"), "device", "setting", "provider")
    if not rows:
        return "Nothing measured yet: `make compare`.\n"
    cells = (
        (
            row["device"], row["setting"], f"{row['provider']} {row['version']}", f"{float(row['tokens_per_s']):,.0f}",
            f"{float(row['speedup']):.2f}", f"{float(row['peak_mib']):,.0f}", f"{float(row['saved_mib']):,.0f}",
            "" if float(row["loss_distance"]) == 0 else f"{float(row['loss_distance']):.0e}",
        )
        for row in rows
    )  # fmt: skip
    return _table(head, cells, 3)


NUMBERS = ("bytes_per_token_and_layer", "longest", "longest_chunked_loss")


def longest(results: Path) -> str:
    """What bench.memory has calculated for the published shapes: a line a way, two columns a model."""
    path = results / "longest.csv"
    if not path.exists():
        return "Nothing calculated yet: `python -m bench.memory --longest`.\n"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["way"], row["model"]): row for row in rows}
    cells = []
    for way in dict.fromkeys(row["way"] for row in rows):
        line = [way]
        for model in models:
            row = {name: f"{int(found[way, model][name]):,}" for name in NUMBERS}
            line += [row[NUMBERS[0]], f"{row[NUMBERS[1]]} / {row[NUMBERS[2]]}"]
        cells.append(tuple(line))
    head = ["", *(text for model in models for text in (f"{model}: bytes", "longest / chunked"))]
    return _table(tuple(head), cells, 1)


def tried(results: Path) -> str:
    """The longest rows that were tried on a card, beside those that were calculated."""
    rows = _last(_rows(results, "memory.csv"), "device", "model", "limit_gib", "way")
    if not rows:
        return "Not tried on a card yet: `python -m bench.memory_try`.\n"
    head = ("device", "model", "GiB", "", "tried", "calculated")
    cells = []
    for row in rows:
        bound = "" if row["complete"] == "1" else "at least "  # its time was over before something did not fit
        texts = (row[name] for name in ("device", "model", "limit_gib", "way"))
        cells.append((*texts, f"{bound}{int(row['tried']):,}", f"{int(row['calculated']):,}"))
    return _table(head, cells, 4)


def profile(results: Path) -> str:
    """Where the time of a step goes: ms by category."""
    rows = _last(_rows(results, "profile.csv"), "device", "setting", "provider", "category")
    if not rows:
        return "Nothing profiled yet: `python -m bench.profile`.\n"
    names = list(dict.fromkeys(row["category"] for row in rows))
    steps: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        steps.setdefault((row["device"], row["setting"], row["provider"]), {})[row["category"]] = float(row["ms"])
    cells = ((*step, *(f"{times.get(name, 0):,.1f}" for name in names)) for step, times in steps.items())
    return _table(("device", "setting", "library", *(f"{name}, ms" for name in names)), cells, 3)


def ops(results: Path) -> str:
    """Per device: in how many cases ours is faster or slower by more than the baseline differs from itself."""
    rows = []
    for path in sorted(results.glob("*/ops.csv")):
        found = ratios(path)
        noise = max((max(again, 1 / again) for *_, again in found), default=1.0)
        times = [ratio for _, _, ratio, *_ in found]
        faster, slower = sum(t < 1 / noise for t in times), sum(t > noise for t in times)
        picture = f"[all of them]({(path.with_suffix('.png')).relative_to(results.parents[1])})"
        rows.append((path.parent.name, str(len(found)), str(faster), str(slower), f"{noise:.2f}", picture))
    if not rows:
        return "Nothing measured yet: `make bench`.\n"
    head = ("device", "cases", "faster than the baseline", "slower", "noise: the baseline against itself", "picture")
    return _table(head, rows, 1)


def starts(results: Path) -> str:
    """Adapters that start from the base weight: a line a start, peft's numbers before ours."""
    keys = ("device", "threads", "size", "rank", "start")
    rows = _last(_rows(results, "initialisation.csv"), *keys, "provider")
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["provider"]] = row
    cells = []
    for (device, threads, size, rank, start), by in found.items():
        pairs = [
            f"{float(by['peft'][name]):,.{digits}f} / {float(by['peft_fast'][name]):,.{digits}f}"
            for name, digits in (("median_s", 2), ("torch_mib", 0), ("resident_mib", 0))
        ]
        layer = f"{size} x {size}, rank {rank}, {threads} threads"
        cells.append((device, layer, start, f"{float(by['peft_fast']['ratio']):.2f}", *pairs))
    if not cells:
        return "Nothing measured yet: `python -m bench.initialisation`.\n"
    head = (
        "device",
        "layer",
        "start",
        "time, ours / peft",
        "seconds, peft / ours",
        "peak MiB of torch",
        "resident MiB",
    )
    return _table(head, cells, 3)


TABLES = {
    "compare": compare, "longest": longest, "tried": tried, "profile": profile, "ops": ops, "starts": starts,
}  # fmt: skip


def filled(text: str, results: Path) -> str:
    """`text` with its tables made anew. Raises ValueError for a marker of no table."""

    def replacement(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table is called {match[2]!r}: the markers are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]](results)}{match[3]}"

    return MARKED.sub(replacement, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    texts = {path: path.read_text() for path in FILES}
    new = {path: filled(text, given.results) for path, text in texts.items()}
    changed = [path for path in FILES if new[path] != texts[path]]
    if given.check:
        for path in changed:
            print(f"{path} differs from the files under {given.results}: python -m bench.readme")
        return int(bool(changed))
    for path in changed:
        path.write_text(new[path])
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
