"""What test_launchers.py starts twice, by torchrun or `accelerate launch`: training through accelerate and Trainer.

arguments: a folder, and the cases

On CPUs accelerate takes several processes for DDP and refuses to see FSDP, which it has for GPUs alone: in 1.15.0's
state.py ACCELERATE_USE_FSDP and the plugin are read for MULTI_GPU and other cards' types only, and processes that are
told of the CPU (--cpu, ACCELERATE_USE_CPU) are MULTI_CPU, those that are not and have no card NO, with one process. So
no option or variable of the launcher's does it. `fsdp_on_cpu` makes its state say FSDP; all that it does then
(sharding, state dicts, checkpoints) is its own code.
"""

import os
import sys
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from processes import tell
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments, set_seed

import peft_fast

folder = Path(sys.argv[1])
LAYER = "LlamaDecoderLayer"
HALF = torch.bfloat16


def fsdp_on_cpu(plugin: Any) -> None:
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "fsdp_plugin": None})
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs.get("fsdp_plugin") or plugin

    AcceleratorState.__init__ = init


def plugin(**options: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[LAYER],
        **{"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False, **options},
    )


def loop(name: str, make: Any, shards: bool) -> dict[str, Any]:
    """A training loop as people write it with accelerate, gradient accumulation included."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    data = models.rows(16)
    alone, model = make(), make()
    expected = models.train(alone, data, accumulate=2, momentum=0.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    loader = torch.utils.data.DataLoader(data, batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    inner = accelerator.unwrap_model(model)
    assert isinstance(inner, FSDPModule) == shards
    losses, total = [], torch.zeros(())
    for number, row in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(input_ids=row, labels=row).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        total = total + loss.detach() / 2
        if number % 2:
            losses.append(float(accelerator.reduce(total, "mean")))
            total = torch.zeros(())
    assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-5, (losses, expected)
    whole = accelerator.get_state_dict(model)
    inner.save_pretrained(folder / name, is_main_process=accelerator.is_main_process, state_dict=whole)
    accelerator.wait_for_everyone()
    read = peft_fast.load_peft_weights(folder / name)
    models.assert_equal(read, models.adapter(alone), 5e-5)
    routes = sorted({row.route for row in peft_fast.explain(inner, show=False).rows})
    AcceleratorState._reset_state()
    return {"losses": losses, "routes": routes}


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.rows = models.rows(count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer(name: str, model: Any, **options: Any) -> Trainer:
    """Two rows a process and step, of 14: accelerate fills up the last batch, of one row each, with rows from the
    front; alone it stays as it is."""
    alone = name.startswith("alone")
    settings = {
        "output_dir": str(folder / name), "per_device_train_batch_size": 4 if alone else 2, "num_train_epochs": 1,
        "logging_steps": 1, "learning_rate": 5e-3, "lr_scheduler_type": "constant", "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2, "seed": 11,
        "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2, "remove_unused_columns": False,
    }  # fmt: skip
    arguments = TrainingArguments(**{**settings, **options})
    return Trainer(model=model, args=arguments, train_dataset=Rows(14), eval_dataset=Rows(6))


def log(made: Trainer) -> dict[str, list[float]]:
    history = made.state.log_history
    return {key: [row[key] for row in history if key in row] for key in ("loss", "eval_loss")}


def with_trainer(name: str, make: Any, **options: Any) -> dict[str, Any]:
    """transformers' Trainer: trains, evaluates, writes checkpoints, resumes from one, saves."""
    set_seed(3)
    whole = trainer(name, make(), **options)
    whole.train()
    whole.save_model(str(folder / name / "saved"))
    first = log(whole)
    AcceleratorState._reset_state()
    again = trainer(name, make(), **options)
    again.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
    second = log(again)
    AcceleratorState._reset_state()
    if dist.is_initialized():
        dist.barrier()
    return {
        "first": first,
        "second": second,
        "checkpoint": sorted(path.name for path in (folder / name / "checkpoint-2").iterdir()),
        "saved": sorted(path.name for path in (folder / name / "saved").iterdir()),
    }


def refused(name: str, make: Any) -> str:
    """cpu_ram_efficient_loading sends parameters to the other processes, and a k-bit layer of ours has scales too."""
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model, _ = Accelerator(cpu=True).prepare(model, optimizer)
    try:
        model(input_ids=models.rows(2))
    except ValueError as error:
        return str(error)
    return "no error"


def dense() -> Any:
    return models.adapted(models.base())


def quantised() -> Any:
    return models.adapted(models.own())


def of_bitsandbytes() -> Any:
    return models.adapted(models.bitsandbytes(HALF))


CASES: dict[str, Any] = {
    "ddp-loop": lambda name: loop(name, dense, False),
    "fsdp-loop": lambda name: loop(name, dense, True),
    "fsdp-nf4": lambda name: loop(name, quantised, True),
    "fsdp-bitsandbytes": lambda name: loop(name, of_bitsandbytes, True),
    "fsdp-loop-efficient": lambda name: loop(name, dense, True),
    "nf4-efficient": lambda name: refused(name, quantised),
    "fsdp-dora": lambda name: loop(name, lambda: models.adapted(models.base(), use_dora=True), True),
    "alone": lambda name: with_trainer(name, dense),
    "alone-nf4": lambda name: with_trainer(name, quantised),
    "ddp-trainer": lambda name: with_trainer(name, dense),
    "fsdp-trainer": lambda name: with_trainer(name, dense),
    "fsdp-trainer-nf4": lambda name: with_trainer(name, quantised),
}

if __name__ == "__main__":
    found = {}
    for case in sys.argv[2:]:
        if case.startswith("fsdp") or case.endswith("efficient"):
            options = {"cpu_ram_efficient_loading": True} if case.endswith("efficient") else {}
            fsdp_on_cpu(plugin(**options))
        found[case] = CASES[case](case)
    tell(folder, int(os.environ.get("RANK", "0")), found)
    if dist.is_initialized():
        dist.barrier()
