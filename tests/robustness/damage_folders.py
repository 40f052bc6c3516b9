"""Folders in which other things are than the two files of an adapter."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from damage import BIN, CONFIG, LOADS, REFUSED, WEIGHTS, Case, kind
from damage_pickles import Runs


@kind
def no_regular_files(rng: Random) -> Iterator[Case]:
    def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path, Path], Any]:
        def damage(folder: Path, marker: Path) -> None:
            (folder / name).unlink()
            make(folder / name)

        return damage

    makers: dict[str, Callable[[Path], Any]] = {
        "absent": lambda path: None,
        "folder": lambda path: path.mkdir(),
        "pipe": lambda path: os.mkfifo(path),
        "dangling": lambda path: path.symlink_to("nowhere"),
        "loop": lambda path: path.symlink_to(path.name),
        "zeros": lambda path: path.symlink_to("/dev/zero"),
        "null": lambda path: path.symlink_to("/dev/null"),
        "text": lambda path: path.symlink_to("/etc/passwd"),
        "the folder": lambda path: path.symlink_to("."),
    }
    for name, make in makers.items():
        for file in (WEIGHTS, CONFIG):
            yield f"{name} {file}", REFUSED, instead(file, make)

    def linked(folder: Path, marker: Path) -> None:
        for name in (WEIGHTS, CONFIG):  # as in the Hub's cache
            (folder / "blobs").mkdir(exist_ok=True)
            (folder / name).rename(folder / "blobs" / name)
            (folder / name).symlink_to(f"blobs/{name}")

    yield "linked", LOADS, linked


@kind
def forged_notes_of_saves(rng: Random) -> Iterator[Case]:
    """What a killed save leaves, made by somebody else."""

    def note(text: bytes, tag: str = "1_1", **staged: bytes) -> Callable[[Path, Path], Any]:
        def damage(folder: Path, marker: Path) -> None:
            (folder / f".peft_fast_save.{tag}").write_bytes(text)
            for name, content in staged.items():
                (folder / f".adapter_{name}.{tag}.new").write_bytes(content)

        return damage

    for text in (b"", b"../x", b"/etc/passwd", b"\xff\xfe", b"README.md\n..\n.", b"x" * 10**6):
        yield f"{text[:12]!r}", LOADS, note(text)
    for made in ("mkdir", "mkfifo"):
        for name in (".peft_fast_save.1_1", ".adapter_config.json.1_1.new"):

            def odd(folder: Path, marker: Path, made: str = made, name: str = name) -> None:
                note(b"")(folder, marker) if name.endswith("new") else None
                getattr(os, made)(folder / name)

            yield f"{made} {name}", LOADS, odd
    yield "tag", LOADS, note(b"adapter_config.json", tag="*")
    yield "weights are gone", REFUSED, note(b"adapter_model.safetensors")
    yield "config is gone", REFUSED, note(b"adapter_config.json")
    yield "staged config", REFUSED, note(b"", **{"config.json": b"{"})
    yield "staged weights", REFUSED, note(b"", **{"model.safetensors": b"x"})
    yield "staged, no note", LOADS, lambda folder, marker: (folder / ".adapter_config.json.1_1.new").write_bytes(b"{")


@kind
def two_files_of_weights(rng: Random) -> Iterator[Case]:
    """The safetensors counts. A broken one is an error and no reason to look at the other."""

    def both(content: bytes | None, other: bytes) -> Callable[[Path, Path], Any]:
        def damage(folder: Path, marker: Path) -> None:
            (folder / BIN).write_bytes(other)
            if content is not None:
                (folder / WEIGHTS).write_bytes(content)

        return damage

    code = pickle.dumps(Runs(exec, "raise SystemExit"))
    yield "code beside good", LOADS, both(None, code)
    yield "noise beside good", LOADS, both(None, b"noise")
    yield "empty", REFUSED, both(b"", code)
    yield "noise", REFUSED, both(b"noise", code)
