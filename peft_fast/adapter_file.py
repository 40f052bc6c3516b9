"""The file of an adapter's tensors: adapter_model.safetensors, or the .bin of older versions.

Whatever is in the file, reading it runs no code, and what comes back are plain tensors by name.
"""

import os
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import locate

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
PREFIX = "base_model.model."  # where a PeftModel has the user's model: of every key in a file
# What torch.load raises for files that are cut, garbled or no pickle at all.
UNREADABLE = (
    UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    AssertionError, ImportError, MemoryError, RecursionError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub_arguments: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file (safetensors, or an old .bin without code in it) on `device`, default the CPU.

    `key_mapping`: {regular expression: replacement}, the first that fits a key is applied to it; keys are without their
    "base_model.model." for that. `hub_arguments` (revision, token, subfolder, ...) go to hf_hub_download.
    Raises ValueError for a broken file, a device that is not there, or a mapping that gives one name to two tensors.
    """
    place = _checked_device(device)
    tensors = _read(model_id, hub_arguments)
    if key_mapping:
        tensors = mapped_keys(tensors, key_mapping)
    return tensors if place.type == "cpu" else {key: value.to(place) for key, value in tensors.items()}


def _checked_device(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(0, device=place)  # how each backend says that it is not here differs: four kinds of error
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"the device must be one of this machine, got {device!r}: {error}") from error
    if place.type == "meta":
        raise ValueError(
            "the device must hold values, got 'meta': low_cpu_mem_usage=True is for loading without copies"
        )
    return place


def _read(model_id: str | os.PathLike[str], hub_arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    unreachable: ValueError | None = None
    try:
        path = locate(model_id, SAFETENSORS_WEIGHTS_NAME, **hub_arguments)
    except ValueError as error:  # offline nobody can tell a file that is not there from one that was not downloaded
        path, unreachable = None, error
    if path:
        return _read_safetensors(path)
    try:
        path = locate(model_id, WEIGHTS_NAME, **hub_arguments)
    except ValueError as error:
        raise unreachable or error from error
    if path:
        return _read_bin(path)
    raise ValueError(f"Can't find {SAFETENSORS_WEIGHTS_NAME!r} or {WEIGHTS_NAME!r} at {str(model_id)!r}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, .safetensors or what torch.save wrote. Raises ValueError for one that is broken."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, *UNREADABLE) as error:
        raise ValueError(f"{path} cannot be read, it is damaged or truncated: {error}") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    _check_zip(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *UNREADABLE) as error:
        raise ValueError(
            f"{path} cannot be read, it is damaged or truncated, or a pickle that would run code, which is never "
            f"loaded: {error}"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ValueError(f"{path} must hold a dict of tensors by name, got a {type(loaded).__name__}")
    return loaded


def _check_zip(path: Path) -> None:
    """torch never compresses. A file that is compressed may be a thousand times its size in memory: it is refused."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read, it is damaged or truncated: {error}") from error
    if packed:
        raise ValueError(
            f"{path} cannot be read: its entries, such as {packed[0]!r}, are compressed, as torch's never are"
        )


def mapped_keys(tensors: Mapping[str, Any], key_mapping: Mapping[str, str]) -> dict[str, Any]:
    """`tensors` under the names that `key_mapping` gives: see load_peft_weights."""
    mapped: dict[str, Any] = {}
    for key, value in tensors.items():
        start = next((start for start in (PREFIX, "base_model.") if key.startswith(start)), "")
        rest = key.removeprefix(start)
        for pattern, replacement in key_mapping.items():
            try:
                changed, count = re.subn(pattern, replacement, rest)
            except (re.error, TypeError, IndexError) as error:
                raise ValueError(
                    "key_mapping must map regular expressions to their replacements, got "
                    f"{pattern!r}: {replacement!r}: {error}"
                ) from error
            if count:
                rest = changed
                break
        if start + rest in mapped:
            raise ValueError(f"key_mapping gives several tensors the name {start + rest!r}, one of them {key!r}")
        mapped[start + rest] = value
    return mapped


def ready_to_save(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory: what safetensors asks for."""
    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        tensor = tensor.detach().contiguous()
        ready[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(ready[key].untyped_storage().data_ptr())
    return ready


def is_plain(value: Any) -> bool:
    """Whether this is a tensor with values of its own in the usual layout: a .bin can hold others."""
    return type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta


def fits(value: Any, own: Tensor) -> bool:
    if not is_plain(value) or value.shape != own.shape:
        return False
    return value.is_floating_point() == own.is_floating_point() and not value.is_complex()


def described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = "" if is_plain(value) else f" on {value.device}, a {type(value).__name__} in {value.layout}"
    return f"{tuple(value.shape)} {value.dtype}{kind}"
