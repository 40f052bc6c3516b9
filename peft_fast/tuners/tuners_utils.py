"""Names of peft.tuners.tuners_utils."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_fast.config import PeftConfig
from peft_fast.errors import NoMatchingPeftModuleError
from peft_fast.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from peft_fast.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft_fast.peft_types import PeftType, TaskType
from peft_fast.utils.constants import (
    DUMMY_MODEL_CONFIG,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SEQ_CLS_HEAD_NAMES,
    UPCAST_DTYPES,
)
from peft_fast.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, match_target_against_key
from peft_fast.utils.warning import PeftWarning

from ._buffer_dict import BufferDict
from .base import BaseTuner
from .layer import BaseTunerLayer
from .lora.replication import replicate_layers
from .matching import is_meant
from .prompt_learning import BasePromptEncoder


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """{"matched": the paths of the modules that have this adapter, "unmatched": all others} in `tuner.model`.

    Raises ValueError for an adapter that does not exist.
    """
    tuner._check_known([adapter_name])
    mine = {path for path, layer in tuner.layers() if adapter_name in layer.available_adapters()}
    paths = [path for path, _ in tuner.model.named_modules()]
    return {
        "matched": [path for path in paths if path in mine],
        "unmatched": [path for path in paths if path not in mine],
    }


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether `config` wants an adapter at the module with the path `key`, as far as names say: its target_modules,
    exclude_modules, modules_to_save, layers_to_transform and layers_pattern."""
    targets = config.target_modules
    return bool(targets) and is_meant(config, key, targets)


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: Sequence[str] | None = None) -> list[str]:
    """Of these adapters (the active ones unless named) those that the layer has and that are not merged yet.

    Warns of those that are. Raises TypeError for a string, ValueError where nothing can be merged into the layer.
    """
    return module.adapters_to_merge(adapter_names)


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy, in the same parameters with `share_weights`."""
    shared = {id(parameter): parameter for parameter in module.parameters()} if share_weights else {}
    return copy.deepcopy(module, shared)


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The path of a module in the model, or "" where it is not in it."""
    return next((path for path, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: Any) -> dict[str, Any]:
    """Where accelerate has put what; {"": device} for a model that it has not spread."""
    return getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}


__all__ = [
    "DUMMY_MODEL_CONFIG",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "SEQ_CLS_HEAD_NAMES",
    "UPCAST_DTYPES",
    "AuxiliaryTrainingWrapper",
    "BasePromptEncoder",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "clone_module",
    "delete_adapter",
    "find_parameter_name_by_module",
    "get_device_map",
    "inspect_matched_modules",
    "match_target_against_key",
    "replicate_layers",
    "set_adapter",
    "set_requires_grad",
]
