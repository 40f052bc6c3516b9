"""Kinds of damage to an adapter's folder, each with its cases.

A kind is a generator of (label, expectation, change): `change(folder, marker)` damages a good adapter (rank 4, q_proj
and v_proj of a Llama of two layers, width 64) in place. Code that a file would run creates `marker`. Expected is
REFUSED, LOADS (and what it says in a warning, where something is lost), or EITHER where chance decides.
"""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
REFUSED, LOADS, EITHER = "refused", "loads", "either"
PLACE = "base_model.model.model.layers.0.self_attn.q_proj"
Case = tuple[str, str, Callable[[Path, Path], Any]]
KINDS: dict[str, Callable[[Random], Iterator[Case]]] = {}


def kind(function: Callable[[Random], Iterator[Case]]) -> Callable[[Random], Iterator[Case]]:
    KINDS[function.__name__] = function
    return function


def tensors_of(folder: Path) -> dict[str, Any]:
    return load_file(folder / WEIGHTS)


def set_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def config(**values: Any) -> Callable[[Path, Path], Any]:
    return lambda folder, marker: set_config(folder, **values)


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], Any]:
    """`change` edits the dict of tensors, or returns another."""

    def damage(folder: Path, marker: Path) -> None:
        values = tensors_of(folder)
        save_file(change(values) or values, folder / WEIGHTS)

    return damage


def raw(content: bytes | Callable[[bytes], bytes], name: str = WEIGHTS) -> Callable[[Path, Path], Any]:
    def damage(folder: Path, marker: Path) -> None:
        path = folder / name
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return damage


def as_bin(make: Callable[[dict[str, Any], Path], Any], **options: Any) -> Callable[[Path, Path], Any]:
    """torch.save of what `make` makes of the tensors, in place of the safetensors."""

    def damage(folder: Path, marker: Path) -> None:
        values = tensors_of(folder)
        (folder / WEIGHTS).unlink()
        torch.save(make(values, marker), folder / BIN, **options)

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], Any]:
    """`change` edits the header of the safetensors, or returns what it is to be (bytes are taken as they are)."""

    def damage(folder: Path, marker: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        values = json.loads(content[8 : 8 + length])
        new = change(values)
        text = new if isinstance(new, bytes) else json.dumps(values if new is None else new).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return damage


def flipped(start: int, end: int, count: int, seed: int) -> Callable[[bytes], bytes]:
    """Some bytes from start to end (from the end, where negative) are others."""

    def change(content: bytes) -> bytes:
        rng, new = Random(seed), bytearray(content)
        for _ in range(count):
            at = rng.randrange(start % len(new), end if end > 0 else len(new) + end)
            new[at] ^= rng.randrange(1, 256)
        return bytes(new)

    return change
