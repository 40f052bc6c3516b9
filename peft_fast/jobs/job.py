"""What a job is, and what came of it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from peft_fast.tuners.lora.config import LoraConfig
from peft_fast.tuners.lora.initialisation import changes_base
from peft_fast.tuners.mixed_batch import BASE

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


@dataclass
class Job:
    """One adapter's training.

    name, config: of the adapter. `config` is copied: several jobs may be given the same one.
    data: dicts with input_ids [tokens], labels [tokens] (-100: not learned; default: input_ids) and, if anything is to
      be left out, attention_mask [tokens], as lists or tensors. A data set with a length is shuffled anew each epoch,
      unless `shuffle` is False; any other iterable is taken in its order.
    output_dir: where the adapter is written to, as any adapter, with result.json. None: it stays in the model only.
    batch_size, accumulation: samples a forward, and forwards a step, whose losses count alike.
    learning_rate: of torch's AdamW without weight decay, or `optimizer`: makes another from the list of parameters.
    scheduler: makes a learning rate schedule of torch's from the optimiser, or is the name of one of transformers'
      ("linear", "cosine", ...), with `warmup_steps`. It is stepped once a step.
    max_steps, epochs: whichever ends first; data are begun anew until then. Default: one epoch.
    max_grad_norm: gradients of the adapter are scaled to this norm where theirs is larger; None: never.
    seed: of the weights' start, the order of the data, and dropout.
    eval_data: like `data`, in batches of `eval_batch_size` (default batch_size), every `eval_every` steps and at the
      end; the loss is the mean over all their tokens with labels.
    patience: stop after so many evaluations that were not better than the best by more than `min_delta` nats a token.
    keep_best: end with the weights of the best evaluation instead of the last ones.

    Raises ValueError or TypeError for values that make no sense.
    """

    name: str
    config: LoraConfig
    data: Iterable[Any]
    output_dir: str | Path | None = None
    batch_size: int = 8
    learning_rate: float = 2e-4
    max_steps: int | None = None
    epochs: int | None = None
    accumulation: int = 1
    optimizer: OptimizerFactory | None = None
    scheduler: Callable[[Optimizer], Any] | str | None = None
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    shuffle: bool = True
    seed: int = 0
    eval_data: Iterable[Any] | None = None
    eval_batch_size: int | None = None
    eval_every: int | None = None
    patience: int | None = None
    min_delta: float = 0.0
    keep_best: bool = True

    def __post_init__(self) -> None:
        if self.name == BASE:
            raise ValueError(f"a job cannot be called {BASE!r}: that means no adapter. Choose another name")
        if not isinstance(self.config, LoraConfig):
            kind = type(self.config).__name__
            raise TypeError(f"only LoRA adapters can be trained in shared batches: give a LoraConfig, got a {kind}")
        if self.config.alora_invocation_tokens:
            raise ValueError("a job's adapter is there for all tokens: leave alora_invocation_tokens out")
        self._check_base_untouched()
        self._check_numbers()
        data = self.data
        if isinstance(data, str | dict) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise TypeError(f"data must be an iterable of dicts with input_ids, got {type(data).__name__}")
        if self.warmup_steps and not isinstance(self.scheduler, str):
            raise ValueError("warmup_steps belongs to a scheduler by name, such as 'linear': give one, or leave it out")

    def _check_base_untouched(self) -> None:
        """The base model is the other jobs' too."""
        init, config = self.config.init_lora_weights, self.config
        if changes_base(init):
            raise ValueError(
                f"job {self.name!r}: init_lora_weights={init!r} changes the base weights, which all jobs share: take "
                "True, 'gaussian' or 'orthogonal', or train this adapter alone"
            )
        if config.bias != "none":
            raise ValueError(
                f"job {self.name!r}: bias={config.bias!r} trains biases of the base model, which all jobs share: take "
                "'none' (lora_bias gives the adapter biases of its own)"
            )
        if config.layer_replication:
            raise ValueError(
                f"job {self.name!r}: layer_replication changes the base model, which all jobs share: leave it out"
            )

    def _check_numbers(self) -> None:
        counts = ("batch_size", "max_steps", "epochs", "accumulation", "eval_batch_size", "eval_every", "patience")
        for option in counts:
            value = getattr(self, option)
            optional = option not in ("batch_size", "accumulation")
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{option} must be a positive integer, got {value!r}")
        for option in ("seed", "warmup_steps"):
            value = getattr(self, option)
            if type(value) is not int or value < 0:
                raise ValueError(f"{option} must be an integer from 0 on, got {value!r}")
        for option in ("learning_rate", "max_grad_norm"):
            value = getattr(self, option)
            if not (option == "max_grad_norm" and value is None) and not (_is_number(value) and value > 0):
                raise ValueError(f"{option} must be a positive number, got {value!r}")
        if not (_is_number(self.min_delta) and self.min_delta >= 0):
            raise ValueError(f"min_delta must be a number from 0 on, got {self.min_delta!r}")
        if (self.eval_data is None) != (self.eval_every is None):
            raise ValueError("eval_data and eval_every belong together: give both, or neither")
        if self.patience is not None and self.eval_data is None:
            raise ValueError("patience counts evaluations: give eval_data and eval_every too")

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        if self.optimizer is None:
            return AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        made = self.optimizer(parameters)
        if not isinstance(made, Optimizer):
            raise TypeError(f"job {self.name!r}: optimizer must make one of torch's, got {type(made).__name__}")
        return made

    def make_scheduler(self, optimizer: Optimizer, total_steps: int | None) -> Any:
        if self.scheduler is None:
            return None
        if isinstance(self.scheduler, str):
            if total_steps is None:
                raise ValueError(
                    f"job {self.name!r}: the schedule {self.scheduler!r} needs to know the number of steps, and the "
                    "data have no length: give max_steps"
                )
            from transformers import get_scheduler  # takes seconds to import

            made = get_scheduler(self.scheduler, optimizer, self.warmup_steps, total_steps)
        else:
            made = self.scheduler(optimizer)
        if not hasattr(made, "step") or not hasattr(made, "state_dict") or hasattr(made, "num_bad_epochs"):
            raise TypeError(
                f"job {self.name!r}: scheduler must make a schedule of torch's that is stepped without a metric, "
                f"got {type(made).__name__}"
            )
        return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Curve = Sequence[tuple[int, float]]  # (step, nats per token)


@dataclass(frozen=True)
class JobResult:
    """How a job ended. `state`: "finished", "stopped early" (patience), "left" (by call) or "failed"."""

    name: str
    state: str
    reason: str  # why it ended, in words
    steps: int
    tokens: int  # that were trained on: with labels
    seconds: float  # since it began, over all its sessions
    learning_rate: float  # of the last step
    losses: Curve  # of each step
    evaluations: Curve
    weights_of: int  # the step whose weights the adapter has: the last, or that of the best evaluation
    folder: Path | None = None  # the adapter's; None where none was written
    error: BaseException | None = field(default=None, repr=False)
