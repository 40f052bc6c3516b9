"""Peak memory of a training step beyond the model itself: HF PEFT + bitsandbytes and ours, on the same models.

    python -m bench.memory_peak [--hidden 512] [--layers 4] [--tokens 512]

Forward, loss and backward of a 4-bit Llama; every allocation of torch is followed (torch.profiler), so the numbers are
exact and the same in every run. On a CPU: what a GPU adds (cuBLAS workspaces, the allocator's rounding) is not there.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from itertools import product

import peft
import torch
from torch.profiler import ProfilerActivity, profile

import peft_fast
from bench.memory_saved import VOCABULARY, Setting, build


def peak(run: Callable[[], object]) -> int:
    """The most bytes that were allocated at one time during a call, of those that it allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    now = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def of_a_step(library, setting: Setting, hidden: int, layers: int, tokens: int) -> int:
    """Bytes, of the second step: in the first the gradients come into being."""
    model = build(library, setting, hidden, layers)
    ids = torch.randint(1, VOCABULARY, (2, tokens // 2))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    step()
    return peak(step)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    sizes = (options.hidden, options.layers, options.tokens)
    print(f"peak MiB of a step: 4-bit Llama, {sizes[0]} wide, {sizes[1]} layers, {sizes[2]} tokens")
    print(f"{'':37}{'HF PEFT':>10}{'ours':>8}{'ratio':>8}")
    with torch.compiler.set_stance("force_eager"):
        for prepare, autocast, p in product((True, False), (False, True), (0.0, 0.05)):
            setting = Setting("4-bit", prepare, autocast, p)
            theirs, ours = (of_a_step(library, setting, *sizes) for library in (peft, peft_fast))
            label = f"{'fp32' if prepare else 'bf16'} residual{' autocast' if autocast else ''} p={p}"
            print(f"{label:37}{theirs / 2**20:10.1f}{ours / 2**20:8.1f}{ours / theirs:8.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
