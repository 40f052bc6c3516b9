"""What is compared: parsed by the command, handed to each worker as JSON."""

import argparse
import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

SHAPES = ("small", "llama-3.2-1b", "qwen3-4b", "llama-3-8b")
PROVIDERS = ("peft", "unsloth", "peft_fast")


@dataclass(frozen=True)
class Options:
    model: str  # one of SHAPES, made with random weights, or a directory
    seq_len: int
    batch_size: int
    steps: int
    rank: int
    dropout: float
    bits: int
    autocast: bool
    gradient_checkpointing: bool
    prepare: bool  # prepare_model_for_kbit_training
    recompute: tuple[str, ...] = ()  # of norms, mlps: by peft_fast
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.seq_len * self.batch_size

    def __str__(self) -> str:
        recipe = [f"{self.bits} bits", f"r={self.rank}", f"dropout {self.dropout}"]
        recipe.append("bf16 autocast" if self.autocast else "bf16")
        recipe += ["gradient checkpointing"] * self.gradient_checkpointing + ["prepared for k-bit"] * self.prepare
        recipe += [f"peft_fast recomputes {' and '.join(self.recompute)}"] * bool(self.recompute)
        return f"{Path(self.model).name}, batch {self.batch_size} x {self.seq_len}, {', '.join(recipe)}"

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def parse(arguments: list[str] | None = None) -> tuple[Options, list[str], Path]:
    """(options, the providers that can run here, the folder for results)"""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    add = parser.add_argument
    add("--model", default="llama-3.2-1b" if on_gpu else "small", help=f"a directory, or one of {', '.join(SHAPES)}")
    add("--seq-len", type=int, default=1024 if on_gpu else 128, help="tokens a row (default: %(default)s)")
    add("--batch-size", type=int, default=2, help="rows (default: %(default)s)")
    add("--steps", type=int, default=20 if on_gpu else 10, help="timed steps of each (default: %(default)s)")
    add("--rank", type=int, default=16)
    add("--dropout", type=float, default=0.0, help="of the adapters; above 0 losses differ by design")
    add("--bits", type=int, default=4, choices=(4, 16))
    add("--no-autocast", action="store_true", help="compute in bf16 throughout instead of under autocast")
    add("--gradient-checkpointing", action="store_true")
    add("--prepare", action="store_true", help="prepare_model_for_kbit_training first: norms and residual in fp32")
    add("--recompute", nargs="+", default=[], choices=("norms", "mlps"), help="by peft_fast alone: set_recompute")
    add("--only", default="", help=f"some of {', '.join(PROVIDERS)}, with commas between")
    add("--results", type=Path, default=Path(__file__).parents[1] / "results")
    given = parser.parse_args(arguments)
    if given.model not in SHAPES and not Path(given.model).is_dir():
        parser.error(f"--model must be a directory or one of {', '.join(SHAPES)}, got {given.model!r}")
    for name in ("seq_len", "batch_size", "steps", "rank"):
        if getattr(given, name) < (2 if name == "seq_len" else 1):
            parser.error(f"--{name.replace('_', '-')} is too small: {getattr(given, name)}")
    wanted = [name for name in given.only.split(",") if name] or list(PROVIDERS)
    for name in wanted:
        if name not in PROVIDERS:
            parser.error(f"--only must name some of {', '.join(PROVIDERS)}, got {name!r}")
    options = Options(
        given.model, given.seq_len, given.batch_size, given.steps, given.rank, given.dropout, given.bits,
        not given.no_autocast, given.gradient_checkpointing, given.prepare, tuple(given.recompute),
    )  # fmt: skip
    return options, [name for name in wanted if why_not(name, options) is None], given.results


def why_not(provider: str, options: Options) -> str | None:
    """Why this library cannot take part, or None."""
    if provider != "unsloth":
        return None
    if importlib.util.find_spec("unsloth") is None:
        return "not installed"
    if not torch.cuda.is_available():
        return "needs a GPU"
    return "takes a model's directory: give --model" if options.model in SHAPES else None
