"""The state of a job that is not done, in one file that is written as a whole: for going on in another process.

In it: the adapter's weights, gradients of forwards without a step yet, the optimiser and the schedule, the place in the
data, the count that dropout goes by, and what was measured. Not in it: data, and torch's generator, of which only
dropout of the base model's own would draw.
"""

import os
from pathlib import Path
from typing import Any

import torch

from peft_fast.adapter_file import read_tensors
from peft_fast.files import write_together

from .job import Job
from .running import Running

VERSION = 2
# What a job must have in common with the one that wrote the file, for its data, its dropout and its rate to go on as
# they were.
SETTINGS = ("seed", "batch_size", "shuffle", "accumulation", "learning_rate")
NUMBERS = (
    "steps", "forwards", "tokens", "learning_rate", "losses", "evaluations", "_losses_of_step", "best", "best_loss",
    "best_step", "worse",
)  # fmt: skip


def path_of(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) / f"{name}.pt"


def write(path: Path, running: Running, dropout_count: int) -> None:
    job = running.job
    state = {
        "version": VERSION,
        "config": _config(job),
        "settings": {name: getattr(job, name) for name in SETTINGS},
        "numbers": {name: getattr(running, name) for name in NUMBERS},
        "seconds": running.total_seconds(),
        "place": (running.batches.epoch, running.batches.position),
        "dropout_count": dropout_count,
        "parameters": {name: p.detach() for name, p in running.parameters.items()},
        "gradients": {name: p.grad for name, p in running.parameters.items() if p.grad is not None},
        "optimizer": running.optimizer.state_dict(),
        "optimizer_class": type(running.optimizer).__name__,
        "scheduler": None if running.scheduler is None else running.scheduler.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_together({path: lambda place: torch.save(state, place)})


def read(path: str | os.PathLike[str], job: Job) -> dict[str, Any]:
    """The state in a file. Raises ValueError for one that is damaged, or another job's. No code in it is run."""
    if not os.path.isfile(path):
        raise ValueError(f"resume_from must be the file that a checkpoint of job {job.name!r} is in, got {str(path)!r}")
    state: dict[str, Any] = read_tensors(Path(path))
    if state.get("version") != VERSION:
        raise ValueError(f"{path} is no checkpoint of a job, or one of another version: {sorted(state)[:5]}")
    for name in SETTINGS:
        then, now = state["settings"].get(name), getattr(job, name)
        if then != now:
            raise ValueError(f"{path} is of a job with {name}={then!r}, got {now!r}: resume it with the same")
    if state["config"] != _config(job):
        raise ValueError(f"{path} is of a job with another config: {_difference(state['config'], _config(job))}")
    return state


def restore(running: Running, state: dict[str, Any]) -> None:
    """Raises ValueError where the state does not fit the job's adapter, optimiser or schedule."""
    saved, own = state["parameters"], running.parameters
    if {n: p.shape for n, p in saved.items()} != {n: p.shape for n, p in own.items()}:
        raise ValueError("the checkpoint's weights are of another adapter, or of another base model")
    if (state["scheduler"] is None) != (running.scheduler is None):
        raise ValueError("the checkpoint is of a job with a schedule and this one has none, or the reverse")
    then, now = state.get("optimizer_class"), type(running.optimizer).__name__
    if then != now:
        raise ValueError(f"the checkpoint is of a job with the optimizer {then}, got {now}: resume it with the same")
    running.optimizer.load_state_dict(state["optimizer"])
    if running.scheduler is not None:
        running.scheduler.load_state_dict(state["scheduler"])
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(parameter.device)
    for name in NUMBERS:
        setattr(running, name, state["numbers"][name])
    running.seconds = state["seconds"]
    running.batches.go_to(*state["place"])


def _config(job: Job) -> str:
    """Without the path of the base model, which may have moved."""
    return job.config.to_json(base_model_name_or_path=None)


def _difference(then: str, now: str) -> str:
    lines = [line.strip() for line in then.splitlines() if line not in now.splitlines()]
    return ", ".join(lines[:3]) or "options are missing"
