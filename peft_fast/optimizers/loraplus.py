"""LoRA+ (arXiv 2402.12354): B learns faster than A."""

import math
import sys
from typing import Any

from torch import nn
from torch.optim import Optimizer

from peft_fast.tuners.lora.embedding import Embedding

OF_8_BITS = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")  # bitsandbytes' optimisers


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser of `optimizer_cls` over the trainable parameters of `model`, in four groups: A's and all others with
    `lr`; adapters of embeddings with `loraplus_lr_embedding` (default 1e-6); B's with lr * loraplus_lr_ratio; biases
    and other vectors likewise and without weight decay.

    `loraplus_lr_ratio` is at least 1, the larger the harder the task is for the model; `lr` is then about half of what
    it would be with LoRA. `loraplus_weight_decay` (default 0): of the first three groups. Other keywords go to
    `optimizer_cls`. bitsandbytes' 8-bit optimisers keep 32 bits for embeddings.
    Raises ValueError for rates that are no positive numbers, and for a model in which nothing is trained.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    rate_of_embeddings = kwargs.pop("loraplus_lr_embedding", 1e-6)
    rates = {"lr": lr, "loraplus_lr_ratio": loraplus_lr_ratio, "loraplus_lr_embedding": rate_of_embeddings}
    for name, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    groups = _groups(model)
    if not any(groups.values()):
        raise ValueError("the model has no trainable parameters: see print_trainable_parameters and set_adapter")
    fast = lr * loraplus_lr_ratio
    optimizer = optimizer_cls(
        [
            {"params": groups["A"], "weight_decay": decay, "lr": lr},
            {"params": groups["embedding"], "weight_decay": decay, "lr": rate_of_embeddings},
            {"params": groups["B"], "weight_decay": decay, "lr": fast},
            {"params": groups["vectors"], "weight_decay": 0.0, "lr": fast},
        ],
        lr=lr,  # type: ignore[call-arg]
        **kwargs,
    )
    if optimizer_cls.__name__ in OF_8_BITS:
        manager: Any = sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS  # takes seconds to import
    from transformers.trainer_pt_utils import get_parameter_names

    decaying = {name for name in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    modules = dict(model.named_modules())
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        holder = modules.get(".".join(name.split(".")[:-2]))  # of <layer>.lora_embedding_A.<adapter>
        if isinstance(holder, Embedding):
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.dim() == 1:
            groups["B" if name in decaying else "vectors"].append(parameter)
        else:
            groups["A"].append(parameter)
    return groups
