"""The options of `python -m peft_fast.finetune`, and the combinations of them that are refused.

`parse` touches no model and no network: whatever it accepts may still fail later for what is in the files, but never
for options that contradict each other, the device or the installed packages.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ALL_LINEAR = "all-linear"
LATEST = "latest"
# Our names -> transformers'. The 8-bit and paged ones are bitsandbytes' and keep their states on the GPU.
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UserError(ValueError):
    """Options, files or a model that cannot be used as they are. The message: the rule, what was got, the way out."""


@dataclass(frozen=True)
class Options:
    """Everything a run depends on. `metrics.json` holds it, so that `verify.py` can repeat the evaluation."""

    model: str | None
    data: tuple[str, ...]
    eval_data: tuple[str, ...]
    eval_fraction: float
    sequence_length: int
    mask_prompt: bool
    packing: bool
    bits: int
    rank: int
    alpha: int
    dropout: float
    target_modules: str | tuple[str, ...]
    steps: int | None
    epochs: float | None
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    warmup: float
    optimizer: str
    precision: str
    gradient_checkpointing: bool
    recompute: tuple[str, ...]
    seed: int
    backend: str
    output: str
    resume: str | None
    eval_every: int
    save_every: int
    prompt: str | None
    sample_tokens: int
    verify: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model and of the activations."""
        return DTYPES[self.precision]

    @property
    def checkpoint(self) -> Path | None:
        """The folder that `resume` means: the one it names, or the newest in `output`. None: there is nothing."""
        if self.resume not in (None, LATEST):
            return Path(str(self.resume))
        found = checkpoints(self.output) if self.resume == LATEST else []
        return found[-1] if found else None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Options":
        """The inverse of `to_dict`, also after a round trip through JSON, which has lists for tuples."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def checkpoints(folder: str) -> list[Path]:
    """The `checkpoint-STEP` folders in `folder`, the newest last (checkpoint-100 is newer than checkpoint-20)."""
    steps = ((path.name.removeprefix("checkpoint-"), path) for path in Path(folder).glob("checkpoint-*"))
    return [path for _, path in sorted((int(step), path) for step, path in steps if step.isdecimal())]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m peft_fast.finetune",
        description="Train a LoRA adapter (QLoRA with --bits 4) and show that it worked. Without --model and --data it "
        "first trains a small Llama of its own on English prose from Python's standard library, then adapts that to "
        "Python source code: no download, under five minutes on two cores. It has defaults of its own: "
        + ", ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in {**EMBEDDED, "steps": EMBEDDED_STEPS}.items()
        )
        + ", --save-every 0, --verify.",
        allow_abbrev=False,
    )
    _add_model_options(parser.add_argument_group("model"))
    _add_data_options(parser.add_argument_group("data"))
    _add_adapter_options(parser.add_argument_group("adapter"))
    _add_training_options(parser.add_argument_group("training"))
    _add_output_options(parser.add_argument_group("output"))
    return parser


# fmt: off
def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="DIR|ID", help="base model: a directory, or an id on the Hugging Face hub")
    group.add_argument("--bits", type=int, choices=(4, 8, 16), default=4,
                       help="bits per base weight: 4 is NF4 with double quantisation, 8 is LLM.int8's format, with "
                            "activations left as they are, 16 keeps the weights in the dtype of --precision "
                            "(default: %(default)s)")
    group.add_argument("--precision", choices=("auto", *DTYPES), default="auto",
                       help="dtype of base and activations; the adapter stays in fp32. auto: bf16 on a GPU that has "
                            "it, else fp16, and fp32 on a CPU (default: %(default)s)")
    group.add_argument("--backend", choices=("auto", "triton", "torch"),
                       default=os.environ.get("PEFT_FAST_BACKEND", "auto"),
                       help="kernels of the adapted layers; triton refuses to fall back "
                            "(default: $PEFT_FAST_BACKEND, else auto)")


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data", nargs="+", default=[], metavar="FILE",
                       help=".txt (one document per file) or .jsonl whose lines hold `text`, or `prompt` and "
                            "`completion`, or `messages` (rendered with the tokenizer's chat template)")
    group.add_argument("--eval-data", nargs="+", default=[], metavar="FILE",
                       help="held-out data; default: --eval-fraction of --data")
    group.add_argument("--eval-fraction", type=float, default=0.05, metavar="F",
                       help="fraction of the records held out when there is no --eval-data (default: %(default)s)")
    group.add_argument("--sequence-length", type=int, default=1024, metavar="TOKENS",
                       help="longer texts are cut into pieces of this length, longer prompt+completion and messages "
                            "lose their end (default: %(default)s)")
    group.add_argument("--mask-prompt", action="store_true",
                       help="no loss on prompts: only completions, or the assistant's turns of messages, are learnt")
    group.add_argument("--packing", action="store_true",
                       help="put several documents into one row of --sequence-length. They stay apart: position ids "
                            "restart at each document, from which transformers' attention builds a block-diagonal "
                            "mask (sdpa, eager; the mask takes batch x length^2 elements and rules out the fast causal "
                            "path) or variable-length calls (flash attention; no cost). Checked on the model before "
                            "training; a model that ignores the restarts is refused")


def _add_adapter_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rank", type=int, default=16, metavar="R", help="rank of the adapter (default: %(default)s)")
    group.add_argument("--alpha", type=int, metavar="A", help="the update is scaled by A/R (default: 2 x R)")
    group.add_argument("--dropout", type=float, default=0.0, metavar="P",
                       help="probability of dropping an adapter input (default: %(default)s)")
    group.add_argument("--target-modules", default=ALL_LINEAR, metavar="NAMES",
                       help="comma-separated names of the layers to adapt, as q_proj,v_proj "
                            "(default: %(default)s, every linear layer but the output head)")


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="optimiser steps; excludes --epochs")
    length.add_argument("--epochs", type=float, metavar="E", help="passes over the data (default: 1)")
    group.add_argument("--batch-size", type=int, default=8, metavar="ROWS",
                       help="rows per device and forward pass (default: %(default)s)")
    group.add_argument("--gradient-accumulation", type=int, default=1, metavar="N",
                       help="forward passes per optimiser step (default: %(default)s)")
    group.add_argument("--learning-rate", type=float, default=2e-4, metavar="LR",
                       help="peak, decaying linearly to 0 (default: %(default)s)")
    group.add_argument("--warmup", type=float, default=0.03, metavar="N|F",
                       help="optimiser steps, or below 1 a fraction of all steps (default: %(default)s)")
    group.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw",
                       help="paged_* and *_8bit are bitsandbytes' and need a GPU (default: %(default)s)")
    group.add_argument("--gradient-checkpointing", action="store_true",
                       help="keep one activation per layer and recompute the rest: less memory, about a third slower")
    group.add_argument("--recompute", nargs="+", choices=("norms", "mlps"), default=[],
                       help="keep the inputs of norms, or of MLPs, alone and compute what is in them again: a quarter, "
                            "or half, of the layers' activations less, for a little, or a fifth, more time")
    group.add_argument("--seed", type=int, default=0, metavar="N",
                       help="of adapter, data order, dropout, split and samples (default: %(default)s)")


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output", default="runs/finetune", metavar="DIR",
                       help="adapter, loss.png, metrics.json and checkpoints (default: %(default)s)")
    group.add_argument("--eval-every", type=int, default=0, metavar="STEPS",
                       help="measure the held-out loss during training too (default: before and after only)")
    group.add_argument("--save-every", type=int, metavar="STEPS",
                       help="checkpoint interval, the newest two are kept; 0: none (default: 100)")
    group.add_argument("--resume", nargs="?", const=LATEST, metavar="CHECKPOINT",
                       help="continue from the newest checkpoint in --output, or from the one named")
    group.add_argument("--prompt", metavar="TEXT",
                       help="what the samples continue (default: the prompt or the start of a held-out record)")
    group.add_argument("--sample-tokens", type=int, default=128, metavar="TOKENS",
                       help="length of the samples before and after, 0: none (default: %(default)s)")
    group.add_argument("--verify", action=argparse.BooleanOptionalAction,
                       help="afterwards, reload base and adapter in a fresh process and compare the held-out loss "
                            "(default: only for the default model)")


# fmt: on

# What differs for the default model: small enough for two CPU cores, long enough for the loss to fall clearly.
EMBEDDED = {"sequence_length": 128, "batch_size": 16, "learning_rate": 2e-3, "sample_tokens": 96}
EMBEDDED_STEPS = 60


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line (`sys.argv` when None). Exits with status 2 and a message on a wrong one."""
    parser = build_parser()
    if not parser.parse_known_args(arguments)[0].model:
        parser.set_defaults(**EMBEDDED)
    values = vars(parser.parse_args(arguments))
    embedded = values["model"] is None
    if embedded and values["epochs"] is None and values["steps"] is None:
        values["steps"] = EMBEDDED_STEPS
    if values["steps"] is None and values["epochs"] is None:
        values["epochs"] = 1.0
    if values["target_modules"] != ALL_LINEAR:
        names = (name.strip() for name in values["target_modules"].split(","))
        values["target_modules"] = tuple(name for name in names if name)
    if values["precision"] == "auto":
        values["precision"] = _best_precision()
    defaults = {"alpha": 2 * values["rank"], "save_every": 0 if embedded else 100, "verify": embedded}
    for name, default in defaults.items():
        if values[name] is None:
            values[name] = default
    options = Options(
        **{
            **values,
            "data": tuple(values["data"]),
            "eval_data": tuple(values["eval_data"]),
            "recompute": tuple(values["recompute"]),
        }
    )
    try:
        check(options)
    except UserError as error:
        parser.error(str(error))
    return options


def _best_precision() -> str:
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def check(options: Options) -> None:
    """Refuse what cannot be honoured.

    Raises:
        UserError: with the rule, what was got and the way out.
    """
    _check_numbers(options)
    _check_files(options)
    _check_resume(options)
    _check_machine(options)


def _check_numbers(options: Options) -> None:
    at_least = {
        "rank": 1, "sequence_length": 8, "batch_size": 1, "gradient_accumulation": 1, "warmup": 0, "seed": 0,
        "eval_every": 0, "save_every": 0, "sample_tokens": 0, "steps": 1,
    }  # fmt: skip
    for name, least in at_least.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name in ("alpha", "learning_rate", "epochs"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if not 0 <= options.dropout < 1:
        raise UserError(f"--dropout is a probability below 1, got {options.dropout}")
    if not options.eval_data and not 0 < options.eval_fraction < 1:
        raise UserError(
            f"--eval-fraction must lie between 0 and 1, got {options.eval_fraction}; "
            "name a held-out file with --eval-data to train on all of --data"
        )
    if not options.target_modules:
        raise UserError(f"--target-modules names no layer; leave it out for {ALL_LINEAR}")


def _check_files(options: Options) -> None:
    if bool(options.model) != bool(options.data):
        given, missing = ("--model", "--data") if options.model else ("--data", "--model")
        raise UserError(f"{given} needs {missing} beside it; leave both out for the default model and data")
    if options.eval_data and not options.data:
        raise UserError("--eval-data needs --model and --data; the default model has held-out files of its own")
    for name in (*options.data, *options.eval_data):
        if Path(name).suffix not in (".txt", ".jsonl"):
            raise UserError(f"data files end in .txt or .jsonl, got {name}")
        if not Path(name).is_file():
            raise UserError(f"data file {name} does not exist")
    if options.mask_prompt and all(Path(name).suffix == ".txt" for name in options.data):
        what = f"{', '.join(options.data)} hold" if options.data else "the default data holds"
        raise UserError(f"--mask-prompt needs data with prompts, but {what} plain text; leave it out")


def _check_resume(options: Options) -> None:
    """A checkpoint continues as it began: another rank does not fit, another alpha would rescale what was learnt."""
    if options.resume is None:
        if earlier := checkpoints(options.output):
            raise UserError(
                f"{options.output} holds {earlier[-1].name} of an earlier run: continue it with --resume, "
                "or name another folder with --output"
            )
        return
    folder = options.checkpoint
    if folder is None:
        raise UserError(f"--resume found no checkpoint-* in {options.output}; name one, or start without --resume")
    for name in ("trainer_state.json", "adapter_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"--resume {folder} is not a checkpoint of this command: it has no {name}")
    try:
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha, targets = saved["r"], saved["lora_alpha"], saved["target_modules"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {folder}/adapter_config.json is damaged ({error!r}); name another one") from error
    pairs: list[tuple[str, Any, Any]] = [("--rank", options.rank, rank), ("--alpha", options.alpha, alpha)]
    # What all-linear stands for is known once the model is there; the trainer then compares layer by layer.
    if options.target_modules != ALL_LINEAR and isinstance(targets, list):
        pairs.append(("--target-modules", ",".join(sorted(options.target_modules)), ",".join(sorted(targets))))
    wrong = [(option, got, needed) for option, got, needed in pairs if got != needed]
    if wrong:
        raise UserError(
            f"{folder} was trained with other options than now: pass "
            + " ".join(f"{option} {needed}" for option, _, needed in wrong)
            + f" (now {' '.join(f'{option} {got}' for option, got, _ in wrong)})"
        )


def _check_machine(options: Options) -> None:
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(variable, "").lower() == "true":
            raise UserError(f"this command gives every GPU a whole model (DDP), but {variable} is set; use torchrun")
    on_gpu = torch.cuda.is_available()
    if options.precision == "fp16" and not on_gpu:
        raise UserError("--precision fp16 needs a GPU; a CPU trains in bf16 or fp32")
    if options.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--precision bf16 is not native on this GPU; use fp16 or fp32")
    if "8bit" in options.optimizer or "paged" in options.optimizer:
        if not on_gpu:
            raise UserError(f"--optimizer {options.optimizer} needs a GPU; use adamw")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"--optimizer {options.optimizer} comes with bitsandbytes: pip install bitsandbytes")
    if options.backend == "triton" and not on_gpu:
        raise UserError("--backend triton needs a GPU; auto and torch run anywhere")
