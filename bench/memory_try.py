"""The longest sequence that fits, by trying: bench/memory.py calculates it, a card shows it.

    python -m bench.memory_try --model llama-3-8b --limit 24 [--seconds 60]

A training step (forward, backward, AdamW; random weights, nothing is downloaded) on rows that grow until memory is out,
then halfway between what fitted and what did not. On a GPU torch gets no more than --limit of its memory; on a CPU what
a step allocates is compared with it. Rows are appended to bench/results/<device>/memory.csv, the calculated ones beside
those that were tried. Exit status: 1 where --seconds ended a search; `tried` is then what had fitted so far, and
`too_long`, the shortest row that did not fit, is not near it, or 0.
"""

import argparse
import csv
import datetime
import gc
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import peft_fast
from bench.compare import models
from bench.compare.options import SHAPES, Options
from bench.harness import LOADED, RESULTS, device_name, folder_of
from bench.memory import GIB, RESERVED, WAYS, Calculated, Recipe, Way
from bench.memory_peak import peak
from peft_fast.memory import nbytes, weights_of

TOLERANCE = 0.03  # of a length: where to stop


class Found(NamedTuple):
    """What a search came to."""

    fitted: int  # the longest row that did; 0: none
    too_long: int  # the shortest that did not; 0: none was met
    is_complete: bool  # nothing between the two was left to try, or all lengths fit


def longest_that_fits(fits: Callable[[int], bool], start: int, most: int, deadline: float = float("inf")) -> Found:
    """The longest length up to `most` for which `fits`, to within TOLERANCE.

    `fits` must be true up to some length and false beyond it. After `deadline` (time.perf_counter) nothing more is
    tried: what has fitted so far is then a lower bound and no answer.
    """
    if not fits(start):
        return Found(0, start, True)
    low, high = start, 0
    while not high and low < most and time.perf_counter() < deadline:
        tokens = min(most, 2 * low)
        low, high = (tokens, 0) if fits(tokens) else (low, tokens)
    while high - low > TOLERANCE * low and time.perf_counter() < deadline:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Found(low, high, low == most or 0 < high - low <= TOLERANCE * low)


class Trial:
    """A model as a Way trains it, and whether a row of so many tokens fits."""

    def __init__(self, way: Way, options: Options, device: torch.device, limit: int) -> None:
        self.device, self.limit = device, limit
        base = models.load(options, device)
        base.config.use_cache = False
        if "layers" in way.recompute:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        config = way.library.LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = way.library.get_peft_model(base, config).train()
        if chosen := set(way.recompute) - {"layers"}:
            peft_fast.set_recompute(self.model, norms="norms" in chosen, mlps="mlps" in chosen)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self._step(16)  # the optimiser's states

    def _step(self, tokens: int) -> None:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fits(self, tokens: int) -> bool:
        if self.device.type == "cuda":
            return self._fits_on_a_gpu(tokens)
        states = sum(t.nbytes for state in self.optimizer.state.values() for t in state.values())
        there = nbytes(weights_of(self.model)) + states
        return there + peak(lambda: self._step(tokens)) <= self.limit - RESERVED

    def _fits_on_a_gpu(self, tokens: int) -> bool:
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (self.limit - RESERVED) / total), self.device)
        try:
            self._step(tokens)
        except torch.OutOfMemoryError:
            fitted = False
        else:
            fitted = True
        self.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        return fitted


def tried(shape: str, way: Way, rank: int, limit: int, device: torch.device, seconds: float) -> Found:
    options = Options(shape, 16, 1, 1, rank, 0.0, 4, True, False, False)
    trial = Trial(way, options, device, limit)
    start, most = (512, 1 << 18) if device.type == "cuda" else (16, 256)
    return longest_that_fits(trial.fits, start, most, time.perf_counter() + seconds)


def limit_on(device: torch.device, limit: float) -> float:
    """GiB: no more than the card has, of which a smaller one's rows would otherwise say what it cannot do."""
    if device.type != "cuda":
        return limit
    return min(limit, round(torch.cuda.get_device_properties(device).total_memory / GIB, 1))


def append(rows: list[dict[str, Any]], path: Path) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b" if on_gpu else "small", choices=SHAPES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--limit", type=float, default=24 if on_gpu else 1.1, help="GiB, one not for tensors")
    parser.add_argument("--seconds", type=float, default=60, help="for all ways together (default: %(default)s)")
    parser.add_argument("--only", default="", help="only ways whose name contains this")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if on_gpu else "cpu")
    ways = [way for way in WAYS if given.only in way.name and "layers, " not in way.name]
    limit_gib = limit_on(device, given.limit)
    recipe, limit = Recipe(models.config_of(given.model), rank=given.rank), int(limit_gib * GIB)
    cut_short = []
    path = folder_of(device, given.results) / "memory.csv"
    for way in ways:
        found = tried(given.model, way, given.rank, limit, device, given.seconds / len(ways))
        length = max(64, found.fitted)
        calculated = Calculated(way, recipe).longest(limit - RESERVED, at=(max(32, length // 2), length))
        row = {
            "date": datetime.date.today().isoformat(), "sha": LOADED, "device": device_name(device),
            "torch": torch.__version__, "model": given.model, "rank": given.rank, "limit_gib": limit_gib,
            "way": way.name, "tried": found.fitted, "too_long": found.too_long, "complete": int(found.is_complete),
            "calculated": calculated,
        }  # fmt: skip
        append([row], path)  # at once: the stage may be ended
        bound = "" if found.is_complete else "at least "
        print(f"{given.model}, {limit_gib:g} GiB, {way.name}: {bound}{found.fitted:,} tried, {calculated:,} calculated")
        cut_short += [way.name] * (not found.is_complete)
    if cut_short:
        print(f"{given.seconds:g} s were not enough for: {'; '.join(cut_short)}", file=sys.stderr)
    return int(bool(cut_short))


if __name__ == "__main__":
    sys.exit(main())
