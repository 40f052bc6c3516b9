"""Timing that can be believed: a red gate gives no number, providers are interleaved, and noise is printed.

A bench module gives `cases(device)`; this file owns everything about time. In every round each provider runs once, each
in another place than in the round before, so a machine that slows down slows all of them. The first provider runs twice
per round, under two names: the ratio of these two is what "no difference" looks like here.
"""

import csv
import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

RESULTS = Path(__file__).parent / "results"
AGAIN = " (again)"
ROUNDS, WARM_UP = 21, 5
# What costs its own case alone: a red gate, memory and the driver, what an op refuses, a kernel that does not compile.
# Anything else is a mistake of the benchmark's.
FAILURES = (AssertionError, RuntimeError, TypeError, ValueError, TritonError)


@dataclass(frozen=True)
class Case:
    """One comparison. `providers` maps a name to a callable that does the work once; the first is the baseline."""

    op: str
    shape: str  # named after a model: "llama-1b q_proj M=512 r=16 nf4"
    dtype: torch.dtype
    passes: str  # "forward", "forward+backward"
    providers: dict[str, Callable[[], object]]
    gate: Callable[[], None]  # raises AssertionError where a provider of ours is wrong
    host: bool = False  # the time until the host is free again; on a GPU its work may go on


@dataclass(frozen=True)
class Row:
    date: str
    sha: str  # with a + where the tree was dirty
    device: str
    threads: int
    torch: str
    triton: str
    bitsandbytes: str
    peft: str
    op: str
    shape: str
    dtype: str
    passes: str
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    speedup: float  # median over the rounds of baseline's time / this time; above 1 is faster than the baseline
    peak_mib: float  # CUDA only: of one run, inputs not counted


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except FileNotFoundError:  # a lent machine may have no git
        return ""


def _loaded() -> str:
    """The commit of the code that runs, with a + where it was changed since; results and pages are no code.
    PEFT_FAST_SHA says it where the code is a copy without git."""
    if told := os.environ.get("PEFT_FAST_SHA"):
        return told
    return _git("rev-parse", "--short", "HEAD") + (
        "+" if _git("status", "--porcelain", "--", ":/", ":!/bench/results", ":!/*.md") else ""
    )


LOADED = _loaded()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model} ({platform.machine()}, {os.cpu_count()} cores)"


def folder_of(device: torch.device, results: Path = RESULTS) -> Path:
    """Where the files of this device are: results/<its name in lower case, with dashes>."""
    return results / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def half_of(device: torch.device) -> torch.dtype:
    """The 16-bit dtype that one trains in there: before sm_80 a GPU has no bf16, and what torch does in its place is
    no baseline."""
    has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bf16 else torch.float16


def _timer(device: torch.device, host: bool = False) -> Callable[[Callable[[], object]], float]:
    """A function that runs another and returns milliseconds; on a GPU with a cold L2 and by its own clock, or the
    host's."""
    if device.type != "cuda" or host:

        def on_cpu(run: Callable[[], object]) -> float:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3

        return on_cpu
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)  # 256 MB: larger than any L2

    def on_gpu(run: Callable[[], object]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    return on_gpu


def _keep_heap() -> None:
    """Have glibc keep what is freed, for every provider. By default it gives the heap's end back to the system and
    takes it again, at 3 us a page here; which provider pays is luck of what lies there: a step in bf16 took 0.92 of
    peft's time, or 1.02 in a process of its own, and 1.00 either way once pages are kept."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is not None:
        for parameter, value in ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0)):
            mallopt(parameter, value)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h; a threshold of -1 is never reached


def measure(case: Case, device: torch.device, rounds: int = ROUNDS) -> Iterator[Row]:
    """Gate, warm up, then `rounds` interleaved rounds; one row a provider."""
    case.gate()
    if device.type == "cpu":
        _keep_heap()
    baseline = next(iter(case.providers))
    runs = {**case.providers, baseline + AGAIN: case.providers[baseline]}
    timer = _timer(device, case.host)
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):  # each is first, second, third in turn: what ran before leaves its traces in memory
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            times[name].append(timer(runs[name]))
    peaks = {name: _peak_mib(run, device) for name, run in runs.items()}
    common = dict(
        date=datetime.date.today().isoformat(),
        sha=LOADED,
        device=device_name(device), threads=torch.get_num_threads(), torch=torch.__version__, triton=_version("triton"),
        bitsandbytes=_version("bitsandbytes"), peft=_version("peft"), op=case.op, shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."), passes=case.passes,
    )  # fmt: skip
    for name, values in times.items():
        p20, median, p80 = (sorted(values)[round(q * (len(values) - 1))] for q in (0.2, 0.5, 0.8))
        rounded = dict(median_ms=round(median, 4), p20_ms=round(p20, 4), p80_ms=round(p80, 4))
        ratio = statistics.median(base / own for base, own in zip(times[baseline], values))
        yield Row(**common, provider=name, **rounded, speedup=round(ratio, 3), peak_mib=peaks[name])


def _peak_mib(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def table(rows: list[Row]) -> str:
    """What a reader wants to see: one line a case and provider."""

    def cells(r: Row) -> tuple[str, ...]:
        times = f"{r.median_ms:.3f}", f"{r.p20_ms:.3f}-{r.p80_ms:.3f}"
        return (r.op, r.shape, r.dtype, r.passes, r.provider, *times, f"{r.speedup:.2f}x")

    lines = [("op", "shape", "dtype", "pass", "provider", "median ms", "p20-p80 ms", "speed-up"), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def append(rows: Sequence[Any], path: Path) -> None:
    """Add rows, dataclasses of one kind, to a CSV, which is never rewritten; without rows nothing is written."""
    if not rows:
        return
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
