"""Adapters as vLLM takes them: save_pretrained(folder, vllm_compatible=True).

vLLM (vllm/lora/peft_helper.py, vllm/lora/utils.py) reads r, lora_alpha, use_rslora and target_modules of the config,
one rank and scale for all layers, and takes tensors that end in lora_A.weight, lora_B.weight, lora_embedding_A or
lora_embedding_B. rank_pattern and alpha_pattern it did not read for long, and such an adapter was served with wrong
scales; 0.33 reads them. What is written here has none, for all versions.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from peft_fast.checkpoint import vocabulary_was_resized
from peft_fast.peft_types import PeftType
from peft_fast.tuners.lora.initialisation import changes_base

MAX_RANK = 512  # the largest that vLLM's max_lora_rank may be
FACTORS = {
    ".lora_A.weight": 0,
    ".lora_B.weight": 1,
    ".lora_embedding_A": 0,
    ".lora_embedding_B": 1,
}  # and R's dimension
REFUSED = {  # option: what it says where it is off, and what to do
    "bias": (("none",), "train with bias='none'"),
    "lora_bias": ((False,), "train with lora_bias=False"),
    "use_dora": ((False,), "merge it instead: model.merge_to_16bit() or merge_and_unload()"),
    "modules_to_save": ((None,), "merge it instead: model.merge_to_16bit() or merge_and_unload()"),
    "trainable_token_indices": ((None,), "merge it instead: model.merge_to_16bit() or merge_and_unload()"),
    "target_parameters": ((None,), "merge it instead: model.merge_to_16bit() or merge_and_unload()"),
    "alora_invocation_tokens": ((None, []), "such adapters are there for some tokens only, and vLLM's for all"),
    "layer_replication": ((None,), "serve the replicated model, merged"),
}


def for_vllm(tuner: Any, adapter_name: str, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """(config, tensors) of an adapter as vLLM, and peft too, can load them: the model and `tensors` stay as they are.

    Where layers have ranks or scales of their own, each layer's scale is multiplied into its B, in fp32 and rounded
    once to B's dtype, and smaller ranks are filled up with zeros. Scales are those that the config says: set_scale is
    of the running model, and in no file.
    Raises ValueError for what vLLM has no place for.
    """
    config = tuner.peft_config[adapter_name]
    layers = {path: layer for path, layer in tuner.layers() if adapter_name in layer.available_adapters()}
    strange = [key for key, tensor in tensors.items() if not key.endswith(tuple(FACTORS)) or tensor.dim() != 2]
    if strange:
        raise ValueError(
            f"vLLM takes matrices on linear layers and embeddings only, got {strange[0]} "
            f"{list(tensors[strange[0]].shape)}, {len(strange)} in all: leave these layers out, or merge the adapter"
        )
    ranks = {layer.r[adapter_name] for layer in layers.values()}
    scales = {layer.initial_scale(adapter_name) for layer in layers.values()}
    R = max(ranks)
    if R > MAX_RANK:
        raise ValueError(f"vLLM takes ranks up to {MAX_RANK}, got {R}: train with a smaller r, or merge the adapter")
    alpha = config.lora_alpha
    if ranks == {config.r} and len(scales) == 1 and float(alpha).is_integer():
        return replace(config, lora_alpha=int(alpha), rank_pattern={}, alpha_pattern={}), tensors
    folded = {}
    for key, tensor in tensors.items():
        layer = layers[_path(key, layers)]
        folded[key] = _filled(key, _scaled(key, tensor, layer.initial_scale(adapter_name)), R)
    return replace(config, r=R, lora_alpha=R, use_rslora=False, rank_pattern={}, alpha_pattern={}), folded


def check_and_leave_out_embeddings(tuner: Any, names: list[str], choice: bool | str) -> Literal[False]:
    """save_embedding_layers for vLLM, which has no place for weights of the base model. Raises ValueError where they
    would be needed, and for adapters that vLLM cannot serve."""
    if choice is True:
        raise ValueError("vLLM takes no embeddings of the base model: leave save_embedding_layers out")
    for name in names:
        _check(tuner.peft_config[name], name)
        if vocabulary_was_resized(tuner, name):
            raise ValueError(
                "the vocabulary was resized, and vLLM takes no embeddings with an adapter: save the merged model, or "
                "the base model with its new embeddings, and serve that"
            )
    return False


def _check(config: Any, adapter_name: str) -> None:
    if config.peft_type != PeftType.LORA:
        kind = PeftType(config.peft_type).value
        raise ValueError(
            f"vllm_compatible is for LoRA, and adapter {adapter_name!r} is {kind}: merge it into the model"
        )
    if changes_base(config.init_lora_weights):
        raise ValueError(
            f"adapter {adapter_name!r} changed the base weights at its start (init_lora_weights="
            f"{config.init_lora_weights!r}), and vLLM serves the untouched ones: save it with "
            "path_initial_model_for_weight_conversion, load that on the base model as it was, and save it for vLLM"
        )
    for option, (off, way_out) in REFUSED.items():
        value = getattr(config, option)
        if value not in off and value != []:
            raise ValueError(f"vLLM has no {option}, and adapter {adapter_name!r} has {option}={value!r}: {way_out}")


def _path(key: str, layers: dict[str, Any]) -> str:
    """The path of the layer that a tensor of the file belongs to."""
    end = next(end for end in FACTORS if key.endswith(end))
    path = key.removesuffix(end).removeprefix("base_model.model.")
    if path not in layers:
        raise ValueError(
            f"the tensor {key} belongs to no adapted layer of the model: there are {sorted(layers)[:3]}, ..."
        )
    return path


def _scaled(key: str, tensor: Tensor, scale: float) -> Tensor:
    if not key.endswith((".lora_B.weight", ".lora_embedding_B")):
        return tensor
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale).to(tensor.dtype)


def _filled(key: str, tensor: Tensor, R: int) -> Tensor:
    """With zeros up to rank R."""
    dim = next(dim for end, dim in FACTORS.items() if key.endswith(end))
    shape = list(tensor.shape)
    shape[dim] = R - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim) if shape[dim] else tensor
