"""JobTrainer: jobs come and go, and in each step those that are there share one forward and one backward."""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from peft_fast.checkpoint import get_peft_model_state_dict
from peft_fast.mapping import get_peft_model
from peft_fast.mixed_batches import MixedBatchTraining
from peft_fast.model import PeftModel
from peft_fast.saving import write_adapter
from peft_fast.transaction import unchanged_on_error

from . import checkpoint, report, shared
from .data import IGNORED, Batches, batch_of, sample_of
from .groups import CPU_TOKENS, Batch, groups_of
from .job import Job, JobResult
from .running import Running


class JobTrainer:
    """Trains LoRA adapters of independent jobs on one causal language model, which stays as it is.

    model: of transformers, dense or k-bit, or a PeftModel of one, whose own adapters are left alone. Gradient
    checkpointing must be switched on before.
    autocast: torch.bfloat16 for forwards under autocast. None: as the model is, or as a torch.autocast around the calls
    says.
    max_tokens: of a forward, padding included; None for no limit; "auto": none, but on a CPU 512, whose cores are busy
    with that many and whose caches hold no more (CPU_TOKENS). Jobs that have no room in it, or whose samples are so
    much shorter that more than a fifth of it would be padding, go through the model after the others, in the same step,
    when what those kept for their backward is free. A job's own batch is never divided. It changes time and memory, and
    no result.
    progress: show a bar for each job. keep_adapters: leave the adapters of jobs that ended in the model; else only
    those stay that have no output_dir.

    A job that fails (its data raise, its loss or its gradients are not finite, its optimiser raises, ...) ends with
    that as its reason, and with the weights of its last good step; the others go on, as they would have without it.
    Where the model itself raises, the jobs whose batch it does not take alone are those that fail. An error that none
    of them gives alone, such as memory for their sum, is raised, and so is one in the backward of several: those that
    shared the forward have made no step, and begin it anew with their next batches. KeyboardInterrupt does the same;
    train() goes on after it.

    A base model's own dropout is drawn from torch's generator for all jobs together: its masks depend on the others.
    Not to be called from several threads. Raises ValueError for models of other kinds and dtypes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        max_tokens: int | Literal["auto"] | None = "auto",
        progress: bool = True,
        keep_adapters: bool = False,
    ) -> None:
        if autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast must be torch.bfloat16 or None, got {autocast}: float16 needs a loss scaler")
        if max_tokens not in (None, "auto") and (type(max_tokens) is not int or max_tokens < 1):
            raise ValueError(f"max_tokens must be a positive integer, None or 'auto', got {max_tokens!r}")
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        shared.check_model(base)
        if isinstance(model, PeftModel) and model._mixed_training is not None:
            raise ValueError("the model trains mixed batches already: call disable_mixed_batch_training first")
        self.model: Any = model
        self.autocast, self.keep_adapters = autocast, keep_adapters
        self.max_tokens = max_tokens if max_tokens != "auto" else CPU_TOKENS if base.device.type == "cpu" else None
        self.results: dict[str, JobResult] = {}
        self.shared_steps = 0
        self._running: dict[str, Running] = {}
        self._bars = report.Bars(progress)
        text = base.config.get_text_config()
        self._vocabulary: int = text.vocab_size
        padding = text.pad_token_id
        self._padding = padding if isinstance(padding, int) and 0 <= padding < self._vocabulary else 0

    @property
    def jobs(self) -> list[str]:
        """The names of those under way."""
        return list(self._running)

    def add(self, job: Job, resume_from: str | os.PathLike[str] | None = None) -> None:
        """Have a job take part from the next step on; `resume_from`: the file of its checkpoint.

        Raises what is wrong with it, and leaves the model as it was then.
        """
        self._check_new(job)
        state = None if resume_from is None else checkpoint.read(resume_from, job)
        before = self.model
        try:
            with unchanged_on_error(before):
                self._put_in(job)
                running = Running(job, self._parameters(job.name))
                if state is not None:
                    checkpoint.restore(running, state)
        except BaseException:
            self.model = before
            raise
        self._training.join(job.name, job.seed, 0 if state is None else state["dropout_count"])
        self._running[job.name] = running
        self.results.pop(job.name, None)
        self._bars.update(running)

    def _check_new(self, job: Job) -> None:
        if job.name in self._running:
            raise ValueError(f"job {job.name!r} is under way already: choose another name")
        if job.output_dir is not None:
            folder = Path(job.output_dir).resolve()
            taken = [r.name for r in self._running.values() if r.folder == folder]
            if taken:
                raise ValueError(f"job {taken[0]!r} writes to {folder} too: give {job.name!r} another output_dir")
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"output_dir must be a directory, got the file {folder}")

    def _put_in(self, job: Job) -> None:
        """The job's adapter into the model, not active: a forward without names is the base model's."""
        config = copy.deepcopy(job.config)
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(sorted(devices, key=str)):
            torch.manual_seed(job.seed)
            if isinstance(self.model, PeftModel):
                self.model.add_adapter(job.name, config)
            else:
                self.model = get_peft_model(self.model, config, job.name)
        if self.model._mixed_training is None:
            self.model.enable_mixed_batch_training([], {})
        self.model._check_mixed([job.name], dict(self.model.base_model.holders()))
        active = self.model.active_adapters
        if job.name in active:
            self.model.base_model.set_adapter([name for name in active if name != job.name])
        self.model.set_requires_grad([*self._running, job.name], True)
        self.model.train()

    @property
    def _training(self) -> MixedBatchTraining:
        return self.model._mixed_training

    def _parameters(self, name: str) -> dict[str, nn.Parameter]:
        own = {id(p) for _, holder in self.model.base_model.holders() for p in holder.adapter_parameters(name)}
        return {key: p for key, p in self.model.named_parameters() if id(p) in own}

    def step(self) -> dict[str, float]:
        """One forward and backward of the next batch of every job; the losses, in nats per token, by job."""
        losses: dict[str, float] = {}
        for group in groups_of(self._next_batches(), self.max_tokens):
            losses |= self._step_of(group)
        self.shared_steps += 1
        return losses

    def _step_of(self, group: Batch) -> dict[str, float]:
        taken, logits, batch = self._forward(group)
        if logits is None or batch is None:
            return {}
        waiting = [running for running, _ in taken]  # for their step
        try:
            found: Tensor | None = None
            with self._failing_alone(waiting[0]) if len(waiting) == 1 else nullcontext():
                found = shared.backward(logits, batch, [running.factor for running in waiting])
            if found is None:
                return {}
            del logits
            norms = [one.norm().to(found.device) if one.is_due else found.new_zeros(()) for one in waiting]
            losses, sizes = torch.stack([found, torch.stack(norms).to(found.dtype)]).tolist()  # the one wait
            for i, (running, _) in enumerate(taken):
                with self._failing_alone(running):
                    self._advance(running, losses[i], batch.labels[i], norms[i], sizes[i])
                waiting.remove(running)
        finally:  # of a backward that was broken off some gradients are there and some are not
            for running in waiting:
                running.forget_forwards()
        return {running.name: loss for (running, _), loss in zip(taken, losses)}

    def _next_batches(self) -> Batch:
        found: Batch = []
        for running in list(self._running.values()):
            with self._failing_alone(running):
                if running.is_done:  # resumed with fewer steps than it has made
                    self._finish(running, "max_steps reached")
                    continue
                rows = running.batches.next()
                if rows is None:
                    self._end_of_data(running)
                else:
                    found.append((running, batch_of(rows, self._vocabulary)))
        return found

    def _forward(self, taken: Batch) -> tuple[Batch, Tensor | None, shared.SharedBatch | None]:
        """Of those jobs whose batches the model takes."""
        if not taken:
            return [], None, None
        if not self.model.training:
            self.model.train()
        counts = dict(self._training.counts)
        batch = shared.join([(running.name, samples) for running, samples in taken], self._padding)
        try:
            return taken, shared.forward(self.model, batch, self.autocast), batch
        except Exception as error:  # raised again where no job alone is to blame
            culprits = self._culprits(taken, error)
            if not culprits:
                self._training.counts.update(counts)
                raise
        for running, own in culprits:
            self._fail(running, own)
        left = [(running, samples) for running, samples in taken if running.name in self._running]
        self._training.counts.update({running.name: counts[running.name] for running, _ in left})
        return self._forward(left)

    def _culprits(self, taken: Batch, error: Exception) -> list[tuple[Running, Exception]]:
        """The jobs whose batch the model does not take alone either, with its errors."""
        if len(taken) == 1:
            return [(taken[0][0], error)]
        found = []
        for running, samples in taken:
            batch = shared.join([(running.name, samples)], self._padding)
            try:
                with torch.no_grad():
                    shared.forward(self.model, batch, self.autocast)
            except Exception as own:  # noqa: BLE001 - whatever it is, it is this job's, and kept in its result
                found.append((running, own))
        return found

    def _advance(self, running: Running, loss: float, tokens: int, norm: Tensor, size: float) -> None:
        """What a job does after its forward and backward."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss after {running.steps} steps is {loss}")
        due = running.is_due
        if due and not math.isfinite(size):
            raise FloatingPointError(f"the norm of the gradients after {running.steps} steps is {size}")
        running.note_forward(loss, tokens)
        if due:
            running.step(norm)
            self._after_step(running)

    def _after_step(self, running: Running) -> None:
        if running.job.eval_every is not None and running.steps % running.job.eval_every == 0:
            self._evaluate(running)
        self._bars.update(running)
        if running.out_of_patience:
            self._end(running, "stopped early", f"held-out loss no better since step {running.best_step}")
        elif running.is_done:
            self._finish(running, "max_steps reached")

    def _end_of_data(self, running: Running) -> None:
        if running.forwards:
            norm = running.rescale_for_last_step()
            if not math.isfinite(float(norm)):
                raise FloatingPointError(f"the norm of the gradients after {running.steps} steps is {float(norm)}")
            running.step(norm)
        self._finish(running, "all epochs are done" if running.job.epochs else "the data are done")

    def _finish(self, running: Running, reason: str) -> None:
        if running.job.eval_data is not None and running.steps not in [step for step, _ in running.evaluations]:
            self._evaluate(running)
        self._end(running, "finished", reason)

    def evaluate(self, name: str) -> float:
        """A job's loss on its eval_data now, in nats per token: the mean over all their tokens with labels."""
        running = self._known(name)
        if running.eval_rows is None:
            raise ValueError(f"job {name!r} has no eval_data")
        job, sums, tokens = running.job, 0.0, 0
        batches = Batches(running.eval_rows, job.eval_batch_size or job.batch_size, 0, shuffle=False, epochs=1)
        self.model.eval()
        try:
            with torch.no_grad():
                while (rows := batches.next()) is not None:
                    samples = [sample_of(row, self._vocabulary) for row in rows]
                    batch = shared.join([(name, samples)], self._padding)
                    if not batch.labels[0]:
                        continue
                    logits = shared.forward(self.model, batch, self.autocast)
                    sums += float(shared.losses(logits, batch)) * batch.labels[0]
                    tokens += batch.labels[0]
        finally:
            self.model.train()
        if not tokens:
            raise ValueError(f"eval_data of job {name!r} have no label: all are {IGNORED}, or of a first token")
        return sums / tokens

    def _evaluate(self, running: Running) -> None:
        loss = self.evaluate(running.name)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the held-out loss after {running.steps} steps is {loss}")
        running.note_evaluation(loss)

    def remove(self, name: str) -> JobResult:
        """Have a job leave now; its adapter is written as at any end."""
        return self._end(self._known(name), "left", "removed by call")

    def _known(self, name: str) -> Running:
        if name not in self._running:
            raise ValueError(f"job {name!r} is not under way: these are {self.jobs}")
        return self._running[name]

    @contextmanager
    def _failing_alone(self, running: Running) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a job's data and optimiser may raise anything; _fail says it
            self._fail(running, error)

    def _fail(self, running: Running, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"  # of the user's data, optimiser, ...: of any class
        warnings.warn(f"job {running.name!r} failed, the others go on: {reason}", stacklevel=2)
        self._end(running, "failed", reason, error)

    def _end(self, running: Running, state: str, reason: str, error: BaseException | None = None) -> JobResult:
        """Write the adapter, free what the job had, and note how it ended."""
        running.take_best()
        result = running.result(state, reason, running.folder, error)
        try:
            self._write(running, result)
        except (OSError, ValueError, RuntimeError, SafetensorError) as problem:  # kept in the result
            reason = f"{reason}; the adapter was not written, and stays in the model: {problem}"
            result = running.result("failed", reason, None, error or problem)
        running.optimizer.zero_grad(set_to_none=True)
        del self._running[running.name]
        self._training.leave(running.name)
        if result.folder is not None and not self.keep_adapters:
            self.model.delete_adapter(running.name)
        else:
            self.model.set_requires_grad(running.name, False)
        self.results[running.name] = result
        self._bars.end(result)
        return result

    def _write(self, running: Running, result: JobResult) -> None:
        """Into its folder, if it has one. Raises ValueError for weights that are not finite."""
        if running.folder is None:
            return
        broken = [name for name, p in running.parameters.items() if not bool(p.isfinite().all())]
        if broken:
            raise ValueError(f"{len(broken)} of its weights are not finite, such as {broken[0]}")
        tensors = get_peft_model_state_dict(self.model, adapter_name=running.name)
        config = self.model.peft_config[running.name]
        write_adapter(running.folder, self.model.get_base_model(), config, tensors, safe=True)
        report.write_result(running.folder, result)

    def save_checkpoints(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write the state of every job under way to `folder`/<its name>.pt, for `add(job, resume_from=...)`."""
        paths = {name: checkpoint.path_of(folder, name) for name in self._running}
        for name, running in self._running.items():
            checkpoint.write(paths[name], running, self._training.counts[name])
        return paths

    def train(
        self,
        *,
        on_step: Callable[["JobTrainer"], object] | None = None,
        checkpoints: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
        plot: str | os.PathLike[str] | None = None,
    ) -> dict[str, JobResult]:
        """Step until no job is left; how each ended, by name, of all so far.

        on_step: called after each shared step; it may add and remove jobs. checkpoints: a folder for save_checkpoints,
        every `checkpoint_every` shared steps. plot: where a picture of the losses is drawn, if there is matplotlib.
        """
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be a positive number of steps, got {checkpoint_every}")
        try:
            while self._running:
                self.step()
                if on_step is not None:
                    on_step(self)
                if checkpoints is not None and self.shared_steps % checkpoint_every == 0:
                    self.save_checkpoints(checkpoints)
        finally:
            self._bars.close()
        if self._bars.shown and self.results:
            print(self.summary())
        if plot is not None and not report.picture(Path(plot), list(self.results.values())) and self._bars.shown:
            print(f"no picture in {plot}: there is no matplotlib, or no job made a step")
        return dict(self.results)

    def summary(self) -> str:
        """A table of the jobs that have ended."""
        return report.table(self.results.values())

    def unload(self) -> nn.Module:
        """The base model without our layers. Raises ValueError while jobs are under way."""
        if self._running:
            raise ValueError(f"jobs are under way: {self.jobs}. Let them end, or remove them")
        if isinstance(self.model, PeftModel):
            self.model = self.model.unload()
        return self.model
