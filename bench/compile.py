"""Compile every kernel for every GPU generation, without a GPU: registers, spills, shared memory, instructions.

    python -m bench.compile [--quick] [--targets 80,90] [--only lora_down]

One row a kernel, target and variant, printed and written to bench/results/compile.csv with Triton's version. A row
fails, and the command with it, when the kernel spills, does not fit the shared memory, uses fp64, has no tensor-core
instruction where it multiplies 16-bit matrices, or contracts a product and a sum in the exact dequantisation.
"""

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
import triton

from bench.launches import Launch, compile_for, record
from peft_fast.kernels import dequantize, dropout, lora_down, lora_up_add
from peft_fast.quant import blockwise

CSV = Path(__file__).parent / "results" / "compile.csv"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_KB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # the most that one block may have
TARGETS = tuple(SHARED_KB)
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    triton: str
    kernel: str
    target: str
    variant: str
    registers: int
    spill_bytes: int
    shared_kb: float
    tensor_core: int  # instructions, in the PTX
    async_copies: int
    fma: int
    fp64: int
    sass: int  # instructions of the whole kernel
    fault: str


def launches(quick: bool) -> Iterator[tuple[str, Launch]]:
    """(variant, launch) for what the launchers do with real arguments. Shapes only matter by their divisibility by 16;
    ranks by that, by their tile and by whether one tile is enough."""
    aligned, odd = ((16, 80), ()) if quick else ((8, 16, 17, 32, 64, 128), (17, 80))
    for dname, dtype in DTYPES.items():
        for rank, sname in [*((r, "aligned") for r in aligned), *((r, "odd") for r in odd)]:
            M, N, K = (64, 64, 64) if sname == "aligned" else (33, 71, 67)
            for adapter in dict.fromkeys((dtype, torch.float32)):
                tag = f"{dname} R{rank} {sname}" + (" fp32-adapter" if adapter != dtype else "")
                yield from _lora(tag, dtype, adapter, M, N, K, rank, quick)
        for quant_type, G, nested in [("nf4", 64, True), ("fp4", 64, False), ("nf4", 32, True), ("nf4", 4096, True)]:
            weight = blockwise.quantize(torch.zeros(64, 128), quant_type, G, nested)
            with record() as calls:
                dequantize.dequantize(weight, dtype)
            yield from ((f"{dname} {quant_type} G{G}" + (" nested" if nested else ""), call) for call in calls)


def _lora(
    tag: str, dtype: torch.dtype, adapter: torch.dtype, M: int, N: int, K: int, R: int, quick: bool
) -> Iterator[tuple[str, Launch]]:
    x, y, s = torch.zeros(M, K, dtype=dtype), torch.zeros(M, N, dtype=dtype), torch.zeros(M, R, dtype=dtype)
    A, B, key = torch.zeros(R, K, dtype=adapter), torch.zeros(N, R, dtype=adapter), dropout.new_key("cpu")
    for p in (0.1,) if quick else (0.0, 0.1):
        with record() as calls:
            lora_down.lora_down(x, A, p, key)
            lora_down.lora_down_backward(s, x, A, p, key, torch.zeros_like(x), True)
        yield from ((tag + (" dropout" if p else ""), call) for call in calls)
    with record() as calls:
        lora_up_add.lora_up_add_(y, s, B, 2.0, None if quick else y[0])
        lora_up_add.lora_up_backward(y, s, B, 2.0)
    yield from ((tag, call) for call in calls)


def measure(variant: str, launch: Launch, target: int) -> Row:
    compiled = compile_for(launch, target)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
        sass = subprocess.check_output([CUOBJDUMP, "-sass", file.name], text=True, stderr=subprocess.DEVNULL)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    row = dict(
        triton=triton.__version__, kernel=launch.name, target=f"sm_{target}", variant=variant,
        registers=registers, spill_bytes=stack, shared_kb=round(compiled.metadata.shared / 1024, 1),
        tensor_core=len(TENSOR_CORE.findall(ptx)), async_copies=ptx.count("cp.async."),
        fma=len(re.findall(r"\bfma\.rn", ptx)), fp64=len(re.findall(r"\.f64\b", ptx)),
        sass=len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", sass, re.M)),
    )  # fmt: skip
    return Row(**row, fault=fault(row, variant, target))


def fault(row: dict, variant: str, target: int) -> str:
    exact = row["kernel"].startswith("dequantize")
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    if row["shared_kb"] > SHARED_KB[target]:
        return f"needs {row['shared_kb']} of {SHARED_KB[target]} KB shared memory"
    if row["fp64"]:
        return "uses fp64"
    if exact and row["fma"]:
        return "contracts to FMA where both roundings are the format"
    if not exact and not variant.startswith("fp32") and not row["tensor_core"]:
        return "has no tensor-core instruction"
    return ""


Job = tuple[str, Launch, int]  # variant, launch, target
_jobs: list[Job] = []  # read by the forked workers: a JITFunction cannot be pickled


def jobs(quick: bool, targets: tuple[int, ...] = TARGETS, only: str = "") -> list[Job]:
    """Every binary for every target that can take it: Triton has no tensor cores on sm_75 (dropped in 3.3)."""
    different = {launch: variant for variant, launch in reversed(list(launches(quick)))}  # the first name of each
    return [
        (variant, launch, target)
        for launch, variant in reversed(different.items())
        for target in targets
        if only in f"{launch.name} {variant}" and (target >= 80 or launch.name.startswith("dequantize"))
    ]


def _measure(index: int) -> Row:
    return measure(*_jobs[index])


def run(todo: list[Job]) -> list[Row]:
    """Measure them on two processes, with a progress line on a terminal."""
    _jobs[:] = todo
    rows = []
    with multiprocessing.get_context("fork").Pool(min(2, os.cpu_count() or 1)) as pool:
        for row in pool.imap(_measure, range(len(todo)), chunksize=4):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{len(rows)}/{len(todo)} {row.kernel} {row.target}\033[K", end="", file=sys.stderr)
    return rows


def report(rows: list[Row], write: bool) -> int:
    """Print one line per kernel and target, the worst of its variants; then the faults. 1 if there are any."""
    print(f"Triton {rows[0].triton}: {len(rows)} kernels compiled")
    print(f"{'kernel':24}{'target':8}{'variants':>9}{'registers':>11}{'shared KB':>11}{'spills':>8}{'faults':>8}")
    for kernel, target in dict.fromkeys((row.kernel, row.target) for row in rows):
        group = [row for row in rows if (row.kernel, row.target) == (kernel, target)]
        most = [max(getattr(row, name) for row in group) for name in ("registers", "shared_kb")]
        spilling, faulty = sum(row.spill_bytes > 0 for row in group), sum(bool(row.fault) for row in group)
        print(f"{kernel:24}{target:8}{len(group):>9}{most[0]:>11}{most[1]:>11}{spilling:>8}{faulty:>8}")
    faults = [row for row in rows if row.fault]
    for row in faults:
        print(f"FAULT {row.kernel} {row.target} {row.variant}: {row.fault}")
    if write:
        with CSV.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in fields(Row))
            writer.writerows(astuple(row) for row in rows)
        print(f"wrote {CSV}")
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the matrix, in under a minute")
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="compute capabilities, without the dot")
    parser.add_argument("--only", default="", help="only kernels or variants whose name contains this")
    options = parser.parse_args()
    rows = run(jobs(options.quick, tuple(map(int, options.targets.split(","))), options.only))
    return report(
        rows, write=not options.only and options.targets == parser.get_default("targets") and not options.quick
    )


if __name__ == "__main__":
    sys.exit(main())
