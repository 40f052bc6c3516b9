"""Names of peft.utils.other."""

import functools
import os
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub import constants, file_exists
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from torch import Tensor, nn

from peft_fast.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
from peft_fast.tuners.matching import by_pattern
from peft_fast.tuners.modules_to_save import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft_fast.tuners.prompt_learning.inputs import shift_tokens_right
from peft_fast.tuners.tied import embedding_path
from peft_fast.tuners.trainable_tokens.wrapper import TrainableTokensWrapper

from .constants import (
    CONFIG_NAME,
    DUMMY_MODEL_CONFIG,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    SEQ_CLS_HEAD_NAMES,
    TOKENIZER_CONFIG_NAME,
    TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    WEIGHTS_NAME,
    bloom_model_postprocess_past_key_value,
)


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, name in the parent) of the module at path `key`."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The path of the input embedding, or `default` for a model that does not say."""
    return embedding_path(model) or default


def infer_device() -> str:
    """The type of the device that models run on here: "cuda", "mps", "xpu", ..., or "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight turned round, a Parameter as one, where it lies [in, out]."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def str_to_bool(value: str) -> int:
    """1 for y, yes, t, true, on and 1; 0 for n, no, f, false, off and 0; ValueError for anything else."""
    words = {
        "y": 1,
        "yes": 1,
        "t": 1,
        "true": 1,
        "on": 1,
        "1": 1,
        "n": 0,
        "no": 0,
        "f": 0,
        "false": 0,
        "off": 0,
        "0": 0,
    }
    if value.lower() not in words:
        raise ValueError(f"a truth value must be one of {', '.join(words)}, got {value!r}")
    return words[value.lower()]


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository of the Hub has a file; None where that cannot be found out, with a warning unless the
    process is offline or `repo_id` can be no repository's. `kwargs`: of huggingface_hub.file_exists."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return file_exists(repo_id, filename, **kwargs)
    except (HFValidationError, OfflineModeIsEnabled):
        return None
    except (HfHubHTTPError, OSError) as error:
        warnings.warn(f"whether {repo_id!r} has a {filename} cannot be found out: {error}", stacklevel=2)
        return None


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """How target_modules that is a string means a path: as an expression for all of it."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """Which of rank_pattern's or alpha_pattern's keys means this path, the first of several, or the path itself."""
    return by_pattern({key: key for key in pattern_keys}, key_to_match, key_to_match)


def get_quantization_config(model: Any, method: str) -> Any:
    """What transformers quantised a model with, or None where that was not `method` ("gptq", ...)."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def fsdp_auto_wrap_policy(model: Any) -> Any:
    """A policy for torch's FSDP: the transformer blocks become units (those that FSDP_TRANSFORMER_CLS_TO_WRAP names, or
    the model's _no_split_modules), and so does every layer without children whose weight is trained.

    Raises ValueError for a class that the model does not have.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(getattr(model, "_no_split_modules", None) or ()))
    kinds = {type(module).__name__: type(module) for module in model.modules()}
    wanted = [name for name in names.split(",") if name]
    if absent := [name for name in wanted if name not in kinds]:
        raise ValueError(f"FSDP_TRANSFORMER_CLS_TO_WRAP must name classes of the model's modules, got {absent}")

    def is_trained_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return weight is not None and weight.requires_grad and not list(module.children())

    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=is_trained_leaf)
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={kinds[name] for name in wanted})
    return functools.partial(_or_policy, policies=[leaves, blocks])


__all__ = [
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_get_input_embeddings_name",
    "_get_submodules",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "check_file_exists_on_hf_hub",
    "fsdp_auto_wrap_policy",
    "get_pattern_key",
    "get_quantization_config",
    "infer_device",
    "match_target_against_key",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "str_to_bool",
    "transpose",
]
