"""Names of peft.utils.other."""

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
from peft_fast.tuners.modules_to_save import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft_fast.tuners.prompt_learning.inputs import shift_tokens_right
from peft_fast.tuners.tied import embedding_path
from peft_fast.tuners.trainable_tokens.wrapper import TrainableTokensWrapper

from .constants import (
    CONFIG_NAME,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
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
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_get_input_embeddings_name",
    "_get_submodules",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "infer_device",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "transpose",
]
