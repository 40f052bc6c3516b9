"""What CorDA and LoRA-GA have in common before an adapter is made: which layers they are for, and files of tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.adapter_file import UNREADABLE
from peft_fast.files import write_together
from peft_fast.tuners.base_weight import is_dense_linear
from peft_fast.tuners.matching import find_targets, resolved_targets
from peft_fast.tuners.targets import LORA_TARGETS

from .config import LoraConfig


def linear_targets(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """The dense linear layers that the config names, by path. Raises ValueError where there is none."""
    targets = resolved_targets(model, config.target_modules, LORA_TARGETS, config.task_type)
    layers = {path: model.get_submodule(path) for path in find_targets(model, config, targets)}
    found = {path: layer for path, layer in layers.items() if is_dense_linear(layer)}
    if not found:
        raise ValueError(f"target_modules {config.target_modules} name no dense linear layer: {sorted(layers)[:3]}")
    return found


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """In training or eval mode within the block; afterwards each module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def is_there(file: str | None) -> bool:
    return file is not None and Path(file).is_file() and Path(file).stat().st_size > 0


def read_tensors(file: str, names: list[str], device: torch.device) -> dict[str, Tensor]:
    """These tensors of a file. Runs no code of it. Raises ValueError where one is missing."""
    try:
        tensors = torch.load(file, map_location=device, weights_only=True)
    except (OSError, *UNREADABLE) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    missing = [name for name in names if not isinstance(tensors, dict) or not isinstance(tensors.get(name), Tensor)]
    if missing:
        raise ValueError(f"{file} was made for another model or config: {missing[0]} is not in it. Remove it")
    return {name: tensors[name] for name in names}


def write_tensors(file: str, tensors: dict[str, Tensor]) -> None:
    """All of it or nothing."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_together({path: lambda to: torch.save(tensors, to)})
