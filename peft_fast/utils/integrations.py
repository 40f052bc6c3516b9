"""Names of peft.utils.integrations."""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from peft_fast import ops
from peft_fast.quant import bitsandbytes
from peft_fast.tuners.base_weight import quantized_weight


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers runs under DeepSpeed's ZeRO-3, which shards parameters."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Within the block sharded parameters are whole, under ZeRO-3; else it does nothing. For the arguments see
    deepspeed.zero.GatheredParameters."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    zero = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


def dequantize_module_weight(module: Any) -> Tensor:
    """The weight of a layer in floating point: itself where it is dense, a new tensor where it has few bits.

    bitsandbytes', our own, HQQ's and torchao's layers. Raises TypeError for a module without a weight.
    """
    if hasattr(module, "W_q"):  # HQQ
        return module.dequantize()
    quantized = quantized_weight(module)
    if quantized is not None:
        return ops.dequantize(quantized)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"the module must have a tensor as its weight, got {type(weight).__name__}")
    return weight.dequantize() if type(weight).__module__.startswith("torchao.") else weight


def dequantize_bnb_weight(weight: nn.Parameter, state: Any = None) -> Tensor:
    """bitsandbytes' Params4bit or Int8Params in floating point. `state`: of the Linear8bitLt that the latter is of.

    Raises ValueError for 8 bits without a state.
    """
    if get_bnb_param_type(weight) == "8bit" and state is None:
        raise ValueError("the scales of an 8-bit weight are at its layer: pass state=layer.state")
    return ops.dequantize(bitsandbytes.read_parameter(weight, state))


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """Whether bitsandbytes keeps this parameter, and in how many bits."""
    kinds: dict[str, Literal["4bit", "8bit"]] = {"Params4bit": "4bit", "Int8Params": "8bit"}
    return kinds.get(type(param).__name__, False)


def get_layer_device_map(model: Any) -> dict[int, Any] | None:
    """{index of a layer: the device that it computes on} of a model that accelerate has spread (hf_device_map).

    What is offloaded computes on the first device that is not. Raises RuntimeError for a layer that is nowhere.
    """
    devices = dict(model.hf_device_map)
    main = next(device for device in devices.values() if device not in ("cpu", "disk"))
    devices = {path: main if device in ("cpu", "disk") else device for path, device in devices.items()}
    found = {}
    for index in range(model.config.num_hidden_layers):
        mine = [device for path, device in devices.items() if f".{index}." in f"{path}."]
        if not mine and list(devices) != [""]:
            raise RuntimeError(f"layer {index} has no device in hf_device_map: {model.hf_device_map}")
        found[index] = mine[0] if mine else devices[""]
    return found


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Move the keys and values of each layer to where accelerate has put the layer."""
    from transformers import Cache, EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache) or not hasattr(model, "hf_device_map"):
        return
    for index, device in (get_layer_device_map(model) or {}).items():
        layer: Any = cache.layers[index]
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


__all__ = [
    "check_deepspeed_zero3_enabled",
    "dequantize_bnb_weight",
    "dequantize_module_weight",
    "gather_params_ctx",
    "get_bnb_param_type",
    "get_layer_device_map",
    "map_cache_to_layer_device_map",
]
