"""The README.md beside an adapter: what the Hub shows, and how it knows what the files are."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .config import PeftConfig
from .peft_types import PeftType, TaskType

NAME = "README.md"


def model_card(directory: Path, config: PeftConfig, quantized: Any) -> str:
    """The text of the card: the one in `directory` brought up to date, or a new one.

    `quantized` is the base model's quantization config (anything with `to_dict`) or None.
    """
    old = directory / NAME
    card = ModelCard.load(old) if old.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n# Adapter\n")
    data: Any = card.data
    data.library_name = "peft"
    tags = {*(data.tags or ()), PeftType(config.peft_type).value.lower(), "peft_fast"}
    base_model = config.base_model_name_or_path
    if base_model and not Path(base_model).exists():  # the Hub refuses cards that name a path
        data.base_model = base_model
        tags.add(f"base_model:adapter:{base_model}")
    data.tags = sorted(tags)
    if config.task_type == TaskType.CAUSAL_LM and not data.pipeline_tag:
        data.pipeline_tag = "text-generation"
    heading = "## Quantization of the base model in training"
    if quantized is not None and heading not in card.text:
        options = {name: getattr(value, "value", value) for name, value in quantized.to_dict().items()}
        lines = [f"- {name}: {value}\n" for name, value in options.items() if not name.startswith("_")]
        card.text += f"\n{heading}\n\n{''.join(lines)}"
    return str(card)
