"""Compile every kernel for every GPU generation, without a GPU: registers, spills, shared memory, instructions.

    python -m bench.compile [--quick] [--targets 80,90] [--only lora_down] [--diff]

Each target gets the launch configurations that a GPU of its kind would get. One row a kernel, target and variant,
printed and written to bench/results/compile/<target>.csv, beside the rows of other versions of Triton. A row fails, and
the command with it, when the kernel spills, does not fit the shared memory, uses fp64, has no tensor-core instruction
where it multiplies 16-bit matrices, does not copy the operands of such a loop asynchronously, contracts a product and
a sum where the format rounds both, or dequantises with more than SASS_BUDGET instructions per weight.

`--diff` compares with the rows in the CSVs of the same version instead of writing them; `--only` replaces no others.
"""

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton

from bench.compile_cases import launches
from bench.launches import Launch, compile_for

FOLDER = Path(__file__).parent / "results" / "compile"  # a file a target: sm_80.csv
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_KB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # the most that one block may have
TARGETS = tuple(SHARED_KB)
NO_DOT = (
    "dequantize_kernel", "dequantize_int8_kernel", "quant_gemv_kernel", "sum_partials_kernel", "sum_both_kernel",
    "glu_", "scale_columns_", "segment_sum_kernel", "pieces_kernel",
)  # fmt: skip
EXACT = ("dequantize", "quant_matmul")  # decode a format whose roundings are part of it
SASS_BUDGET = 10  # per weight, of the whole kernel
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP\b)\S", re.M)  # NOPs only fill up behind the last branch


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
    sass_per_weight: float  # that, by the weights that a thread writes; 0 where it writes none
    fault: str


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
        sass=len(INSTRUCTION.findall(sass)),
    )  # fmt: skip
    row["sass_per_weight"] = round(row["sass"] / weights_per_thread(launch), 2) if writes_weights(launch) else 0.0
    return Row(**row, fault=fault(row, variant, target))


def writes_weights(launch: Launch) -> bool:
    return launch.name.startswith("dequantize")


def weights_per_thread(launch: Launch) -> float:
    sizes = dict(launch.constexprs)
    weights = sizes["BLOCK"] if "BLOCK" in sizes else sizes["BLOCK_N"] * sizes["BLOCK_K"]
    return weights / (32 * dict(launch.options)["num_warps"])


def fault(row: dict, variant: str, target: int) -> str:
    dot = not row["kernel"].startswith(NO_DOT)
    tensor_cores = dot and not variant.startswith("fp32")
    main_path = not re.search("odd|masked", variant)
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    if row["shared_kb"] > SHARED_KB[target]:
        return f"needs {row['shared_kb']} of {SHARED_KB[target]} KB shared memory"
    if row["fp64"]:
        return "uses fp64"
    # The FMAs of fp32 products are meant; the GEMV's all are.
    if row["kernel"].startswith(EXACT) and row["fma"] and (tensor_cores or not dot):
        return "contracts to FMA where both roundings are the format"
    if tensor_cores and not row["tensor_core"]:
        return "has no tensor-core instruction"
    if tensor_cores and main_path and row["kernel"].startswith("quant_matmul") and not row["async_copies"]:
        return "does not copy its operands asynchronously"
    # sm_75 rounds to bf16 in software.
    if row["kernel"] in NO_DOT and main_path and target >= 80 and row["sass_per_weight"] > SASS_BUDGET:
        return f"takes {row['sass_per_weight']} instructions per weight, the budget is {SASS_BUDGET}"
    return ""


Job = tuple[str, Launch, int]  # variant, launch, target
Key = tuple[str, str, str]  # of a row: kernel, target, variant
_jobs: list[Job] = []  # read by the forked workers: a JITFunction cannot be pickled


def jobs(quick: bool, targets: tuple[int, ...] = TARGETS, only: str = "") -> list[Job]:
    """Every binary for every target that can take it: Triton has no tensor cores on sm_75 (dropped in 3.3)."""
    todo = []
    for target in targets:
        different = {launch: variant for variant, launch in reversed(list(launches(quick, target)))}  # the first name
        names: dict[str, int] = {}
        for launch, variant in reversed(different.items()):
            name = f"{launch.name} {variant}"
            names[name] = names.get(name, 0) + 1
            if only in name and (target >= 80 or launch.name.startswith(NO_DOT)):
                # Some functions launch the same kernel twice, in two variants.
                todo.append((variant + (f" #{names[name]}" if names[name] > 1 else ""), launch, target))
    return todo


def key(job: Job) -> Key:
    """Of the row that the job will make."""
    variant, launch, target = job
    return launch.name, f"sm_{target}", variant


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


def report(rows: list[Row]) -> int:
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
    return 1 if faults else 0


def stored() -> list[dict[str, str]]:
    """The rows of all targets' files, of every version of Triton."""
    rows = []
    for path in sorted(FOLDER.glob("sm_*.csv")):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def _as_text(row: Row) -> dict[str, str]:
    return {name: str(value) for name, value in asdict(row).items()}


def stored_here() -> dict[Key, dict[str, str]]:
    """The rows of this version of Triton."""
    rows = (row for row in stored() if row["triton"] == triton.__version__)
    return {(row["kernel"], row["target"], row["variant"]): row for row in rows}


def difference(rows: list[Row], targets: tuple[int, ...] = TARGETS, only: str = "") -> list[str] | None:
    """What changed against the CSVs' rows of these targets and this Triton version, of those that `only` selects, one
    line each; None if this version has no rows."""
    known = stored_here()
    if not known:
        return None
    asked_for = {f"sm_{target}" for target in targets}
    before = {name: row for name, row in known.items() if row["target"] in asked_for and _replaced(row, only)}
    after = {(row.kernel, row.target, row.variant): _as_text(row) for row in rows}
    lines = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            lines.append(f"{' '.join(name)}: {'new' if old is None else 'gone'}")
        elif old != new:
            changes = (f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v)
            lines.append(f"{' '.join(name)}: {', '.join(changes)}")
    return lines


def write(rows: list[Row], only: str = "") -> None:
    """Into the CSVs, in place of this Triton version's rows, of those that `only` selects; all others stay."""
    before = stored()
    now = [*(row for row in before if not _replaced(row, only)), *map(_as_text, rows)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for target in dict.fromkeys(row["target"] for row in [*before, *now]):
        with (FOLDER / f"{target}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in now if row["target"] == target)
    print(f"wrote {FOLDER}")


def _replaced(row: dict[str, str], only: str) -> bool:
    return row["triton"] == triton.__version__ and only in f"{row['kernel']} {row['variant']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the matrix, in under a minute")
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="compute capabilities, without the dot")
    parser.add_argument("--only", default="", help="only kernels or variants whose name contains this")
    parser.add_argument("--diff", action="store_true", help="print what changed against the CSVs, and do not write it")
    options = parser.parse_args()
    if options.quick and options.diff:
        parser.error("--diff compares every row, and --quick compiles a tenth of them: leave one of the two out")
    targets = tuple(map(int, options.targets.split(",")))
    rows = run(jobs(options.quick, targets, options.only))
    status = report(rows)
    complete = not options.quick and targets == TARGETS
    if options.diff:
        changes = difference(rows, targets, options.only)
        print("\n".join(changes or ["nothing changed"] if changes is not None else ["no rows of this version"]))
    elif complete:
        write(rows, options.only)
    return status


if __name__ == "__main__":
    sys.exit(main())
