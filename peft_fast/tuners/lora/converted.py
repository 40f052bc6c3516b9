"""Adapters of other methods as plain LoRA: the best factors for what they add to the weights.

delta = U S V^T,   B = U_r S_r,   A = V_r^T,   scale 1
"""

import os
import warnings
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_fast.adapter_file import PREFIX
from peft_fast.peft_types import PeftType
from peft_fast.saving import write_adapter
from peft_fast.tuners.base_weight import is_conv1d
from peft_fast.tuners.layer import BaseTunerLayer, holders_in
from peft_fast.tuners.matching import adaptable_paths, shortest
from peft_fast.tuners.modules_to_save import ModulesToSaveWrapper

from .config import LoraConfig
from .initialisation import rows_in_full
from .initialisation.largest import largest_singular


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(config, state dict) of a plain LoRA adapter that adds what the model's adapter `adapter_name` adds, or as much
    of it as the rank allows; the model stays as it is.

    rank: of every layer, or as a float above 0 and up to 1 the share of the squared singular values that each layer has
      to keep, with as many ranks as that takes. compile_kwargs: for torch.compile of a layer's decomposition.
    For the linear layers of LoRA, LoHa, LoKr, VeRA, RandLoRA and FourierFT, on k-bit bases too, and the convolutions of
    the first three. modules_to_save comes along. DoRA's magnitudes are part of what is added.
    Raises TypeError for layers that add no such thing, ValueError for ranks, biases, and an adapter that is not there.
    """
    _check_rank(rank)
    layers = _layers(model, adapter_name)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    _check_config(config)
    factors: Callable[..., Any] = _factors if compile_kwargs is None else torch.compile(_factors, **compile_kwargs)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in tqdm(layers.items(), desc="converting", unit="layer", disable=not progressbar):
        A, B = factors(_delta(layer, adapter_name), rank)
        dtype = layer.adapter_parameters(adapter_name)[0].dtype
        kernel = () if is_conv1d(layer.get_base_layer()) else layer.weight.shape[2:]
        A = A.view(len(A), -1, *kernel)
        tensors[f"{name}.lora_A.weight"] = A.to(dtype).contiguous()
        tensors[f"{name}.lora_B.weight"] = B.view(*B.shape, *(1 for _ in kernel)).to(dtype).contiguous()
        ranks[name.removeprefix(PREFIX)] = len(A)
    return _config(model, config, layers, ranks, rank), tensors | _whole_modules(model, adapter_name)


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write what convert_to_lora gives into the folder `path`, as an adapter that PeftModel.from_pretrained loads. The
    folder is made if need be; what is in it is replaced as a whole or not at all. Raises as convert_to_lora does."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    write_adapter(Path(path), _base(model), config, tensors, safe=True)


def _base(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_rank(rank: Any) -> None:
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(f"a rank that is a float is a share of the energy, above 0 and up to 1, got {rank}")
    elif isinstance(rank, bool) or not isinstance(rank, Integral) or int(rank) < 1:
        raise ValueError(f"rank must be a positive integer or a float above 0 and up to 1, got {rank!r}")


def _layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    adapted = [(path, holder) for path, holder in holders_in(model) if isinstance(holder, BaseTunerLayer)]
    layers = {path: layer for path, layer in adapted if layer.has_adapter(adapter_name)}
    if not layers:
        known = sorted({name for _, layer in adapted for name in layer.available_adapters()})
        if known:
            raise ValueError(f"adapter {adapter_name!r} does not exist: there are {known}")
        raise TypeError("convert_to_lora needs a model with adapters that can be converted, and this one has none")
    foreign = {path: layer for path, layer in layers.items() if not layer.supports_lora_conversion(adapter_name)}
    if foreign:
        path, layer = next(iter(foreign.items()))
        raise TypeError(
            f"{path} ({layer!r:.40}...) cannot be converted to LoRA, {len(foreign)} layers in all: only what is added "
            "to the weights of linear layers and plain convolutions can"
        )
    return layers


def _check_config(config: Any) -> None:
    if config is None:
        return
    if config.peft_type == PeftType.LORA:
        warnings.warn("the adapter is LoRA already: converting it can only change its rank", stacklevel=3)
    bias, own = getattr(config, "bias", "none"), getattr(config, "lora_bias", False)
    if bias != "none" or own:
        raise ValueError(f"biases cannot be converted, and the adapter's config has bias={bias!r}, lora_bias={own}")


def _delta(layer: Any, adapter_name: str) -> Tensor:
    """[N, K] in fp32 or wider; of a convolution K is the patch."""
    if adapter_name not in getattr(layer, "lora_magnitude_vector", ()):
        delta = layer.get_delta_weight(adapter_name)
    elif layer.merged:
        raise ValueError(f"adapters {layer.merged_adapters} with DoRA are merged: call unmerge_adapter first")
    else:
        rows = rows_in_full(layer)
        weight = rows.t() if layer.out_dim else rows.unflatten(1, (-1, *layer.weight.shape[2:]))
        delta = layer.shifted_weight(weight, [adapter_name], 1) - weight
    delta = delta.t() if is_conv1d(layer.get_base_layer()) else delta.flatten(1)
    return delta.to(torch.promote_types(delta.dtype, torch.float32))


def _factors(delta: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """(A [R, K], B [N, R])"""
    found = None if isinstance(rank, float) else largest_singular(delta, int(rank))
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False) if found is None else found
    r = _enough(S, rank) if isinstance(rank, float) else int(rank)
    if r > len(S):
        raise ValueError(f"rank must be at most {len(S)} for a weight of {tuple(delta.shape)}, got {r}")
    return Vh[:r], U[:, :r] * S[:r]


def _enough(S: Tensor, share: float) -> int:
    """How many of the singular values, from the largest on, have this share of the sum of their squares."""
    energy = S.square().cumsum(0)
    return min(int(torch.searchsorted(energy, share * energy[-1])) + 1, len(S))


def _config(model: Any, config: Any, layers: Mapping[str, Any], ranks: Mapping[str, int], rank: Any) -> LoraConfig:
    """For exactly these layers, each with its rank and a scale of 1."""
    r = int(rank) if not isinstance(rank, float) else max(ranks.values())
    others = {path: own for path, own in ranks.items() if own != r}
    made = LoraConfig(
        r=r, lora_alpha=r, rank_pattern=others, alpha_pattern=dict(others),
        target_modules=shortest(ranks.keys(), adaptable_paths(_base(model))),
        fan_in_fan_out=any(is_conv1d(layer.get_base_layer()) for layer in layers.values()),
        modules_to_save=list(getattr(config, "modules_to_save", None) or []) or None,
    )  # fmt: skip
    for option in ("base_model_name_or_path", "task_type", "revision"):
        setattr(made, option, getattr(config, option, None))
    return made


def _whole_modules(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, holder in holders_in(model):
        if isinstance(holder, ModulesToSaveWrapper):
            values = holder.state_dict()
            keys = holder.adapter_state_keys(adapter_name)
            found |= {f"{path}.{in_file}": values[in_model].clone() for in_file, in_model in keys.items()}
    return found
