"""Dtypes for training adapters: on a k-bit base model (QLoRA, arXiv 2305.14314) and under mixed precision."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .tuners.base_weight import HALF_DTYPES, quantized_weight, storage


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast: bool = True,
) -> Any:
    """Freeze `model`, keep all but its k-bit weights in fp32, and checkpoint its activations. Returns `model`.

    For bitsandbytes' 4- and 8-bit layers and those of `quantize_linear_layers`. A model without any is frozen and kept
    in fp32, but not checkpointed, as in peft. Call it before get_peft_model.

    use_gradient_checkpointing      with a reentrant checkpoint, the default as in peft, what the input embedding puts
                                    out is made to require grad: such a checkpoint passes gradients on only to inputs
                                    that want them. (peft's documents speak of the output embedding; it does this.)
    gradient_checkpointing_kwargs   go to torch.utils.checkpoint.checkpoint: {"use_reentrant": False}
    auto_clear_cache                give the memory of the 16-bit copies back to the device
    upcast                          False leaves norms, embeddings and head in 16 bits: the lean variant

    With fp32 norms and embeddings the residual stream is fp32, and so is most of what backward keeps. `upcast=False`
    keeps the dtype the model was loaded in, for models in bf16: fp16's range is too small for a residual stream. On a
    small NF4 Llama less than 0.80 of the bytes are kept for backward (0.75 of the few that checkpointing keeps), and
    over 15 steps the loss stays within 2e-3 of the fp32 stream's (tests/api/test_kbit.py holds both). Norms take their
    sums in fp32 either way.

    One parameter is cast at a time, tied weights stay tied, and bytes that lie in a 16-bit tensor (`quant_storage`) are
    no 16-bit weights: they stay. Raises ValueError where inputs must be made to require grad and the model does not say
    which of its modules embeds them; nothing is changed then. Warns where adapters are there already: they are frozen.
    """
    options = {"use_reentrant": True} | (gradient_checkpointing_kwargs or {})
    kbit = [module for module in model.modules() if quantized_weight(module) is not None]
    checkpoint = bool(kbit) and use_gradient_checkpointing
    if checkpoint and not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            f"{type(model).__name__} cannot be checkpointed: it has no get_input_embeddings, as models of transformers "
            "have; pass use_gradient_checkpointing=False"
        )
    if any(hasattr(module, "adapter_layer_names") for module in model.modules()):
        warnings.warn("the model has adapters, which are frozen too: call this before get_peft_model", stacklevel=2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if upcast:
        stored = _stored_bytes(kbit)
        for parameter in model.parameters():
            if parameter.dtype in HALF_DTYPES and id(parameter) not in stored:
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if checkpoint:
        if options["use_reentrant"]:
            make_inputs_require_grad(model)
        _checkpoint_activations(model, options)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen in `model` to `dtype`, float16 or bfloat16, and what is trained to float32, in place.

    For training under torch.autocast with that dtype: weights that only get read take half the memory, weights that
    are stepped keep their precision (and torch.amp.GradScaler, which fp16 needs, refuses 16-bit gradients). Call it
    after get_peft_model. k-bit weights stay as they are; so do buffers, integers, and ties between weights. One tensor
    is cast at a time: no second copy of the model exists.
    Raises ValueError for any other dtype; nothing is cast then.
    """
    if dtype not in HALF_DTYPES:
        raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype!r}")
    stored = _stored_bytes(module for module in model.modules() if quantized_weight(module) is not None)
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in stored:
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to(parameter.dtype)


def _stored_bytes(kbit: Any) -> set[int]:
    """The ids of the parameters that hold these layers' codes, which may lie in a tensor of a float dtype."""
    return {id(storage(module)) for module in kbit}


def _checkpoint_activations(model: Any, options: dict[str, Any]) -> None:
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
