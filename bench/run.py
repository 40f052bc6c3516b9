"""All benchmarks of this machine: a table on the screen, rows appended to bench/results/<device>.csv, and its picture.

python -m bench.run [--only lora] [--rounds 21]
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from bench import (
    bench_decode,
    bench_dequantize,
    bench_dora,
    bench_experts,
    bench_lora_linear,
    bench_mixed_batch,
    bench_qlora_step,
)
from bench.harness import RESULTS, ROUNDS, append, device_name, measure, table
from bench.plot import plot

MODULES = (
    bench_dequantize, bench_lora_linear, bench_dora, bench_experts, bench_decode, bench_mixed_batch, bench_qlora_step,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds per case (default: %(default)s)")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the CSV and PNG (default: %(default)s)"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    todo = [case for module in MODULES for case in module.cases(device) if options.only in case.op]
    for case in tqdm(todo, unit="case", disable=None):
        rows += measure(case, device, options.rounds)
    print(device_name(device))
    print(table(rows))
    if not options.no_csv:
        path = options.results / (re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".csv")
        append(rows, path)
        print(f"rows appended to {path}, drawn in {plot(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
