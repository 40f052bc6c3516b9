"""A step of four jobs, each with its own adapter, data and optimiser: together on one base, and with HF PEFT.

    ours, joint       JobTrainer, max_tokens=None: one forward and backward for all four, four optimisers
    ours, in turn     with max_tokens=512, a CPU's default: a job a forward, and the memory of one
    peft, one base    the four adapters in one model, one job's step after the other, with set_adapter between them
    peft, four bases  a model for each job, as four processes have it

Times are of one step of all four jobs: forward, backward, clipping, AdamW. The first losses of all must agree.
`python -m bench.joint_training` has other shapes, CPU time, and memory.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fast
from bench.harness import Case

VOCABULARY = 2048
RANKS, ALPHAS, SEEDS, RATE = (8, 16, 16, 32), (16, 16, 32, 32), (1, 2, 3, 4), 1e-4
SHAPES = {"equal": ((2, 256),) * 4, "ragged": ((1, 512), (2, 256), (4, 128), (8, 64))}  # samples, tokens: 512 a job


@dataclass(frozen=True)
class Size:
    """Of the model. On a GPU wide enough that it is not the host alone that is measured."""

    hidden: int
    layers: int
    dtype: torch.dtype


SIZES = {"cpu": Size(512, 4, torch.float32), "cuda": Size(2048, 8, torch.bfloat16)}


def llama(kind: str, device: torch.device) -> LlamaForCausalLM:
    size = SIZES[device.type]
    hidden = size.hidden
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=size.layers, vocab_size=VOCABULARY,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(size.dtype)
    for name, linear in list(model.model.named_modules()) if kind == "nf4" else ():
        if isinstance(linear, nn.Linear):
            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, compute_dtype=size.dtype,
                                      quant_type="nf4")  # fmt: skip
            layer.load_state_dict(linear.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, layer.to(device))
    return model.to(device)


def options(number: int, p: float) -> dict[str, Any]:
    return {"r": RANKS[number], "lora_alpha": ALPHAS[number], "lora_dropout": p, "target_modules": "all-linear",
            "task_type": "CAUSAL_LM"}  # fmt: skip


def name_of(number: int) -> str:
    return f"job{number}"


def samples(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """On the host, where jobs have them."""
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
        device = next(base.parameters()).device
        self.ids = [samples(shape, i).to(device) for i, shape in enumerate(shapes)]
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


@functools.lru_cache(maxsize=1)
def providers(kind: str, shape_name: str, p: float, device: torch.device) -> dict[str, Any]:
    """By name; made when the first of them runs, and gone with the next case."""
    shapes, base = SHAPES[shape_name], llama(kind, device)
    clean = copy.deepcopy(base)  # JobTrainer puts its layers into the model that it is given
    return {
        "peft, one base": Sequential(base, shapes, p, shared=True),
        "peft, four bases": Sequential(base, shapes, p, shared=False),
        "ours, joint": Joint(base, shapes, p, None),
        "ours, in turn": Joint(copy.deepcopy(clean), shapes, p, 512),
    }


NAMES = ("peft, one base", "peft, four bases", "ours, joint", "ours, in turn")


def case_of(kind: str, shape_name: str, p: float, device: torch.device) -> Case:
    size, of_job = SIZES[device.type], " ".join(f"{n}x{t}" for n, t in SHAPES[shape_name])

    def step(name: str) -> list[float]:
        return providers(kind, shape_name, p, device)[name].step()

    def gate() -> None:
        theirs, *others = map(step, NAMES)
        bound = 1e-4 if size.dtype == torch.float32 else 2e-2
        for losses in others if p == 0.0 else ():  # with dropout the masks differ by design
            assert all(abs(a - b) < bound * b for a, b in zip(losses, theirs)), (losses, theirs)

    shape = f"{shape_name}: llama hidden={size.hidden} layers={size.layers} {of_job} {kind} p={p}"
    runs = {name: functools.partial(step, name) for name in NAMES}
    return Case("joint_step", shape, size.dtype, "step", runs, gate)


def cases(device: torch.device) -> Iterator[Case]:
    yield case_of("dense", "equal", 0.0, device)
    yield case_of("nf4", "equal", 0.05, device)
