"""Opt-in choice of launch configurations by measurement: PEFT_FAST_AUTOTUNE=1.

Off by default: a first step without minutes of compilation, and sums in the same order in every run. On, the first call
of a kernel with a new key compiles and times the few candidates of configs.py; the winner is kept in this process.
"""

import os
from collections.abc import Callable, Hashable, Sequence

import torch
from triton.testing import do_bench

ENV = "PEFT_FAST_AUTOTUNE"


def _checked(value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"{ENV} must be 0 or 1, got {value!r}")
    return value == "1"


enabled = _checked(os.environ.get(ENV, "0"))
winners: dict[Hashable, dict] = {}


def pick(
    kernel: str, key: tuple, candidates: Sequence[dict], launch: Callable[[dict], object], device: torch.device
) -> dict:
    """The fastest candidate where tuning is on and there is a GPU to measure; else the first."""
    if not (enabled and device.type == "cuda") or len(candidates) == 1:
        return candidates[0]
    full_key = (kernel, device.index, *key)
    if full_key not in winners:
        winners[full_key] = min(candidates, key=lambda config: do_bench(lambda: launch(config)))
    return winners[full_key]
