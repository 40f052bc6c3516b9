"""Starting an adapter from the base weight: time and peak memory of HF PEFT and ours, on the same layer.

    python -m bench.initialisation [--size 4096] [--rank 16] [--rounds 1] [--starts pissa pissa_niter_4 olora]

One linear layer of size x size, fp32, in a model of its own; both libraries in turn, in each round. Every allocation
of torch is followed (torch.profiler), but not what LAPACK takes itself; the layer does not count. "error": of the
adapter's product against the exact one, by an SVD in fp64, with --exact, which takes long.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import peft
import torch
from torch import nn

import peft_fast
from bench.memory_peak import peak

LIBRARIES = (peft, peft_fast)


def layer(size: int) -> nn.ModuleDict:
    torch.manual_seed(0)
    made = nn.Linear(size, size, bias=False)
    nn.init.normal_(made.weight, std=size**-0.5)
    return nn.ModuleDict({"layer": made})


def start(library: Any, size: int, rank: int, init: str) -> tuple[float, float, Any]:
    """(seconds, MiB, the adapted layer)"""
    model = layer(size)
    config = library.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"], init_lora_weights=init)
    found: dict[str, Any] = {}

    def run() -> None:
        began = time.perf_counter()
        found["model"] = library.get_peft_model(model, config)
        found["seconds"] = time.perf_counter() - began

    most = peak(run)
    return found["seconds"], most / 2**20, found["model"].base_model.model["layer"]


def error(adapted: Any, size: int, rank: int) -> float:
    U, S, Vh = torch.linalg.svd(layer(size)["layer"].get_parameter("weight").detach().double())
    exact = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    A, B = (factor["default"].weight.detach().double() for factor in (adapted.lora_A, adapted.lora_B))
    return float((B @ A - exact).norm() / exact.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--starts", nargs="+", default=["pissa", "pissa_niter_4", "olora"])
    parser.add_argument("--exact", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{options.size} x {options.size}, rank {options.rank}, {torch.get_num_threads()} threads")
    print(f"{'':16}{'seconds: HF PEFT':>18}{'ours':>8}{'ratio':>8}{'MiB: HF PEFT':>16}{'ours':>8}{'ratio':>8}")
    for init in options.starts:
        taken: dict[Any, list[tuple[float, float, Any]]] = {library: [] for library in LIBRARIES}
        for _ in range(options.rounds):
            for library in LIBRARIES:
                taken[library].append(start(library, options.size, options.rank, init))
        (s, t), (m, n) = ([statistics.median(one[i] for one in taken[lib]) for lib in LIBRARIES] for i in (0, 1))
        print(f"{init:16}{s:18.2f}{t:8.2f}{t / s:8.2f}{m:16.0f}{n:8.0f}{n / m:8.2f}", flush=True)
        if options.exact and init == "pissa":
            errors = [error(taken[library][-1][2], options.size, options.rank) for library in LIBRARIES]
            print(f"{'':16}error {errors[0]:.1e}, ours {errors[1]:.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
