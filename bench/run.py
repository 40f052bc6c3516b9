"""All benchmarks of this machine: a table, rows appended to bench/results/<device>/ops.csv, and its picture beside it.

python -m bench.run [--only lora] [--rounds 21]
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from bench import (
    bench_decode,
    bench_dequantize,
    bench_dora,
    bench_experts,
    bench_joint,
    bench_layer,
    bench_lora_linear,
    bench_mixed_batch,
    bench_qlora_step,
)
from bench.harness import (
    FAILURES,
    LOADED,
    RESULTS,
    ROUNDS,
    Case,
    Row,
    _version,
    append,
    device_name,
    folder_of,
    measure,
    table,
)
from bench.plot import plot, ratios

MODULES = (  # the layer last: a CUDA graph that could not be captured leaves torch's generator in doubt
    bench_dequantize, bench_lora_linear, bench_dora, bench_experts, bench_decode, bench_mixed_batch, bench_joint,
    bench_qlora_step, bench_layer,
)  # fmt: skip


def measured(path: Path) -> set[tuple[str, ...]]:
    """The cases that have rows of this very commit and of these versions."""
    if not path.exists() or not LOADED or LOADED.endswith("+"):
        return set()
    now = {"sha": LOADED, "torch": torch.__version__}
    now |= {name: _version(name) for name in ("triton", "bitsandbytes", "peft")}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[name] == value for name, value in now.items())]
    return {(row["op"], row["shape"], row["dtype"], row["passes"]) for row in rows}


class Run:
    """Case after case; what is measured is in the CSV at once, and an error costs no more than its own case."""

    def __init__(self, device: torch.device, rounds: int, only: str, path: Path | None, done: set[tuple[str, ...]]):
        self.device, self.rounds, self.only, self.path, self.done = device, rounds, only, path, done
        self.rows: list[Row] = []
        self.left: list[str] = []
        self.errors: list[str] = []

    def module(self, module: ModuleType, deadline: float) -> None:
        """Begins no case after `deadline` (time.perf_counter)."""
        try:
            for case in self._wanted(module):
                if time.perf_counter() > deadline:
                    self.left.append(f"{module.__name__} from {case.op} {case.shape} on")
                    return
                self._case(case)
        except FAILURES as error:  # of making a case: those of the other files can still run
            self.errors.append(f"{module.__name__}: {type(error).__name__}: {error}")

    def _wanted(self, module: ModuleType) -> Iterator[Case]:
        for case in module.cases(self.device):  # one at a time: all of them together do not fit a small card
            key = (case.op, case.shape, str(case.dtype).removeprefix("torch."), case.passes)
            if self.only in case.op and key not in self.done:
                yield case

    def _case(self, case: Case) -> None:
        try:
            found = list(measure(case, self.device, self.rounds))
        except FAILURES as error:
            self.errors.append(f"{case.op} {case.shape}: {type(error).__name__}: {error}")
            return
        self.rows += found
        if self.path is not None:
            append(found, self.path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds per case (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0, help="begin no case after this time, each file its share")
    parser.add_argument("--missing", action="store_true", help="no case that has rows of this commit and versions")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the CSV and PNG (default: %(default)s)"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = folder_of(device, options.results) / "ops.csv"
    run = Run(
        device, options.rounds, options.only, None if options.no_csv else path,
        measured(path) if options.missing else set(),
    )  # fmt: skip
    start = time.perf_counter()
    for number, module in enumerate(tqdm(MODULES, unit="file", disable=None), 1):
        run.module(module, start + options.seconds * number / len(MODULES) if options.seconds else float("inf"))
    print(device_name(device))
    if run.rows:
        print(table(run.rows))
    if run.rows and not options.no_csv:
        print(f"rows appended to {path}, drawn in {plot(path)}" if ratios(path) else f"rows appended to {path}")
    if run.left:
        print(f"not run after {options.seconds} s: {'; '.join(run.left)}", file=sys.stderr)
    for error in run.errors:
        print(error, file=sys.stderr)
    if not run.rows and not run.done:
        print("no case was run", file=sys.stderr)
        return 1
    return int(bool(run.left or run.errors))


if __name__ == "__main__":
    sys.exit(main())
