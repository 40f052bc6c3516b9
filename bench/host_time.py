"""What a layer costs the host on a GPU, measured without one: python -m bench.host_time

A small Llama's steps, Triton kernels chosen and configured as on an H100, up to the call into the driver, which does
nothing: Triton compiles, and looks up what it has compiled, as on a GPU. What torch computes it computes here, on
tensors so small that next to all of its time is the host's too. So this is a step's time where a GPU is always done
before the next launch; a driver call, 2 to 4 us, comes on top of each of our launches. It compares, and finds what is
slow between launches; bench_layer.py measures the same on a GPU.

Models take turns of ten steps, of which the first two are not counted: their code is out of the caches.
"""

import statistics
import tempfile
import time
from typing import Any
from unittest.mock import patch

import peft
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import peft_fast
from bench.bench_qlora_step import adapted, saved_llama
from peft_fast import dispatch
from peft_fast.kernels import configs
from peft_fast.ops import table

CAPABILITY, TOKENS, TURNS, STEPS, UNCOUNTED = 90, 16, 12, 10, 2
HIDDEN, INTERMEDIATE, LAYERS = 64, 128, 4


class NoDriver:
    """Triton's driver for CUDA, but that it loads and launches nothing."""

    def __init__(self) -> None:
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads at most

    def unload_module(self, module: int) -> None:
        pass  # Triton 3.9 calls it

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


def parts(model: Any, ids: Tensor) -> tuple[float, float]:
    """us of a forward and of a backward."""
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    model.zero_grad()
    return 1e6 * (middle - start), 1e6 * (end - middle)


def medians(models: dict[str, Any], ids: Tensor) -> dict[str, tuple[float, float]]:
    """us a layer, forward and backward, of each model."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, model in models.items():
            times[name] += [parts(model, ids) for _ in range(STEPS)][UNCOUNTED:]
    return {
        name: (statistics.median(f for f, _ in found) / LAYERS, statistics.median(b for _, b in found) / LAYERS)
        for name, found in times.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    driver.set_active(NoDriver())  # type: ignore[arg-type]
    ids, cpu = torch.randint(0, 2048, (1, TOKENS)), torch.device("cpu")
    print(f"us a layer, {TOKENS} tokens, r=16, bf16; torch {torch.__version__}\n")
    print("| base | dropout | library | forward | backward | sum | times peft's |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, configs.target(CAPABILITY):
        saved_llama(folder, HIDDEN, INTERMEDIATE, LAYERS)
        for bits, p in ((16, 0.0), (16, 0.05), (4, 0.0), (4, 0.05)):
            models = {m.__name__: adapted(m, folder, cpu, bits, torch.bfloat16, p) for m in (peft, peft_fast)}
            with (
                patch.object(dispatch, "cannot_run_triton", lambda *args, **kwargs: None),
                patch.object(table, "cannot_run_triton", lambda *args, **kwargs: None),
                patch.object(table, "generation", lambda device: CAPABILITY),
            ):
                found = medians(models, ids)
            for library, (forward, backward) in found.items():
                ratio = (forward + backward) / sum(found["peft"])
                base = "NF4" if bits == 4 else "dense"
                row = f"{forward:.0f} | {backward:.0f} | {forward + backward:.0f} | {ratio:.2f}"
                print(f"| {base} | {p} | {library} | {row} |", flush=True)


if __name__ == "__main__":
    main()
