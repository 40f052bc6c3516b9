"""May training merge? The experiment behind table.MERGE_M (route merge: W' = W + scale * B @ A, in 16 bits).

    python -m bench.merge_gate [--steps 250] [--seeds 3]

An update that is smaller than half an ulp of the weight could vanish in W'. Two conditions, each for a usual learning
rate and for one so small that most of the update stays below half an ulp:

    slope   <W' - W, D> / <D, D>, D = scale * B @ A, of every layer at steps 5, 10, 20 and 50 within 0.95 to 1.05:
            what the rounded weight keeps of the update, 1 when rounding errors do not point along it
    loss    |held-out loss - that of the fp32 run| <= the same of route split + 2e-4 after 250 steps, for every seed.
            The same start and batches in fp32, in bf16 on route split, in bf16 on route merge

The slope is itself a sum of rounding errors: where these are independent, its standard error for n weights is about
sqrt(ulp / (n |D|)), so a small layer may leave the bounds by chance. `wide`, a random model with layers of 1 to 2.9
million weights, is there for the slopes; `small`, the main job's base (65,536 to 180,224), for the losses.

Written: bench/results/merge_gate.csv, one row a run; merge_gate_slopes.csv; merge_gate.png.
"""

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import peft_fast
from bench.harness import RESULTS
from peft_fast.dispatch import use_route
from peft_fast.finetune import embedded
from peft_fast.kernels import reference
from peft_fast.tuners.lora.layer import Linear

ARMS = {"fp32": (torch.float32, "split"), "split": (torch.bfloat16, "split"), "merge": (torch.bfloat16, "merge")}
RATES = (2e-4, 2e-6)
SLOPE_STEPS = (5, 10, 20, 50)
SLOPES_ALLOWED, LOSS_ALLOWED = (0.95, 1.05), 2e-4
ROWS, LENGTH, HELD_OUT_ROWS = 4, 128, 64


@dataclass(frozen=True)
class Run:
    rate: float
    seed: int
    arm: str
    steps: int
    loss_before: float  # nats per byte on the held-out rows, in the arm's own arithmetic
    loss_after: float


@dataclass(frozen=True)
class Slope:
    model: str
    rate: float
    seed: int
    step: int
    layer: str
    weights: int
    slope: float
    standard_error: float  # of the slope, if rounding errors are independent of the update
    below_half_an_ulp: float  # share of the layer's elements whose update is


def rows_of(path: str, model_dir: str) -> Tensor:
    """int64 [rows, LENGTH]: the tokens of a JSONL file's texts, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    texts = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    tokens = torch.tensor([token for ids in tokenizer(texts).input_ids for token in ids])
    return tokens[: tokens.numel() // LENGTH * LENGTH].view(-1, LENGTH)


def build(model_dir: str, seed: int) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
    base = peft_fast.quantize_linear_layers(base.requires_grad_(False))
    torch.manual_seed(seed)
    config = peft_fast.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft_fast.get_peft_model(base, config).train()


def held_out_loss(model: torch.nn.Module, rows: Tensor, dtype: torch.dtype) -> float:
    with torch.no_grad(), autocast(dtype):
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in rows.split(16)]
    return sum(losses) / len(losses)


def autocast(dtype: torch.dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def slopes(model: torch.nn.Module, *run: Any) -> Iterator[Slope]:
    """One for each adapted layer; `run`: the first four fields."""
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear):
            continue
        A, B = (factor.weight.detach() for factor in layer.factors("default"))
        scale, weight = layer.scaling["default"], layer.base_weight()
        assert not isinstance(weight, Tensor)
        delta = scale * (B @ A)
        before = reference.dequantize(weight, torch.bfloat16)
        after, _ = reference.dequantize_merge(weight, A, B, scale, torch.bfloat16)
        delta, kept = delta.double(), after.double() - before.double()
        ulp = torch.nextafter(before.abs(), before.new_tensor(torch.inf)).double() - before.abs().double()
        power = delta.square().sum()
        # An update of d ulps, d < 1, moves the rounded weight by one ulp with probability d: variance d (1 - d) ulp^2.
        part = (delta.abs() / ulp).remainder(1.0)
        error = (delta.square() * part * (1 - part) * ulp.square()).sum().sqrt() / power
        yield Slope(
            *run,
            layer=name.removeprefix("base_model.model.model."),
            weights=delta.numel(),
            slope=round(((kept * delta).sum() / power).item(), 4),
            standard_error=round(error.item(), 4),
            below_half_an_ulp=round((delta.abs() < ulp / 2).double().mean().item(), 3),
        )


def wide_model(folder: str, vocab_size: int) -> str:
    """A random Llama of two layers as wide as the narrowest of a 1B model; `folder` back."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8, vocab_size=vocab_size
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train(name: str, model_dir: str, rows: Tensor, held_out: Tensor, rate: float, seed: int, arm: str, steps: int):
    """(the run, its slopes): AdamW at a constant rate, no decay; batches depend on the seed alone."""
    dtype, route = ARMS[arm]
    model = build(model_dir, seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    order = torch.randint(0, rows.shape[0], (steps, ROWS), generator=torch.Generator().manual_seed(seed))
    found: list[Slope] = []
    with use_route(route):
        before = held_out_loss(model, held_out, dtype)
        for step in tqdm(range(1, steps + 1), desc=f"lr {rate:g} seed {seed} {arm}", leave=False, disable=None):
            batch = rows[order[step - 1]]
            with autocast(dtype):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if arm == "merge" and step in SLOPE_STEPS:
                found += slopes(model, name, rate, seed, step)
        after = held_out_loss(model, held_out, dtype)
    return Run(rate, seed, arm, steps, before, after), found


def verdict(runs: list[Run], found: list[Slope]) -> list[str]:
    """What fails, in words; empty where every layer of both models and every loss passes the gate."""
    low, high = SLOPES_ALLOWED
    failures = [f"slope: {s}" for s in found if not low <= s.slope <= high]
    losses = {(r.rate, r.seed, r.arm): r.loss_after for r in runs}
    for rate, seed in dict.fromkeys((r.rate, r.seed) for r in runs):
        exact = losses[rate, seed, "fp32"]
        merge, split = (abs(losses[rate, seed, arm] - exact) for arm in ("merge", "split"))
        if merge > split + LOSS_ALLOWED:
            failures.append(f"loss at lr {rate:g}, seed {seed}: merge is {merge:.5f} from fp32, split {split:.5f}")
    return failures


def _fails_from(found: list[Slope], weights: int) -> bool:
    """Whether any layer of at least this size leaves the bounds."""
    low, high = SLOPES_ALLOWED
    return any(s.weights >= weights and not low <= s.slope <= high for s in found)


def plot(runs: list[Run], found: list[Slope], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    losses = {(r.rate, r.seed, r.arm): r.loss_after for r in runs}
    cases = list(dict.fromkeys((r.rate, r.seed) for r in runs))
    for offset, arm in ((-0.15, "split"), (0.15, "merge")):
        differences = [losses[rate, seed, arm] - losses[rate, seed, "fp32"] for rate, seed in cases]
        axes[0].bar([i + offset for i in range(len(cases))], differences, 0.3, label=arm)
    axes[0].set_xticks(range(len(cases)), [f"lr {rate:g}\nseed {seed}" for rate, seed in cases], fontsize=8)
    axes[0].set_ylabel("held-out loss - fp32's (nats per byte)")
    axes[0].legend()
    for i, rate in enumerate(RATES):
        for step in SLOPE_STEPS:
            for j, name in enumerate(("small", "wide")):
                values = [s.slope for s in found if (s.model, s.rate, s.step) == (name, rate, step)]
                x, label = SLOPE_STEPS.index(step) + 0.4 * i + 0.2 * j - 0.3, f"{name}, lr {rate:g}"
                axes[1].plot([x] * len(values), values, ".", color=f"C{2 * i + j}", label=label if step == 5 else None)
    for bound in SLOPES_ALLOWED:
        axes[1].axhline(bound, color="grey", linewidth=0.8)
    axes[1].set_xticks(range(len(SLOPE_STEPS)), [f"step {step}" for step in SLOPE_STEPS])
    axes[1].set_ylabel("slope: share of the update that W' keeps")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    made = embedded.prepare()
    rows, held_out = (rows_of(path, made.model) for path in (made.data, made.eval_data))
    held_out = held_out[:: held_out.shape[0] // HELD_OUT_ROWS][:HELD_OUT_ROWS]
    runs: list[Run] = []
    found: list[Slope] = []
    cases = [(rate, seed, arm) for rate in RATES for seed in range(options.seeds) for arm in ARMS]
    with tempfile.TemporaryDirectory() as folder:
        wide = wide_model(folder, int(rows.max()) + 1)
        for rate, seed in tqdm([case[:2] for case in cases if case[2] == "merge"], unit="run", disable=None):
            steps = min(options.steps, max(SLOPE_STEPS))
            found += train("wide", wide, rows, held_out[:1], rate, seed, "merge", steps)[1]
    for rate, seed, arm in tqdm(cases, unit="run", disable=None):
        run, its_slopes = train("small", made.model, rows, held_out, rate, seed, arm, options.steps)
        runs.append(run)
        found += its_slopes
        print(f"lr {rate:g} seed {seed} {arm:5}: held-out {run.loss_before:.5f} -> {run.loss_after:.5f}", flush=True)
    for name, kind, entries in (("merge_gate", Run, runs), ("merge_gate_slopes", Slope, found)):
        with (RESULTS / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(entry) for entry in entries)
    plot(runs, found, RESULTS / "merge_gate.png")
    for name in ("small", "wide"):
        z = torch.tensor([(s.slope - 1) / s.standard_error for s in found if s.model == name])
        outside = sum(not SLOPES_ALLOWED[0] <= s.slope <= SLOPES_ALLOWED[1] for s in found if s.model == name)
        print(f"{name}: {outside} of {len(z)} slopes outside {SLOPES_ALLOWED}; (slope - 1) / standard error: "
              f"mean {z.mean():.2f}, standard deviation {z.std():.2f}")  # fmt: skip
    failures = verdict(runs, found)
    smallest = min((s.weights for s in found if not _fails_from(found, s.weights)), default=None)
    print("\n".join(failures) or "merging passes the gate")
    print(f"slopes pass in all layers of at least {smallest} weights")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
