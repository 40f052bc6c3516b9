"""What several of these tests do with a run."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from peft_fast.finetune import run
from peft_fast.finetune.options import build_parser

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKPOINT = {
    "adapter_config.json", "adapter_model.safetensors", "README.md", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin",
}  # fmt: skip


def finished(arguments: list[str]) -> dict:
    """metrics.json of a run in this process, which must succeed."""
    assert run.main(arguments) == 0
    return json.loads((Path(parse_output(arguments)) / "metrics.json").read_text())


def parse_output(arguments: list[str]) -> str:
    return build_parser().parse_args(arguments).output


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")
