"""A picture of a results file: for every case the newest time of ours as a share of the baseline's, peft's as a rule.

    python -m bench.plot bench/results/<device>/ops.csv     writes ops.png beside it

Left of 1 ours is faster. A line goes from the 20th to the 80th percentile of ours, each over the baseline's median; the
grey band is what the baseline's ratio to its own second run spans on this machine, so what lies in it is no difference.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen
import matplotlib.pyplot as plt

from bench.harness import AGAIN

OURS = "peft_fast"
CASE = ("op", "shape", "dtype", "passes")


def newest(path: Path) -> dict[tuple[str, ...], dict[str, dict[str, str]]]:
    """{(op, shape, dtype, pass): {provider: row}}: providers of a case's last run only, in the order of the file."""
    cases: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            case = tuple(row[column] for column in CASE)
            if row["provider"] in cases.get(case, {}):
                del cases[case]  # a new run begins with a provider that the last one had
            cases.setdefault(case, {})[row["provider"]] = row
    return cases


def ratios(path: Path) -> list[tuple[str, str, float, float, float, float]]:
    """(case, baseline, ours / baseline, its 20th and 80th percentile, the baseline's second run / its first)"""
    found = []
    for case, rows in newest(path).items():
        baseline = next(iter(rows))
        if OURS not in rows or baseline + AGAIN not in rows:
            continue
        ours, base = rows[OURS], float(rows[baseline]["median_ms"])
        spread = (float(ours[p]) / base for p in ("p20_ms", "p80_ms"))
        again = 1 / float(rows[baseline + AGAIN]["speedup"])
        found.append((" ".join(case), baseline, 1 / float(ours["speedup"]), *spread, again))
    return found


def plot(path: Path) -> Path:
    """Draw the file's ratios beside it; ValueError where it has none."""
    found = ratios(path)
    if not found:
        raise ValueError(f"{path} has no case with {OURS} and a baseline that ran twice: run python -m bench.run")
    fig, ax = plt.subplots(figsize=(11, 1.2 + 0.28 * len(found)), layout="constrained")
    noise = max(max(again, 1 / again) for *_, again in found)
    ax.axvspan(1 / noise, noise, color="0.9", label="baseline against itself")
    ax.axvline(1, color="0.5", linewidth=1)
    for y, (_, _, ratio, low, high, _) in enumerate(found):
        ax.plot([low, high], [y, y], color="tab:blue", linewidth=1)
        ax.plot(ratio, y, "o", color="0.4" if 1 / noise <= ratio <= noise else "tab:green" if ratio < 1 else "tab:red")
    ax.set_yticks(range(len(found)), [f"{case} | {baseline}" for case, baseline, *_ in found], fontsize=7)
    ax.invert_yaxis()
    ax.set_xscale("log")
    least, most = (pick(r for _, _, *three, _ in found for r in (*three, 1)) for pick in (min, max))
    ticks = [
        t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10) if least < t < most or t == 1
    ]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("time of peft_fast / time of the baseline (right of |)")
    ax.set_title(path.parent.name)
    fig.legend(loc="outside lower left", fontsize=7)
    out = path.with_suffix(".png")
    fig.savefig(out, dpi=110)
    plt.close(fig)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    print(f"wrote {plot(parser.parse_args().csv)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
