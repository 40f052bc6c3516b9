"""All benchmarks of this machine: a table, rows appended to bench/results/<device>/ops.csv, and its picture beside it.

python -m bench.run [--only lora] [--rounds 21]
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bench import (
    bench_decode,
    bench_dequantize,
    bench_dora,
    bench_experts,
    bench_layer,
    bench_lora_linear,
    bench_mixed_batch,
    bench_qlora_step,
)
from bench.harness import RESULTS, ROUNDS, append, device_name, folder_of, measure, table
from bench.plot import plot, ratios

MODULES = (
    bench_dequantize, bench_lora_linear, bench_dora, bench_experts, bench_decode, bench_mixed_batch, bench_layer,
    bench_qlora_step,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds per case (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0, help="begin no case after this time (default: run all)")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the CSV and PNG (default: %(default)s)"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, left, start = [], [], time.perf_counter()
    for module in tqdm(MODULES, unit="file", disable=None):
        for case in module.cases(device):  # one at a time: all of them together do not fit a small card
            if options.only not in case.op:
                continue
            if options.seconds and time.perf_counter() - start > options.seconds:
                left.append(f"{case.op} {case.shape}")
                continue
            rows += measure(case, device, options.rounds)
    if left:
        print(f"not run after {options.seconds} s: {'; '.join(left)}", file=sys.stderr)
    print(device_name(device))
    print(table(rows))
    if not options.no_csv:
        if not rows:
            print("no case was run", file=sys.stderr)
            return 1
        path = folder_of(device, options.results) / "ops.csv"
        append(rows, path)
        print(f"rows appended to {path}, drawn in {plot(path)}" if ratios(path) else f"rows appended to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
