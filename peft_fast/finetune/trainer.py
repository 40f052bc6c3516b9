"""transformers' Trainer with three differences: a checkpoint holds the adapter alone, the held-out loss is a mean over
tokens, and the progress bar shows loss, tokens per second and peak memory. peft need not be installed."""

import math
import resource
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from peft_fast.finetune import data
from peft_fast.finetune.options import OPTIMIZERS, Options, UserError

MIB = 2**20


class AdapterTrainer(Trainer):
    """Trainer for a `peft_fast.PeftModel`.

    Optimiser, scheduler, random states and position in the data are checkpointed and resumed by Trainer itself.
    """

    model: Any
    eval_dataset: Any
    control: TrainerControl

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the adapter and the training arguments; Trainer would write the base model's weights as well."""
        if not self.args.should_save:  # every process gets here
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(str(folder))
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load a checkpoint's adapter into the live model, which keeps its base weights and its parameter objects."""
        try:
            result = self.model.load_adapter(resume_from_checkpoint, self.model.active_adapter, is_trainable=True)
        except ValueError as error:  # damaged, of another rank or scale, or of other layers
            raise UserError(f"cannot resume from {resume_from_checkpoint}: {error}") from error
        if result.missing_keys:
            raise UserError(
                f"the adapter in {resume_from_checkpoint} lacks {len(result.missing_keys)} of this model's weights, "
                f"{result.missing_keys[0]} for one: resume with the --target-modules it was trained with"
            )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss in nats per predicted token, over all tokens alike, and its exponential, the perplexity.

        Trainer's own is a mean of batch means, which weighs the tokens of a short batch more.
        """
        self.model.eval()
        loss = mean_loss(self, self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def mean_loss(trainer: Any, rows: Sequence[data.Row]) -> float:
    """Nats per predicted token of `rows` for any Trainer's model, left in the train or eval mode that it is in.

    Batches are dealt out to the processes whole, so that the result does not depend on how many there are.
    """
    size, device = trainer.args.per_device_eval_batch_size, trainer.args.device
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    mine = batches[trainer.args.process_index :: trainer.args.world_size]
    total = torch.zeros(2, dtype=torch.float64, device=device)  # sum of the losses, number of tokens
    hidden = not trainer.is_world_process_zero()
    for batch in tqdm(mine, desc="held-out loss", unit="batch", leave=False, disable=hidden, dynamic_ncols=True):
        inputs = {key: values.to(device) for key, values in trainer.data_collator(batch).items()}
        with torch.no_grad(), trainer.accelerator.autocast():
            loss = trainer.model(**inputs).loss.double()
        tokens = (inputs["labels"][:, 1:] != data.IGNORED).sum()
        total += torch.stack([loss * tokens, tokens])
    loss_sum, tokens = trainer.accelerator.reduce(total).tolist()
    return loss_sum / tokens


class Progress(TrainerCallback):
    """One bar: loss in nats per token, tokens per second so far, peak memory. Remembers the last two for the report."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.tokens_per_second = math.nan
        self.peak_mib = math.nan

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.tokens_at_start = time.perf_counter(), state.num_input_tokens_seen
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="adapter", unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs or "loss" not in logs:
            return
        seconds = time.perf_counter() - self.started
        self.tokens_per_second = (state.num_input_tokens_seen - self.tokens_at_start) / seconds
        self.peak_mib = peak_memory(args.device) / MIB
        speed, peak = f"{self.tokens_per_second:,.0f} tokens/s", f"{self.peak_mib:,.0f} MiB peak"
        self.bar.set_postfix_str(f"loss {logs['loss']:.3f} nats/token, {speed}, {peak}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU since training began, or that this process ever took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def training_arguments(options: Options) -> TrainingArguments:
    """What `options` mean to Trainer."""
    with warnings.catch_warnings():
        # The name that every transformers 5 takes; its newest also call it activation_checkpointing and say so.
        warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
        arguments = _training_arguments(options)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process would spread over all GPUs with nn.DataParallel
    return arguments


def _training_arguments(options: Options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs or 1.0,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup,
        optim=OPTIMIZERS[options.optimizer],
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        gradient_checkpointing=options.gradient_checkpointing or None,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        logging_steps=1,
        eval_strategy="steps" if options.eval_every else "no",
        eval_steps=options.eval_every or None,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        save_total_limit=2,
        # Packed rows have no attention mask to count, and next to no padding.
        include_num_input_tokens_seen="all" if options.packing else "non_padding",
        remove_unused_columns=False,  # position_ids reach the model through **kwargs
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,  # Progress replaces Trainer's bar
        report_to="none",
    )


def make_trainer(
    model: Any, corpus: data.Corpus, options: Options, pad_token_id: int
) -> tuple[AdapterTrainer, Progress]:
    progress = Progress()
    flash = "flash" in (model.config._attn_implementation or "")
    trainer = AdapterTrainer(
        model=model,
        args=training_arguments(options),
        train_dataset=cast(Any, corpus.train),  # to torch any sized sequence is a dataset
        eval_dataset=cast(Any, corpus.heldout),
        data_collator=data.collator(pad_token_id, flatten=options.packing and flash),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)  # disable_tqdm put it in the bar's place
    return trainer, progress
