"""The cases of bench_joint.py with other shapes, in CPU time, and with the memory they take; printed, not kept.

    python -m bench.joint_training [--rounds 21] [--kinds dense nf4] [--shapes equal ragged] [--cpu-time]

Times are of interleaved rounds (bench/harness.py); with --cpu-time of the process's own seconds, which other processes
disturb less. Memory: bytes of the weights, and the most that a step allocates beside them and the optimisers' states.
PEFT's jobs take turns, and so its peak is of one job; four processes that run at the same time need it four times.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bench.bench_joint import SHAPES, Joint, case_of, providers
from bench.harness import Case, device_name, measure, table
from bench.memory_peak import peak


def memory(one: Any) -> tuple[int, int]:
    """Bytes of (weights, the most allocated in a step)."""
    tensors = [t for model in one.models for t in _weights(model)]
    weights = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    if isinstance(one, Joint):
        return weights, peak(one.step)
    peaks = []
    for i in range(len(one.ids)):
        one.switch(i)
        peaks.append(peak(lambda i=i: one.step_of(i)))
    return weights, max(peaks)


def _weights(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        yield from (value for value in vars(state or object).values() if isinstance(value, torch.Tensor))


def _cpu_times(case: Case, rounds: int) -> str:
    """Seconds of the process, and the median over the rounds of each one's ratio to the first."""
    case.gate()
    names, taken = list(case.providers), {name: [] for name in case.providers}
    for number in range(rounds + 1):
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            start = time.process_time()
            case.providers[name]()
            taken[name].append(time.process_time() - start)
    baseline = taken[names[0]][1:]  # the first round warms up
    lines = [case.shape]
    for name, (_, *times) in taken.items():
        ratio = statistics.median(own / base for own, base in zip(times, baseline))
        lines.append(f"{name:18}{statistics.median(times):8.3f} s of CPU, {ratio:.2f} x {names[0]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", default=["dense", "nf4"], choices=["dense", "nf4"])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--cpu-time", action="store_true", help="of the process, not of the clock on the wall")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cpu")
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    mib = 2**20
    for asked in itertools.product(given.kinds, given.shapes, given.dropouts):
        case = case_of(*asked, device)
        if given.cpu_time:
            print(_cpu_times(case, given.rounds))
        else:
            print(table(list(measure(case, device, given.rounds))))
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)
        print(f"{'':18}{'weights':>10}{'peak of a step':>16}   MiB")
        for name, one in providers(*asked, device).items():
            sizes = [size / mib for size in memory(one)]
            print(f"{name:18}{sizes[0]:10.1f}{sizes[1]:16.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
