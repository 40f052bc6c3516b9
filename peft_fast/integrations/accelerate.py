"""accelerate(model): the layers of a model that real peft made on our ops, in place; restore(model) takes that back."""

from typing import Any

from torch import nn

from peft_fast.explain import Explanation, explain
from peft_fast.quant import bitsandbytes
from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.lora.groups import group_siblings, ungroup_siblings
from peft_fast.tuners.lora.mlp import fuse_mlps, restore_mlps
from peft_fast.tuners.lora.norms import restore_norms

from .peft_layers import Accelerated, accelerated_class, is_peft_layer

UNPACKED = "peft_fast_kept_unpacked"  # on a layer: see quant/bitsandbytes.py's stop_repacking


def accelerate(model: nn.Module) -> Explanation:
    """Have the LoRA layers of an existing peft model compute by peft_fast's ops, in place, until `restore`.

    `model`: a `peft.PeftModel`, or anything around it or with peft's layers in it (DDP, a model after
    `inject_adapter_in_model`); before or after the optimizer was made. Covered are peft's LoRA on nn.Linear,
    transformers' Conv1D, nn.Embedding, and bitsandbytes' Linear4bit and Linear8bitLt, with any number of active
    adapters; q, k and v run as one op, and so do gated MLPs, where all of their layers can (see `explain`). Other
    layers, and calls that our ops do not cover (DoRA and other variants, `adapter_names`, merged adapters, hooks on
    lora_A, sharded weights), are peft's own as before.

    Nothing but speed, memory, rounding and the random stream of dropout changes: parameters are the same objects under
    the same names, and saving, loading, merging, switching and adding adapters is peft's code. Adapters that reach
    further layers later: call it again. A pickle of the model needs peft_fast: restore first for one that does not.

    Returns what `explain(model)` prints: per layer its route, "peft" where it stays as it was, and the reason. Raises
    TypeError for what is no module, ValueError for a model without layers of peft's.
    """
    _check(model)
    module: Any
    for module in model.modules():
        if is_peft_layer(module) and not isinstance(module, Accelerated):
            original: Any = type(module)
            if (cls := accelerated_class(original)) is not None:
                _become(module, cls)
                if bitsandbytes.stop_repacking(module.get_base_layer()):
                    vars(module)[UNPACKED] = True
    fuse_mlps(model)
    group_siblings(model)
    return explain(model, show=False)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module has the class, the attributes and the hooks that it had. Weights stay as trained.

    Also for what is left of such a model after `unload` or `merge_and_unload`. A model that was not accelerated stays
    as it is. Raises TypeError for what is no module, ValueError for a model with peft_fast's own layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got a {type(model).__name__}")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("this model's layers are peft_fast's own: model.unload() removes them")
    restore_mlps(model)
    restore_norms(model)
    ungroup_siblings(model)
    for module in model.modules():
        if isinstance(module, Accelerated):
            _restore_layer(module)


def _restore_layer(layer: Any) -> None:
    if vars(layer).pop(UNPACKED, False):
        bitsandbytes.allow_repacking(layer.get_base_layer())
    for name in ("group", "backend"):
        vars(layer).pop(name, None)
    _become(layer, layer.original_class)


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module with peft's layers in it, got a {type(model).__name__}")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model's layers are peft_fast's own already: accelerate is for models that real peft made")
    if not any(is_peft_layer(module) for module in model.modules()):
        raise ValueError(
            "the model has no adapter layers of peft's: call peft.get_peft_model(model, config) first, or "
            "peft_fast.get_peft_model, whose layers need no accelerating"
        )


def _become(module: Any, cls: type) -> None:
    module.__class__ = cls
