"""Damage to adapter_model.bin, a pickle: code, other things than tensors, and files that grow when they are read."""

import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from damage import BIN, LOADS, PLACE, REFUSED, WEIGHTS, Case, as_bin, config, kind


class Runs:
    """Unpickling this calls a function with these arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@kind
def code_in_pickles(rng: Random) -> Iterator[Case]:
    calls: dict[str, Callable[[Path], Any]] = {
        "system": lambda marker: Runs(os.system, f"touch {marker}"),
        "exec": lambda marker: Runs(exec, f"open({str(marker)!r}, 'w')"),
        "eval": lambda marker: Runs(eval, f"open({str(marker)!r}, 'w')"),
        "open": lambda marker: Runs(open, str(marker), "w"),
        "popen": lambda marker: Runs(os.popen, f"touch {marker}"),
        "run": lambda marker: Runs(subprocess.check_output, ["touch", str(marker)]),
        "import": lambda marker: Runs(__import__, "antigravity"),
        "mkdir": lambda marker: Runs(os.mkdir, str(marker)),
        "torch.save": lambda marker: Runs(torch.save, 1, str(marker)),
        "torch.load": lambda marker: Runs(torch.load, str(marker)),
        "getattr": lambda marker: Runs(getattr, "x", "upper"),
    }
    for name, make in calls.items():
        for new in (True, False):
            options = {"_use_new_zipfile_serialization": new}
            yield f"{name}_{new}", REFUSED, as_bin(lambda values, marker, make=make: make(marker), **options)
            yield (
                f"in_{name}_{new}",
                REFUSED,
                as_bin(lambda values, marker, make=make: {**values, "x": make(marker)}, **options),
            )

        def plain(folder: Path, marker: Path, make: Any = make) -> None:
            (folder / WEIGHTS).unlink()
            (folder / BIN).write_bytes(pickle.dumps(make(marker)))

        yield f"{name}_plain", REFUSED, plain


@kind
def pickles_of_other_things(rng: Random) -> Iterator[Case]:
    key = f"{PLACE}.lora_A.weight"
    for name, value in {
        "list": [torch.ones(2)], "none": None, "number": 3, "text": "x", "set": {1}, "empty": {},
        "keys": {1: torch.ones(2)}, "tensor": torch.ones(2), "nested": {"state_dict": {"x": torch.ones(2)}},
        "bytes": b"x",
    }.items():  # fmt: skip
        yield name, REFUSED, as_bin(lambda values, marker, value=value: value)
    yield "module", REFUSED, as_bin(lambda values, marker: torch.nn.Linear(1, 1))
    for name, value in {
        "number in it": 3, "text in it": "x", "none in it": None, "list in it": [1.0] * 4, "dict in it": {},
        "sparse": torch.ones(4, 64).to_sparse(), "csr": torch.ones(4, 64).to_sparse_csr(),
        "meta": torch.ones(4, 64, device="meta"), "size": torch.Size([4, 64]), "dtype": torch.float32,
    }.items():  # fmt: skip
        yield name, REFUSED, as_bin(lambda values, marker, value=value: {**values, key: value})
    yield "expanded", LOADS, as_bin(lambda values, marker: {**values, key: torch.ones(1, 1).expand(4, 64)})
    yield "shared", LOADS, as_bin(lambda values, marker: {k: v[:0].new_zeros(1).expand(v.shape) for k, v in
                                                          values.items()})  # fmt: skip
    yield "parameters", LOADS, as_bin(lambda values, marker: {k: torch.nn.Parameter(v) for k, v in values.items()})
    yield "transposed views", LOADS, as_bin(lambda values, marker: {k: v.T.contiguous().T for k, v in values.items()})


@kind
def bombs(rng: Random) -> Iterator[Case]:
    """Small files that ask for much memory."""

    def packed(folder: Path, marker: Path, level: int, size: int) -> None:
        as_bin(lambda values, marker: values)(folder, marker)
        path, out = folder / BIN, io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as new:
            for entry in old.infolist():
                content = old.read(entry)
                new.writestr(entry.filename, content + bytes(size if "/data/" in entry.filename else 0))
        path.write_bytes(out.getvalue())

    for level in (1, 9):
        for size in (0, 10_000_000):
            yield f"zip {level} {size}", REFUSED, lambda f, m, level=level, size=size: packed(f, m, level, size)
    for rank in (10**6, 10**9, 2**40, 2**63, 10**30):
        yield f"r={rank}", REFUSED, config(r=rank)
        yield f"rank_pattern {rank}", REFUSED, config(rank_pattern={"q_proj": rank})
    yield "long list", REFUSED, config(target_modules=["zzz"] * 300_000)
