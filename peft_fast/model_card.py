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
    base_model = config.base_model_name_or_path
    method = PeftType(config.peft_type).value.lower()
    data.library_name = "peft"
    tags = {*(data.tags or ()), method, "peft_fast", *([f"base_model:adapter:{base_model}"] if base_model else ())}
    data.tags = sorted(tags)
    if base_model:
        data.base_model = base_model
    if config.task_type == TaskType.CAUSAL_LM and not data.pipeline_tag:
        data.pipeline_tag = "text-generation"
    heading = "## Quantization of the base model in training"
    if quantized is not None and heading not in card.text:
        card.text += f"\n{heading}\n\n" + "".join(f"- {key}: {value}\n" for key, value in quantized.to_dict().items())
    return str(card)
