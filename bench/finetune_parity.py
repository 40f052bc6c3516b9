"""The same QLoRA training with peft + bitsandbytes and with peft_fast: both held-out losses, side by side.

    python -m bench.finetune_parity [options of peft_fast.finetune]

Base, data, seed, order and hyper-parameters are the same, and both run on transformers' Trainer; only the adapted
layers differ. Ends with status 1 if the held-out losses after training differ by more than 1 %.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import peft
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, set_seed

from peft_fast.finetune import base_model, data, embedded
from peft_fast.finetune.options import Options, UserError, parse
from peft_fast.finetune.trainer import mean_loss, training_arguments

ALLOWED = 0.01  # relative difference of the held-out losses after training


@dataclass(frozen=True)
class Outcome:
    """Losses in nats per token: held out before and after, and of each training step."""

    before: float
    after: float
    steps: list[float]


def with_peft(options: Options) -> Any:
    """The adapted model as peft's documentation has it: transformers quantises, `peft.get_peft_model` adapts."""
    quantization = None if options.bits == 16 else base_model.bitsandbytes_config(options)
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=options.dtype,
        device_map={"": base_model.process().device},
        quantization_config=quantization,
        local_files_only=True,
    )
    model.config.use_cache = False
    set_seed(options.seed)
    targets = options.target_modules
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    return peft.get_peft_model(model, config)


def with_peft_fast(options: Options) -> Any:
    model = base_model.load_base(options)
    set_seed(options.seed)
    return base_model.add_adapter(model, options)


def outcome(build: Callable[[Options], Any], options: Options, corpus: data.Corpus, pad_token_id: int) -> Outcome:
    """Train what `build` returns. The held-out loss is measured in train mode, which without dropout is the same
    function: in eval mode bitsandbytes repacks weights on some CPUs, and peft's layers learn nothing afterwards."""
    trainer = Trainer(
        model=build(options),
        args=training_arguments(replace(options, save_every=0, eval_every=0)),
        train_dataset=corpus.train,
        data_collator=data.collator(pad_token_id),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.model.train()
    before = mean_loss(trainer, corpus.heldout)
    trainer.train()
    after = mean_loss(trainer, corpus.heldout)
    return Outcome(before, after, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def compare(options: Options) -> dict[str, Any]:
    """Both outcomes and how far they are apart.

    Raises:
        UserError: with dropout, whose masks the two draw differently, or packing or a hub id.
    """
    if options.dropout or options.packing:
        raise UserError("parity is measured without --dropout and without --packing")
    tokenizer = base_model.load_tokenizer(str(options.model))
    corpus = data.load(options, tokenizer)
    theirs, ours = (outcome(build, options, corpus, tokenizer.pad_token_id) for build in (with_peft, with_peft_fast))
    return {
        "peft": asdict(theirs),
        "peft_fast": asdict(ours),
        "relative_difference_after": abs(ours.after - theirs.after) / theirs.after,
        "largest_difference_of_a_step": max(abs(a - b) for a, b in zip(ours.steps, theirs.steps)),
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.model is None:
        made = embedded.prepare()
        options = replace(options, model=made.model, data=(made.data,), eval_data=(made.eval_data,))
    result = compare(options)
    print(f"held-out loss, nats per token{'before':>14}{'after':>12}")
    for name in ("peft", "peft_fast"):
        print(f"  {name:<27}{result[name]['before']:>14.6f}{result[name]['after']:>12.6f}")
    print(f"relative difference after: {result['relative_difference_after']:.2e}")
    print(f"largest difference of a training step: {result['largest_difference_of_a_step']:.2e}")
    return int(result["relative_difference_after"] > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
