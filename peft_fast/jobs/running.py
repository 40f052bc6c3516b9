"""A job under way: its parameters, optimiser, place in its data, and what it has measured."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import Batches, is_indexed
from .job import Job, JobResult


class Running:
    """State of one job; `parameters` of its adapter by name, in the model's order."""

    def __init__(self, job: Job, parameters: dict[str, nn.Parameter]) -> None:
        self.job, self.parameters = job, parameters
        self.folder = None if job.output_dir is None else Path(job.output_dir).resolve()
        epochs = 1 if job.epochs is None and job.max_steps is None else job.epochs
        self.batches = Batches(job.data, job.batch_size, job.seed, job.shuffle, epochs)
        self.total_steps = self._total_steps(epochs)
        self.optimizer = job.make_optimizer(list(parameters.values()))
        self.scheduler = job.make_scheduler(self.optimizer, self.total_steps)
        once = job.eval_data is not None and not is_indexed(job.eval_data)
        self.eval_rows: Any = list(job.eval_data) if once and job.eval_data is not None else job.eval_data
        self.steps = self.forwards = self.tokens = 0  # forwards: since the last step
        self.seconds, self._since = 0.0, time.perf_counter()
        self.learning_rate = self.next_learning_rate
        self.losses: list[tuple[int, float]] = []
        self.evaluations: list[tuple[int, float]] = []
        self._losses_of_step: list[float] = []
        self.best: dict[str, Tensor] = {}  # the parameters at the best evaluation
        self.best_loss, self.best_step = math.inf, 0
        self.worse = 0  # evaluations since the best

    def _total_steps(self, epochs: int | None) -> int | None:
        bounds = [] if self.job.max_steps is None else [self.job.max_steps]
        batches = self.batches.of_an_epoch
        if epochs is not None and batches is not None:
            bounds.append(-(-batches * epochs // self.job.accumulation))
        return min(bounds) if bounds else None

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def next_learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def is_done(self) -> bool:
        return self.job.max_steps is not None and self.steps >= self.job.max_steps

    @property
    def out_of_patience(self) -> bool:
        return self.job.patience is not None and self.worse >= self.job.patience

    @property
    def factor(self) -> float:
        """What a forward's loss counts in its step's."""
        return 1.0 / self.job.accumulation

    def note_forward(self, loss: float, tokens: int) -> None:
        self.forwards += 1
        self.tokens += tokens
        self._losses_of_step.append(loss)

    @property
    def is_due(self) -> bool:
        """Whether the next forward is the last one before a step."""
        return self.forwards + 1 >= self.job.accumulation

    def norm(self) -> Tensor:
        """Of all gradients together."""
        return torch.nn.utils.get_total_norm(self.gradients())

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def step(self, norm: Tensor) -> None:
        """The optimiser's step; `norm`: of the gradients."""
        if self.job.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.job.max_grad_norm, norm)
        self.learning_rate = self.next_learning_rate
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1
        self.losses.append((self.steps, sum(self._losses_of_step) / len(self._losses_of_step)))
        self.forget_forwards()

    def forget_forwards(self) -> None:
        """Those since the last step, and their gradients: of parameters too that the optimiser was not given."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.forwards, self._losses_of_step = 0, []

    def rescale_for_last_step(self) -> Tensor:
        """Where the data end before a step has all its forwards: weigh them as a whole step's. The gradients' norm."""
        for gradient in self.gradients():
            gradient.mul_(self.job.accumulation / self.forwards)
        return torch.nn.utils.get_total_norm(self.gradients())

    def note_evaluation(self, loss: float) -> None:
        self.evaluations.append((self.steps, loss))
        if loss < self.best_loss - self.job.min_delta:
            self.worse, self.best_loss, self.best_step = 0, loss, self.steps
            if self.job.keep_best:
                self.best = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        else:
            self.worse += 1

    @torch.no_grad()
    def take_best(self) -> None:
        for name, values in self.best.items():
            self.parameters[name].copy_(values)

    def total_seconds(self) -> float:
        return self.seconds + time.perf_counter() - self._since

    def result(self, state: str, reason: str, folder: Path | None, error: BaseException | None) -> JobResult:
        return JobResult(
            self.name, state, reason, self.steps, self.tokens, self.total_seconds(), self.learning_rate,
            tuple(self.losses), tuple(self.evaluations), self.best_step if self.best else self.steps, folder, error,
        )  # fmt: skip
