"""preprocess_loraga: the gradients that LoRA-GA (arXiv 2407.05000) starts from, before get_peft_model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import in_mode, is_there, linear_targets, read_tensors, write_tensors
from .config import LoraConfig
from .initialisation.lora_ga import GRADIENT


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Leave at each dense linear layer that `lora_config` names the gradient of its weight, the mean over the backward
    passes of `train_step`, for init_lora_weights="lora_ga".

    train_step: runs forward and backward of the model over some batches, without an optimiser's step. Only the layers'
      weights get gradients meanwhile; what is trainable, gradients that are there, and training or eval mode are as
      they were afterwards. cache_file: where gradients are kept, and taken from where it is there.
    Raises ValueError for a config without lora_ga_config, and for k-bit layers, whose weights have no gradient.
    """
    if lora_config.lora_ga_config is None:
        raise ValueError("preprocess_loraga needs a config with lora_ga_config=LoraGAConfig(...)")
    layers = linear_targets(model, lora_config)
    if is_there(cache_file):
        assert cache_file is not None
        names = [f"{path}.{GRADIENT}" for path in layers]
        cached = read_tensors(cache_file, names, next(model.parameters()).device)
        gradients = {path: cached[f"{path}.{GRADIENT}"] for path in layers}
    else:
        gradients = _estimated(model, layers, train_step)
        if cache_file is not None:
            write_tensors(cache_file, {f"{path}.{GRADIENT}": gradient for path, gradient in gradients.items()})
    for path, gradient in gradients.items():
        setattr(layers[path], GRADIENT, gradient)


def _estimated(model: nn.Module, layers: dict[str, Any], train_step: Callable[[], Any]) -> dict[str, Tensor]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = {path: layer.weight for path, layer in layers.items()}
    before = {path: weight.grad for path, weight in weights.items()}
    counts = dict.fromkeys(layers, 0)
    handles = [layer.register_full_backward_hook(partial(_count, path, counts)) for path, layer in layers.items()]
    try:
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        with torch.enable_grad(), in_mode(model, True):
            train_step()
        gradients = {path: weights[path].grad for path in layers if counts[path]}
        idle = [path for path in layers if gradients.get(path) is None]
        if idle:
            raise ValueError(f"train_step gave {len(idle)} of the layers no gradient, such as {idle[0]}: exclude them")
        return {path: gradient.detach() / counts[path] for path, gradient in gradients.items()}
    finally:
        for handle in handles:
            handle.remove()
        for path, weight in weights.items():
            weight.grad = before[path]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _count(path: str, counts: dict[str, int], layer: Any, grad_input: Any, grad_output: Any) -> None:
    counts[path] += 1
