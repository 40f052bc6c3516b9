"""Writing an adapter: its tensors, its config and its model card, all of them or none."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import model_card
from .adapter_file import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, ready_to_save
from .config import CONFIG_NAME, PeftConfig
from .files import write_together


def write_adapter(
    directory: Path, base: nn.Module, config: PeftConfig, tensors: dict[str, Tensor], safe: bool, with_card: bool = True
) -> None:
    """Write `tensors` as `directory`'s adapter. `safe`: as safetensors. What was there is replaced only as a whole.

    Raises ValueError, before anything is written, for tensors that are shards of weights and not the weights.
    """
    _check_whole(config, tensors)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = ready_to_save(tensors)
    name = config.base_model_name_or_path or base_model_name(base)
    changes = {"inference_mode": True, "base_model_name_or_path": name, **_auto_mapping(config, base)}
    text = config.to_json(**changes)
    card = card_text(directory, base, config) if with_card else None

    def write_tensors(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"}) if safe else torch.save(tensors, path)

    write_together(
        {
            directory / (SAFETENSORS_WEIGHTS_NAME if safe else WEIGHTS_NAME): write_tensors,
            directory / CONFIG_NAME: lambda path: path.write_text(text, encoding="utf-8"),
            **_card_to_write(directory, card),
        },
        obsolete=[directory / (WEIGHTS_NAME if safe else SAFETENSORS_WEIGHTS_NAME)],  # loading would prefer one
    )


def write_card(directory: Path, base: nn.Module, config: PeftConfig) -> None:
    """Write the model card alone, keeping the text of one that is there."""
    directory.mkdir(parents=True, exist_ok=True)
    files = _card_to_write(directory, card_text(directory, base, config))
    if files:
        write_together(files)


def card_text(directory: Path, base: nn.Module, config: PeftConfig) -> str | None:
    """The text of the card, or None where there is one that cannot be read: it is left alone, with a warning."""
    # By its name: importing the class takes seconds, and is for those who have such a model, and so have done it.
    tags = ["transformers"] if "PreTrainedModel" in [cls.__name__ for cls in type(base).__mro__] else []
    tags += getattr(base, "model_tags", None) or []
    quantized = getattr(getattr(base, "config", None), "quantization_config", None)
    name = config.base_model_name_or_path or base_model_name(base)
    return model_card.model_card(directory, config, name, tags, quantized)


def _card_to_write(directory: Path, card: str | None) -> dict[Path, Any]:
    if card is None:
        return {}
    return {directory / model_card.NAME: lambda path: path.write_text(card, encoding="utf-8")}


def base_model_name(base: nn.Module) -> str | None:
    name = getattr(base, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _auto_mapping(config: PeftConfig, base: nn.Module) -> dict[str, Any]:
    """How to find the base model's class again, for models without a task type."""
    if config.task_type is not None:
        return {}
    return {"auto_mapping": {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}}


def _check_whole(config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    # They leave nothing of a shape, either; a matrix without columns is one that has none (OFT's, of blocks of 1).
    gone = [key for key, tensor in tensors.items() if tensor.numel() == 0 and tensor.dim() < 2]
    empty = [key for key in gone if not config.may_be_empty(key)]
    if empty:
        raise ValueError(
            f"{len(empty)} tensors of the adapter are empty, such as {empty[0]}: DeepSpeed ZeRO-3 or FSDP holds their "
            "values elsewhere. Gather them (GatheredParameters, summon_full_params) and pass state_dict=..., or save "
            "inside of that block"
        )
