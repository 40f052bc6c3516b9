"""LoftQ for a model that has few bits already: the factors from the difference to the unquantised checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_fast.quant.weight import QuantizedWeight

from .loftq import best_factors, warn_of_scale
from .start import rows_in_full

FILE = "model.safetensors"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set the adapter of every k-bit linear layer to the best factors for what quantisation took from its weight.

    One step of LoftQ (arXiv 2310.08659), with the layers as they are: the unquantised weights are read one by one from
    the base model's safetensors files. The adapter's scale should be 1, as in peft: lora_alpha = r.
    model_path: a model.safetensors file or the folder that it, or its shards, are in; by default the base model's own
      folder, or its place in the Hub's cache. Nothing is downloaded.
    callback(peft_model, name of the layer): called after each replacement, which is undone where it returns False.
    Raises ValueError (no k-bit layer, no such adapter, weights of another model) and FileNotFoundError. Adapters are
    then as they were, also where `callback` raises.
    """
    tuner = getattr(peft_model, "base_model", None)
    if tuner is None or not hasattr(tuner, "layers"):
        raise TypeError(f"peft_model must be a PeftModel, got {type(peft_model).__name__}")
    layers = {path: layer for path, layer in tuner.layers() if _is_kbit_linear(layer)}
    if not layers:
        raise ValueError("no k-bit linear layer has an adapter: LoftQ replaces the adapters of quantised models")
    layers = {path: layer for path, layer in layers.items() if adapter_name in layer.lora_A}
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} does not exist: there are {sorted(peft_model.peft_config)}")
    files = _Checkpoint(tuner.model, model_path)
    warn_of_scale(next((s for layer in layers.values() if (s := layer.scaling[adapter_name]) != 1), 1.0))
    before = {path: [f.weight.data.clone() for f in layer.factors(adapter_name)] for path, layer in layers.items()}
    try:
        for path, layer in tqdm(layers.items(), desc="LoftQ", unit="layer", disable=None, leave=False):
            _write(layer, adapter_name, _factors(layer, adapter_name, files, path))
            if callback is not None and not callback(peft_model, path):
                _write(layer, adapter_name, before[path])
    except BaseException:
        for path, layer in layers.items():
            _write(layer, adapter_name, before[path])
        raise


def _is_kbit_linear(layer: Any) -> bool:
    return getattr(layer, "starts_from_weight", False) and isinstance(layer.base_weight(), QuantizedWeight)


def _factors(layer: Any, adapter_name: str, files: "_Checkpoint", path: str) -> list[Tensor]:
    quantized = rows_in_full(layer)
    weight = files.read(f"{path}.weight").to(quantized)
    if getattr(getattr(layer.get_base_layer(), "source_cls", None), "__name__", "") == "Conv1D":
        weight = weight.t()
    if weight.shape != quantized.shape:
        raise ValueError(
            f"{path}.weight is {tuple(weight.shape)} in {files.folder} and {tuple(quantized.shape)} in the model: it "
            "must be the checkpoint that the model was quantised from"
        )
    return list(best_factors(weight - quantized, layer.r[adapter_name]))


def _write(layer: Any, adapter_name: str, values: list[Tensor]) -> None:
    for factor, value in zip(layer.factors(adapter_name), values):
        factor.weight.copy_(value)


class _Checkpoint:
    """The safetensors files of a model, read a tensor at a time."""

    def __init__(self, model: Any, path: str | Path | None) -> None:
        self.prefix = getattr(model, "base_model_prefix", "") or ""
        where = _folder_of(model) if path is None else Path(path)
        self.folder, name = (where.parent, where.name) if where.suffix == ".safetensors" else (where, FILE)
        index = self.folder / f"{name}.index.json"
        if (self.folder / name).is_file():
            with safe_open(self.folder / name, framework="pt") as file:
                self.places = dict.fromkeys(file.keys(), name)
        elif index.is_file():
            self.places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            raise FileNotFoundError(
                f"{self.folder} has neither {name} nor {index.name}: model_path must be the folder of the unquantised "
                "model, saved as safetensors"
            )

    def read(self, name: str) -> Tensor:
        key = name if name in self.places else name.removeprefix(f"{self.prefix}.")
        if key not in self.places:
            raise ValueError(f"{self.folder} has no tensor {name}: it must be the checkpoint of this very model")
        with safe_open(self.folder / self.places[key], framework="pt") as file:
            return file.get_tensor(key)


def _folder_of(model: Any) -> Path:
    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        raise ValueError("model_path is needed: the model does not say from which folder it was loaded")
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"the base model {name!r} is neither a folder nor in the Hub's cache: pass model_path"
        ) from error
