"""A step of four jobs, each with its own adapter, data and optimiser: together on one base, and with HF PEFT.

    python -m bench.joint_training [--rounds 21] [--kinds dense nf4] [--shapes equal ragged]
                                   [--cpu-time] [--write]

    ours, joint       JobTrainer: one forward and backward for all four, four optimisers
    ours, in turn     the same with max_tokens=512: a job a forward, and the memory of one
    peft, one base    the four adapters in one model, one job's step after the other, with set_adapter between them
    peft, four bases  a model for each job, as four processes have it

Times are of one step of all four jobs (forward, backward, clipping, AdamW) in interleaved rounds (bench/harness.py),
and with --cpu-time of the process's own seconds, which other processes disturb less. The first losses of all must
agree. Memory: bytes of the weights, and the most that a step allocates beside them and the optimisers' states. PEFT's
jobs take turns, and so its peak is of one job; four processes that run at the same time need it four times. --write
appends the times to bench/results.
"""

import argparse
import copy
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fast
from bench.harness import RESULTS, Case, append, device_name, measure, table
from bench.memory_peak import peak

VOCABULARY = 2048
RANKS, ALPHAS, SEEDS, RATE = (8, 16, 16, 32), (16, 16, 32, 32), (1, 2, 3, 4), 1e-4
SHAPES = {"equal": ((2, 256),) * 4, "ragged": ((1, 512), (2, 256), (4, 128), (8, 64))}  # samples, tokens: 512 a job


def llama(kind: str, hidden: int = 512, layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, vocab_size=VOCABULARY,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, linear in list(model.model.named_modules()) if kind == "nf4" else ():
        if isinstance(linear, nn.Linear):
            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, compute_dtype=torch.float32,
                                      quant_type="nf4")  # fmt: skip
            layer.load_state_dict(linear.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, layer.to("cpu"))
    return model


def options(number: int, p: float) -> dict[str, Any]:
    return {"r": RANKS[number], "lora_alpha": ALPHAS[number], "lora_dropout": p, "target_modules": "all-linear",
            "task_type": "CAUSAL_LM"}  # fmt: skip


def name_of(number: int) -> str:
    return f"job{number}"


def samples(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


class Joint:
    """JobTrainer, as its users have it."""

    def __init__(self, base: nn.Module, shapes: tuple[tuple[int, int], ...], p: float, max_tokens: int | None) -> None:
        self.trainer = peft_fast.JobTrainer(base, progress=False, max_tokens=max_tokens)
        for i, shape in enumerate(shapes):
            rows = [{"input_ids": row, "labels": row} for row in samples(shape, i)]
            config = peft_fast.LoraConfig(**options(i, p))
            self.trainer.add(
                peft_fast.Job(
                    name_of(i), config, rows, batch_size=shape[0], max_steps=10**6, learning_rate=RATE, seed=SEEDS[i],
                    shuffle=False,
                )
            )  # fmt: skip

    def step(self) -> list[float]:
        losses = self.trainer.step()
        return [losses[name_of(i)] for i in range(len(losses))]

    @property
    def models(self) -> list[nn.Module]:
        return [self.trainer.model]


class Sequential:
    """HF PEFT, one job after the other, on one base (`shared`) or on one each."""

    def __init__(self, base: nn.Module, shapes: tuple[tuple[int, int], ...], p: float, shared: bool) -> None:
        self.ids = [samples(shape, i) for i, shape in enumerate(shapes)]
        self.models: list[Any] = []
        self.optimizers, self.parameters = [], []
        for i in range(len(shapes)):
            torch.manual_seed(SEEDS[i])
            config = peft.LoraConfig(**options(i, p))
            if shared and self.models:
                self.models[0].add_adapter(name_of(i), config)
            else:
                self.models.append(peft.get_peft_model(copy.deepcopy(base), config, name_of(i)))
            model = self.of(i)
            model.train()
            model.set_adapter(name_of(i))
            self.parameters.append([p for p in model.parameters() if p.requires_grad])
            self.optimizers.append(torch.optim.AdamW(self.parameters[i], lr=RATE, weight_decay=0.0))

    def of(self, number: int) -> Any:
        return self.models[min(number, len(self.models) - 1)]

    def step_of(self, number: int) -> float:
        loss = self.of(number)(input_ids=self.ids[number], labels=self.ids[number], use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters[number], 1.0)
        self.optimizers[number].step()
        self.optimizers[number].zero_grad()
        return loss.item()

    def switch(self, number: int) -> None:
        if len(self.models) == 1:
            self.models[0].set_adapter(name_of(number))

    def step(self) -> list[float]:
        losses = []
        for i in range(len(self.ids)):
            self.switch(i)
            losses.append(self.step_of(i))
        return losses


def providers(kind: str, shapes: tuple[tuple[int, int], ...], p: float) -> dict[str, Any]:
    base = llama(kind)
    clean = copy.deepcopy(base)  # JobTrainer puts its layers into the model that it is given
    return {
        "peft, one base": Sequential(base, shapes, p, shared=True),
        "peft, four bases": Sequential(base, shapes, p, shared=False),
        "ours, joint": Joint(base, shapes, p, None),
        "ours, in turn": Joint(copy.deepcopy(clean), shapes, p, 512),
    }


def cases(kinds: list[str], shape_names: list[str], dropouts: list[float]) -> Iterator[tuple[Case, dict[str, Any]]]:
    for kind in kinds:
        for shape_name, shapes in ((name, SHAPES[name]) for name in shape_names):
            for p in dropouts:
                made = providers(kind, shapes, p)
                sizes = " ".join(f"{n}x{t}" for n, t in shapes)
                shape = f"llama hidden=512 layers=4 {sizes} {kind} p={p}"
                runs: dict[str, Callable[[], object]] = {name: one.step for name, one in made.items()}
                yield Case("joint_step", f"{shape_name}: {shape}", torch.float32, "step", runs, _gate(made, p)), made


def _gate(made: dict[str, Any], p: float) -> Callable[[], None]:
    def check() -> None:
        theirs, *others = (one.step() for one in made.values())
        for losses in others if p == 0.0 else ():  # with dropout the masks differ by design
            assert all(abs(a - b) < 1e-4 * b for a, b in zip(losses, theirs)), (losses, theirs)

    return check


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
    parser.add_argument("--write", action="store_true", help="append the times to bench/results")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cpu")
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    rows, mib = [], 2**20
    for case, made in cases(given.kinds, given.shapes, given.dropouts):
        if given.cpu_time:
            print(_cpu_times(case, given.rounds))
        else:
            mine = list(measure(case, device, given.rounds))
            rows += mine
            print(table(mine))
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)
        print(f"{'':18}{'weights':>10}{'peak of a step':>16}   MiB")
        for name, one in made.items():
            sizes = [size / mib for size in memory(one)]
            print(f"{name:18}{sizes[0]:10.1f}{sizes[1]:16.1f}", flush=True)
    if given.write:
        append(rows, RESULTS / "amd-epyc-x86-64-2-cores.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
