"""Jobs of different kinds for the tests of peft_fast.jobs: ranks, scales, rates, dropouts and lengths all differ."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_fast import Job, JobTrainer, LoraConfig

VOCABULARY = 96
OPTIONS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": "all-linear", "lr": 1e-3, "lengths": (4, 9)},
    "b": {"r": 8, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "lr": 3e-3,
          "lengths": (12, 17)},
    "c": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "target_modules": "all-linear", "lr": 5e-4, "lengths": (6, 7)},
    "d": {"r": 3, "lora_alpha": 3, "lora_dropout": 0.05, "use_rslora": True, "target_modules": ["down_proj", "o_proj"],
          "lr": 2e-3, "lengths": (1, 24)},
}  # fmt: skip


def rows(name: str, count: int = 13, own_vocabulary: int = VOCABULARY) -> list[dict[str, list[int]]]:
    """Samples of different lengths whose first tokens have no label."""
    generator = torch.Generator().manual_seed(ord(name[0]))
    least, most = OPTIONS[name]["lengths"] if name in OPTIONS else (5, 9)
    found = []
    for i in range(count):
        length = int(torch.randint(least + 2, most + 3, (1,), generator=generator))
        ids = torch.randint(1, own_vocabulary, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100 if j < i % 3 else one for j, one in enumerate(ids)]})
    return found


def job(name: str, folder: Path | None = None, **options: Any) -> Job:
    own = {key: value for key, value in OPTIONS[name].items() if key not in ("lr", "lengths")}
    config = LoraConfig(task_type="CAUSAL_LM", **own)
    defaults = {"data": rows(name), "batch_size": 2 + ord(name) % 3, "learning_rate": OPTIONS[name]["lr"]}
    return Job(
        name, config, output_dir=folder and folder / name, seed=ord(name), **{**defaults, "max_steps": 5, **options}
    )  # fmt: skip


def trained(base: Any, *jobs: Job, **options: Any) -> JobTrainer:
    """After all their steps; the adapters stay in the model."""
    trainer = JobTrainer(base, progress=False, keep_adapters=True, **options)
    for one in jobs:
        trainer.add(one)
    trainer.train()
    return trainer


def weights(trainer: JobTrainer, name: str) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in trainer._parameters(name).items()}


class Stream:
    """Samples without a length, the same ones each time."""

    def __init__(self, samples: list[dict]) -> None:
        self.samples = samples

    def __iter__(self):
        yield from self.samples


def bad_rows(kind: str):
    """Four good samples and then something."""
    yield from rows("b", 4)
    if kind == "raises":
        raise OSError("the disk is gone")
    yield {
        "id": {"input_ids": [1, 2, 96]},
        "labels": {"input_ids": [1, 2, 3], "labels": [1, 2, 1000]},
        "no labels": {"input_ids": [1, 2], "labels": [5, -100]},
        "column": {"input_ids": [1, 2], "text": "x"},
        "no sample": [1, 2],
        "floats": {"input_ids": [1.5, 2.0]},
        "lengths": {"input_ids": [1, 2], "labels": [1, 2, 3]},
    }[kind]
