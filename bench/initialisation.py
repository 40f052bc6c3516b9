"""Starting an adapter from the base weight: time and peak memory of HF PEFT and ours, on the same layer.

    python -m bench.initialisation [--size 4096] [--rank 16] [--rounds 3] [--starts pissa pissa_niter_4 olora]

One linear layer of size x size, fp32, in a model of its own; the libraries take turns, each first in every other round.
Rows are appended to bench/results/<device>/initialisation.csv, unless a start is wrong: base weight and adapter must be
together what the weight was, and ours must hold as much of it as peft's.
Memory twice, the layer not counted: what torch allocates (torch.profiler, in a run of its own, which is a warm-up too),
and the rise of the process's peak of resident memory, which has LAPACK's working space in it (Linux; 0 elsewhere).
"error": of PiSSA's product against the exact one, by an SVD in fp64, with --exact, which takes long.
"""

import argparse
import ctypes
import datetime
import statistics
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peft_fast
from bench.harness import LOADED, append, device_name, folder_of
from bench.memory_peak import peak

LIBRARIES = (peft, peft_fast)
CPU = torch.device("cpu")
FILE = "initialisation.csv"


@dataclass(frozen=True)
class Row:
    date: str
    sha: str
    device: str
    threads: int
    torch: str
    peft: str
    size: int
    rank: int
    start: str
    provider: str
    rounds: int
    median_s: float
    fastest_s: float
    slowest_s: float
    ratio: float  # median over the rounds of this one's time / peft's
    torch_mib: float  # what torch allocates at its most
    resident_mib: float  # by how much the peak of resident memory rises


@dataclass
class Run:
    seconds: float
    resident: float  # MiB
    adapted: Any


def layer(size: int) -> nn.ModuleDict:
    torch.manual_seed(0)
    made = nn.Linear(size, size, bias=False)
    nn.init.normal_(made.weight, std=size**-0.5)
    return nn.ModuleDict({"layer": made})


def adapted(library: Any, model: nn.Module, rank: int, init: str) -> Any:
    config = library.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"], init_lora_weights=init)
    return library.get_peft_model(model, config).base_model.model["layer"]


def allocated(library: Any, size: int, rank: int, init: str) -> float:
    """MiB, the most of torch's at a time."""
    model = layer(size)
    return peak(lambda: adapted(library, model, rank, init)) / 2**20


def timed(library: Any, size: int, rank: int, init: str) -> Run:
    model = layer(size)
    forget_peak()
    before, began = resident(), time.perf_counter()
    made = adapted(library, model, rank, init)
    return Run(time.perf_counter() - began, resident() - before, made)


def forget_peak() -> None:
    """Have Linux count the peak of resident memory from now on, without what malloc keeps for the next call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    with suppress(OSError):  # no Linux, or not allowed: resident() then rises by what is beyond the peak of before
        Path("/proc/self/clear_refs").write_text("5")


def resident() -> float:
    """MiB, the peak; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:")), 0.0)


def product(made: Any) -> Tensor:
    A, B = (factor["default"].weight.detach() for factor in (made.lora_A, made.lora_B))
    return B @ A


def check(theirs: Any, ours: Any, size: int) -> None:
    """Raises AssertionError for a start that changes what the layer computes, and for one that holds less of it."""
    weight = layer(size)["layer"].get_parameter("weight").detach()
    delta = product(ours)
    left = float((ours.base_layer.weight.detach() + delta - weight).abs().max())
    assert left < 1e-5, f"base weight and adapter differ from the weight by {left:.1e}"
    share = float(delta.norm() / product(theirs).norm())
    assert share > 0.999, f"ours holds {share:.4f} of what peft's does"


def error(made: Any, size: int, rank: int) -> float:
    U, S, Vh = torch.linalg.svd(layer(size)["layer"].get_parameter("weight").detach().double())
    exact = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return float((product(made).double() - exact).norm() / exact.norm())


def measure(size: int, rank: int, init: str, rounds: int) -> tuple[list[Row], list[Any]]:
    """(a row a library, their last layers)"""
    watched = {library: allocated(library, size, rank, init) for library in LIBRARIES}
    runs: dict[Any, list[Run]] = {library: [] for library in LIBRARIES}
    for number in range(rounds):
        for library in LIBRARIES if number % 2 == 0 else LIBRARIES[::-1]:
            for one in runs[library]:
                one.adapted = None  # the last is enough
            runs[library].append(timed(library, size, rank, init))
    last = [runs[library][-1].adapted for library in LIBRARIES]
    check(last[0], last[1], size)
    rows = []
    for library in LIBRARIES:
        seconds = [run.seconds for run in runs[library]]
        ratios = [mine / base.seconds for mine, base in zip(seconds, runs[peft])]
        rows.append(
            Row(
                datetime.date.today().isoformat(), LOADED, device_name(CPU), torch.get_num_threads(), torch.__version__,
                peft.__version__, size, rank, init, library.__name__, rounds,
                round(statistics.median(seconds), 3), round(min(seconds), 3), round(max(seconds), 3),
                round(statistics.median(ratios), 3),
                round(watched[library], 1), round(statistics.median(run.resident for run in runs[library]), 1),
            )
        )  # fmt: skip
    return rows, last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", nargs="+", default=["pissa", "pissa_niter_4", "olora"])
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--out", type=Path, default=folder_of(CPU) / FILE)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{options.size} x {options.size}, rank {options.rank}, {torch.get_num_threads()} threads")
    print(f"{'':16}{'':12}{'seconds':>18}{'ratio':>8}{'torch, MiB':>12}{'resident, MiB':>15}")
    for init in options.starts:
        rows, last = measure(options.size, options.rank, init, options.rounds)
        for row in rows:
            span = f"{row.median_s:.2f} ({row.fastest_s:.2f}-{row.slowest_s:.2f})"
            numbers = f"{span:>18}{row.ratio:8.2f}{row.torch_mib:12.0f}{row.resident_mib:15.0f}"
            print(f"{init:16}{row.provider:12}{numbers}", flush=True)
        if options.exact and init == "pissa":
            errors = [error(made, options.size, options.rank) for made in last]
            print(f"{'':16}error {errors[0]:.1e}, ours {errors[1]:.1e}")
        append(rows, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
