"""Starts of an adapter that look at the base weight, or change it: LoraConfig.init_lora_weights, one file a method.

A method takes the weight [N, K] in fp32 or wider, the rank and the scale, and gives a Start. The adapter gets its
factors at once; the base weight is written to when the whole model is ready (transaction.at_end), so that an error in
some layer, or in a file that is being loaded, leaves all of them as they were.
"""

import re
import warnings
from typing import Any

import torch
from torch import Tensor

from peft_fast.quant.weight import QuantizedWeight
from peft_fast.transaction import at_end
from peft_fast.tuners.base_weight import can_hold, check_writable
from peft_fast.tuners.offload import onloaded

from .corda import corda
from .loftq import loftq
from .lora_ga import GRADIENT, lora_ga
from .olora import olora
from .orthogonal import orthogonal
from .pissa import pissa, pissa_niter
from .start import Change, Start, rows_in_full

NAMES = ("pissa", "pissa_niter_<0 to 999>", "olora", "orthogonal", "loftq", "corda", "lora_ga", "eva")
SLOW = re.compile("pissa|olora|loftq|lora_ga")  # a decomposition a layer: worth a progress bar
NITER = re.compile(r"pissa_niter_(\d{1,3})")  # a config from elsewhere may not ask for endless work


def method_of(init: Any) -> str | None:
    """The name of the start that `init_lora_weights` asks for, None for the plain ones. Raises ValueError for one that
    is none."""
    if isinstance(init, bool) or (isinstance(init, str) and init.lower() == "gaussian"):
        return None
    if isinstance(init, str):
        name = "olora" if init.lower() == "olora" else init
        if name in NAMES or NITER.fullmatch(name):
            return name
    raise ValueError(f"init_lora_weights must be True, False, 'gaussian' or one of {', '.join(NAMES)}, got {init!r}")


def changes_base(init: Any) -> bool:
    """Whether the base weight is written to."""
    return method_of(init) not in (None, "orthogonal", "eva")


def subtracts(init: Any) -> bool:
    """Whether the base weight loses what the adapter starts with."""
    return changes_base(init) and init != "loftq"


@torch.no_grad()
def begin(layer: Any, adapter_name: str, config: Any) -> Start | None:
    """Give the adapter the factors that its config asks for; None where these are the plain ones.

    Raises ValueError for a layer or a weight that the method is not for. What the base weight loses is written at the
    end of the change to the model.
    """
    name = method_of(config.init_lora_weights)
    if name is None:
        layer.reset_lora_parameters(adapter_name, config.init_lora_weights)
        return None
    if name == "eva":
        _before_eva(layer, adapter_name)
        return None
    _check(layer, name)
    A, B = layer.factors(adapter_name)
    if A.weight.is_meta and not changes_base(name):  # a file will be loaded over them
        return None
    if name == "lora_ga" and not hasattr(layer.get_base_layer(), GRADIENT):
        _plainly(layer, adapter_name)
        return None
    with onloaded(layer.get_base_layer()), torch.device("cpu"):
        start = _made(layer, name, adapter_name, config)
    if not A.weight.is_meta:
        for module, values in ((A, start.A), (B, start.B)):
            module.weight.data = values.to(module.weight.device).contiguous()
    if start.changes_base:
        change = Change(layer, start, layer.scaling[adapter_name])
        at_end(change.write, change.undo)
    return start


def warn_of_chance(init: Any) -> None:
    """Of a file whose adapter goes with base weights that lack what chance has drawn."""
    if NITER.fullmatch(str(init)):
        warnings.warn(
            f"init_lora_weights={init!r} draws at random what it takes out of the base weights: they lose other "
            "values now than before training, and outputs differ. Save such adapters with "
            "path_initial_model_for_weight_conversion, and they load exactly",
            stacklevel=4,
        )


def _before_eva(layer: Any, adapter_name: str) -> None:
    """B is zero; A is as its module draws it, until initialize_lora_eva_weights. Layers that EVA is not for start
    plainly."""
    if not layer.starts_from_weight:
        layer.reset_lora_parameters(adapter_name, True)
        return
    torch.nn.init.zeros_(layer.lora_B[adapter_name].weight)


def _plainly(layer: Any, adapter_name: str) -> None:
    """LoRA-GA without a gradient: when a file is loaded, or by mistake."""
    warnings.warn(
        "init_lora_weights='lora_ga' starts from gradients, and preprocess_loraga has left none at these layers: the "
        "adapter starts plainly, and nothing is taken out of the base weights. If a file is loaded now, it has to be "
        "one that was saved with path_initial_model_for_weight_conversion",
        stacklevel=2,
    )
    if not layer.lora_A[adapter_name].weight.is_meta:
        layer.reset_lora_parameters(adapter_name, True)


def unround(layer: Any, adapter_name: str, start: Start) -> None:
    """Of an adapter around a 16-bit layer whose weights were made fp32: with the bits that 16 could not hold."""
    for module, values in zip(layer.factors(adapter_name), (start.A, start.B)):
        weight = module.weight
        if weight.dtype == torch.float32 and not weight.is_meta:
            weight.data.copy_(values)


def _made(layer: Any, name: str, adapter_name: str, config: Any) -> Start:
    weight = rows_in_full(layer)
    home, r, scale = weight.device, layer.r[adapter_name], layer.scaling[adapter_name]
    _check_numbers(weight, name, r, scale)
    if layer.ephemeral_gpu_offload and home.type == "cpu":
        weight = weight.to(torch.accelerator.current_accelerator(check_available=True) or home)
    if name == "loftq":
        start = loftq(weight, r, scale, config.loftq_config)
    elif name == "corda":
        start = corda(layer.get_base_layer(), weight, r, scale)
    elif name == "lora_ga":
        start = lora_ga(layer.get_base_layer(), weight, r, scale, config.lora_ga_config, bool(layer.out_dim))
    elif niter := NITER.fullmatch(name):
        start = pissa_niter(weight, r, scale, int(niter[1]))
    else:
        start = {"pissa": pissa, "olora": olora, "orthogonal": orthogonal}[name](weight, r, scale)
    start = Start(start.A.to(home), start.B.to(home), start.subtracted, start.replaced and start.replaced.to(home))
    _check_result(layer, name, start, scale)
    return start


def _check(layer: Any, name: str) -> None:
    if not layer.starts_from_weight:
        raise ValueError(
            f"init_lora_weights={name!r} is for linear layers, and this is LoRA around a "
            f"{type(layer.get_base_layer()).__name__}: leave it out of the targets, or give it an adapter of its own"
        )
    if name == "loftq" and isinstance(layer.base_weight(), QuantizedWeight):
        raise ValueError(
            "init_lora_weights='loftq' quantises the base weight itself, and this one has few bits already: load the "
            "model unquantised, or use the default start and then replace_lora_weights_loftq"
        )
    if changes_base(name):
        check_writable(layer.get_base_layer(), layer.weight_name)
    if layer.merged and changes_base(name):
        raise ValueError(
            f"init_lora_weights={name!r} changes the base weights, and adapters {layer.merged_adapters} are merged "
            "into them: call unmerge_adapter first"
        )


def _check_numbers(weight: Tensor, name: str, r: int, scale: float) -> None:
    if weight.is_meta:
        raise ValueError(f"init_lora_weights={name!r} reads the base weight, and that is on the meta device: load it")
    if not bool(torch.stack(weight.aminmax()).isfinite().all()):  # isfinite() of the weight takes more than its memory
        raise ValueError(f"init_lora_weights={name!r} decomposes the base weight, and that holds inf or NaN")
    if name != "orthogonal" and r > min(weight.shape):
        raise ValueError(
            f"init_lora_weights={name!r} needs a rank of at most {min(weight.shape)} for a weight of "
            f"{tuple(weight.shape)}, got {r}: give this layer another with rank_pattern"
        )
    if name.startswith("pissa") and scale <= 0:
        raise ValueError(f"init_lora_weights={name!r} needs a scale above 0, got {scale}: see lora_alpha")


def _check_result(layer: Any, name: str, start: Start, scale: float) -> None:
    fits = bool(start.A.isfinite().all()) and bool(start.B.isfinite().all())
    weight = layer.base_weight()
    if fits and start.subtracted and (isinstance(weight, QuantizedWeight) or weight.dtype == torch.float16):
        rows = rows_in_full(layer)  # of these a copy; other dtypes reach as far as fp32
        start.take_from(rows, scale)
        fits = can_hold(layer.get_base_layer(), rows.t() if layer.out_dim else rows)
    if not fits:
        raise ValueError(f"init_lora_weights={name!r} gives values that the base weight's dtype cannot hold")


__all__ = [
    "NAMES",
    "SLOW",
    "Start",
    "begin",
    "changes_base",
    "method_of",
    "rows_in_full",
    "subtracts",
    "unround",
    "warn_of_chance",
]
