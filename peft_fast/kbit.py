"""Getting a k-bit base model ready for training adapters on it (QLoRA, arXiv 2305.14314)."""

from typing import Any

import torch
from torch import Tensor, nn

from .tuners.base_weight import HALF_DTYPES, quantized_weight, storage


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze `model`, keep all but its k-bit weights in fp32, and turn gradient checkpointing on. Returns `model`.

    For bitsandbytes' 4-bit layers and those of `quantize_linear_layers`. A model without any is frozen and kept in
    fp32, but not checkpointed, as in peft. Call it before get_peft_model.
    `gradient_checkpointing_kwargs` go to torch.utils.checkpoint. `auto_clear_cache`: give the memory of the half
    precision copies back to the device.
    """
    kbit = [module for module in model.modules() if quantized_weight(module) is not None]
    stored = {id(storage(module)) for module in kbit}  # may be of a half dtype (bitsandbytes' quant_storage)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype in HALF_DTYPES and id(parameter) not in stored:
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if kbit and use_gradient_checkpointing:
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
            make_inputs_require_grad(model)
        _checkpoint_activations(model, gradient_checkpointing_kwargs)
    return model


def _checkpoint_activations(model: Any, options: dict[str, Any] | None) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def make_inputs_require_grad(model: Any) -> None:
    """Reentrant checkpointing passes gradients on only if a block's inputs want them; frozen embeddings do not."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
        return

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(hook)
