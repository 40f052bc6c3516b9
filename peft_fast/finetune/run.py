"""The main job from beginning to end; `main` is what the command calls."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import logging as transformers_logging
from transformers import set_seed

import peft_fast
from peft_fast.finetune import base_model, data, embedded, memory, report, verify
from peft_fast.finetune.base_model import process
from peft_fast.finetune.options import Options, UserError, parse
from peft_fast.finetune.trainer import AdapterTrainer, make_trainer
from peft_fast.finetune.verify import CheckFailed

# How far, relatively, a held-out loss may be from the one it should equal: a GPU may sum in another order.
SAME = 1e-4


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with peft_fast.use_backend(options.backend):
            run(options)
    except (UserError, CheckFailed) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: Options) -> None:
    """Prepare, show what will be trained, train, show that it worked, and write it down.

    Under torchrun every process runs this; only the main one prints and writes.
    """
    clock = Clock()
    say = process().print
    if options.model is None:
        options = _with_embedded(options)
        say(f"default model: {options.model}\ndata: source code of Python's standard library")
        clock.lap("default_model")
    tokenizer = base_model.load_tokenizer(str(options.model))
    corpus = data.load(options, tokenizer)
    say("\n".join(corpus.notes))
    model, estimate = _load(options, corpus)
    trainer, progress = make_trainer(model, corpus, options, tokenizer.pad_token_id)
    prompt = tokenizer(options.prompt)["input_ids"] if options.prompt else corpus.opening

    def sample() -> str:
        if not options.sample_tokens or not process().is_main_process:
            return ""
        return report.sample(model, tokenizer, prompt, options.sample_tokens, options.seed)

    with memory.advice_when_exhausted(options, estimate):
        if options.packing:
            base_model.refuse_leaky_packing(model, trainer.data_collator)
        clock.lap("loading")
        results = _train(trainer, options, sample, clock)
    if process().is_main_process:
        results |= {
            "prompt": tokenizer.decode(prompt),
            "tokens_per_second": progress.tokens_per_second,
            "peak_memory_mib": progress.peak_mib,
            "memory_estimate_bytes": vars(estimate),
            "seconds": clock.laps,
        }
        _finish(trainer, options, results, clock)
    process().wait_for_everyone()


class Clock:
    """Seconds per stage of the run, by name, in order."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = now


def _with_embedded(options: Options) -> Options:
    with process().local_main_process_first():
        made = embedded.prepare(show_progress=process().is_local_main_process)
    return replace(options, model=made.model, data=(made.data,), eval_data=(made.eval_data,))


def _load(options: Options, corpus: data.Corpus) -> tuple[Any, memory.Estimate]:
    """The adapted model and what training it will take; both are shown."""
    say = process().print
    with memory.advice_when_exhausted(options):
        base = base_model.load_base(options)
        liger = base_model.apply_liger(base, options)
        set_seed(options.seed)
        model = base_model.add_adapter(base, options)
        longest = max(len(row["input_ids"]) for row in corpus.train)
        estimate = memory.estimate(model, options, longest)
    trainable, total = model.get_nb_trainable_parameters()
    say(f"\n{peft_fast.explain(model)}")
    say(f"\ntrainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")
    if liger:
        say(liger)
    say(f"\n{estimate}")
    if estimate.needed > estimate.available:
        say(f"  that is more than there is; {memory.advice(options, estimate)}")
    return model, estimate


def _train(trainer: AdapterTrainer, options: Options, sample: Callable[[], str], clock: Clock) -> dict[str, Any]:
    """Train; the held-out loss and a sample before and after, and the loss with the adapter disabled again."""
    before, sample_before = trainer.evaluate()["eval_loss"], sample()
    clock.lap("before")
    checkpoint = options.checkpoint
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    clock.lap("training")
    after, sample_after = trainer.evaluate()["eval_loss"], sample()
    history = list(trainer.state.log_history)
    with trainer.model.disable_adapter():
        disabled = trainer.evaluate()["eval_loss"]
    clock.lap("after")
    heldout = {0: before} | {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    return {
        "heldout_loss": {"before": before, "after": after, "adapter_disabled": disabled},
        "train_losses": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "heldout_losses": sorted(heldout.items()),
        "samples": {"before": sample_before, "after": sample_after},
    }


def _finish(trainer: AdapterTrainer, options: Options, results: dict[str, Any], clock: Clock) -> None:
    """Write adapter, figure and metrics, reload the adapter elsewhere, and print what came out.

    Raises CheckFailed, after the summary: whatever the verification finds, the reader learns where the files are.
    """
    folder = Path(options.output)
    trainer.model.save_pretrained(str(folder))
    report.loss_figure(folder / "loss.png", results["train_losses"], results["heldout_losses"])
    report.write_metrics(folder / "metrics.json", options, results)
    losses = results["heldout_loss"]
    failure = None
    if options.verify:
        # Room for a second base model on the same GPU.
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.accelerator.free_memory()
        try:
            losses["reloaded"] = verify.in_fresh_process(folder)
        except CheckFailed as error:
            failure = error
        clock.lap("verification")
        report.write_metrics(folder / "metrics.json", options, results)
    print(report.summary(results, folder), flush=True)  # before the error, which goes to the other stream
    if failure:
        raise failure
    _check(losses)


def _check(losses: dict[str, float]) -> None:
    """Raises CheckFailed where a loss differs that must not: adapter disabled from before, reloaded from after."""
    pairs = (("adapter_disabled", "before"), ("reloaded", "after"))
    for name, expected in pairs:
        if name in losses and not abs(losses[name] - losses[expected]) <= SAME * losses[expected]:  # NaN fails too
            raise CheckFailed(
                f"the held-out loss with the adapter {name.split('_')[-1]} is {losses[name]}, which must equal the one "
                f"{expected} training, {losses[expected]}"
            )
