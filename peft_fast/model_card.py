"""The README.md beside an adapter: what the Hub shows, and how it knows what the files are."""

import re
import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .config import PEFT_VERSION, PeftConfig
from .peft_types import PeftType, TaskType

NAME = "README.md"
QUANTIZATION = "## Quantization of the base model in training"
VERSIONS = "### Framework versions"


def model_card(
    directory: Path, config: PeftConfig, base_model: str | None, tags: Iterable[str], quantized: Any
) -> str | None:
    """The text of the card: the one in `directory` brought up to date, or a new one.

    `base_model` is its name on the Hub, a path or None; `tags` are the base model's; `quantized` is the base model's
    quantization config (anything with `to_dict`) or None. None, with a warning, for a card that cannot be read.
    """
    card = _card(directory / NAME)
    if card is None:
        return None
    data: Any = card.data
    data.library_name = "peft"
    names = {*(data.tags or ()), *tags, PeftType(config.peft_type).value.lower(), "peft_fast"}
    if base_model and not Path(base_model).exists():  # the Hub refuses cards that name a path
        data.base_model = base_model
        names.add(f"base_model:adapter:{base_model}")
    data.tags = sorted(names)
    if config.task_type == TaskType.CAUSAL_LM and not data.pipeline_tag:
        data.pipeline_tag = "text-generation"
    if quantized is not None and QUANTIZATION not in card.text:
        options = {name: getattr(value, "value", value) for name, value in quantized.to_dict().items()}
        lines = [f"- {name}: {value}\n" for name, value in options.items() if not name.startswith("_")]
        card.text += f"\n{QUANTIZATION}\n\n{''.join(lines)}"
    card.text = _with_versions(card.text)
    return str(card)


def _card(path: Path) -> Any:
    try:
        if path.is_file():
            return ModelCard.load(path)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        warnings.warn(f"{path} is left as it is: its metadata cannot be read ({error})", stacklevel=6)
        return None
    return ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n# Adapter\n")


def _with_versions(text: str) -> str:
    """The text with the versions that wrote the adapter, in place of older ones."""
    try:
        ours = version("peft-fast")
    except PackageNotFoundError:  # run from a checkout
        ours = "from a checkout"
    line = f"- peft_fast {ours}, files of PEFT {PEFT_VERSION}"
    if re.search(r"^- peft_fast .*$", text, re.MULTILINE):
        return re.sub(r"^- peft_fast .*$", line, text, flags=re.MULTILINE)
    if VERSIONS in text:
        return text.replace(VERSIONS, f"{VERSIONS}\n\n{line}", 1)
    return f"{text.rstrip()}\n\n{VERSIONS}\n\n{line}\n"
