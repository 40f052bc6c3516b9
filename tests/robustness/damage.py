"""Kinds of damage to an adapter's folder, each with its cases.

A kind is a generator of (label, expectation, change): `change(folder, marker)` damages a good adapter (rank 4, q_proj and
v_proj of a Llama of two layers, width 64) in place. Code that a file would run creates `marker`. Expected is REFUSED,
LOADS (and what it says in a warning, where something is lost), or EITHER where chance decides.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
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


@kind
def cut_safetensors(rng: Random) -> Iterator[Case]:
    for share in sorted(rng.random() for _ in range(24)):
        yield f"{share:.3f}", REFUSED, raw(lambda content, share=share: content[: int(share * len(content))])
    for tail in (1, 2, 100):
        yield f"-{tail}", REFUSED, raw(lambda content, tail=tail: content[:-tail])
    yield "longer", REFUSED, raw(lambda content: content + b"\0" * 5)


@kind
def cut_bin(rng: Random) -> Iterator[Case]:
    for share in sorted(rng.random() * 0.99 for _ in range(20)):

        def damage(folder: Path, marker: Path, share: float = share) -> None:
            as_bin(lambda values, marker: values)(folder, marker)
            raw(lambda content: content[: int(share * len(content))], BIN)(folder, marker)

        yield f"{share:.3f}", REFUSED, damage


@kind
def flipped_header(rng: Random) -> Iterator[Case]:
    for seed in range(30):
        yield f"{seed}", EITHER, raw(flipped(0, 600, 1 + seed % 3, seed))


@kind
def flipped_values(rng: Random) -> Iterator[Case]:
    """A file has no checksum: peft loads these, and so do we."""
    for seed in range(10):
        yield f"{seed}", LOADS, raw(flipped(-4000, -1, 5, seed))


@kind
def flipped_bin(rng: Random) -> Iterator[Case]:
    for seed in range(30):

        def damage(folder: Path, marker: Path, seed: int = seed) -> None:
            as_bin(lambda values, marker: values, _use_new_zipfile_serialization=bool(seed % 2))(folder, marker)
            raw(flipped(0, 900, 1 + seed % 4, seed), BIN)(folder, marker)

        yield f"{seed}", EITHER, damage


@kind
def no_adapter_at_all(rng: Random) -> Iterator[Case]:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 134235048\n"
    pages = {"empty": b"", "lfs": pointer, "html": b"<html>404</html>", "zeros": bytes(4096), "ones": b"\xff" * 4096}
    pages |= {"short": b"\1", "zip": b"PK\3\4" + bytes(60), "gzip": b"\x1f\x8b" + bytes(60), "pickle": pickle.dumps({})}
    for name, content in pages.items():
        yield name, REFUSED, raw(content)
        if name == "pickle":
            continue

        def damage(folder: Path, marker: Path, content: bytes = content) -> None:
            (folder / WEIGHTS).unlink()
            (folder / BIN).write_bytes(content)

        yield f"{name}.bin", REFUSED, damage
    for seed in range(5):
        yield f"noise{seed}", REFUSED, raw(Random(seed).randbytes(3000))


@kind
def wrong_shapes(rng: Random) -> Iterator[Case]:
    key = f"{PLACE}.lora_A.weight"
    for shape in ((64, 4), (4, 63), (3, 64), (5, 64), (4, 64, 1), (256,), (1,), (), (0, 64), (4, 0), (1, 64), (4, 1)):
        yield f"{shape}", REFUSED, tensors(lambda values, shape=shape: values.update({key: torch.ones(shape)}))
    yield "swapped", REFUSED, tensors(
        lambda values: {k.replace("lora_A", "t").replace("lora_B", "lora_A").replace("t.", "lora_B."): v for k, v in
                        values.items()}
    )  # fmt: skip


@kind
def wrong_dtypes(rng: Random) -> Iterator[Case]:
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64):
        yield f"{dtype}", REFUSED, tensors(lambda values, dtype=dtype: {k: v.to(dtype) for k, v in values.items()})
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2):
        yield f"{dtype}", LOADS, tensors(lambda values, dtype=dtype: {k: v.to(dtype) for k, v in values.items()})


@kind
def missing_keys(rng: Random) -> Iterator[Case]:
    yield "all", REFUSED, tensors(lambda values: values.clear())
    for seed in range(12):

        def change(values: dict[str, Any], seed: int = seed) -> None:
            for key in Random(seed).sample(sorted(values), 1 + seed % 7):
                del values[key]

        yield f"{seed}", f"{LOADS}: the file lacks weights", tensors(change)


@kind
def foreign_keys(rng: Random) -> Iterator[Case]:
    """peft leaves them in the result, or, where a base weight has the name, writes them into the base model."""
    names = [
        f"{PLACE}.base_layer.weight", "base_model.model.model.layers.0.mlp.up_proj.weight", "base_model.model.lm_head.bias",
        "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "transformer.h.0.attn.c_attn.lora_A.weight",
        f"{PLACE}.lora_A.other.weight", f"{PLACE}.lora_C.weight", f"{PLACE}.lora_magnitude_vector", "prompt_embeddings",
        "module.base_model.model.model.norm.weight", f"{PLACE}.lora_A.weight.quant_state.bitsandbytes__nf4",
        f"{PLACE}.lora_A", PLACE, "weight", "lora_A.weight", "model.layers.0.self_attn.q_proj.lora_A.weight",
    ]  # fmt: skip
    for name in names:
        yield name, REFUSED, tensors(lambda values, name=name: values.update({name: torch.ones(4, 64)}))


@kind
def hostile_keys(rng: Random) -> Iterator[Case]:
    names = [
        "../x", "../../../../tmp/x", "/etc/passwd", "..", ".", "", "...", "\n", "a b", "base_model.model.__class__",
        f"{PLACE}.__dict__", f"{PLACE}.lora_A.__class__.weight", f"{PLACE}.lora_A.forward", "base_model.forward",
        f"{PLACE}..lora_A..weight", f".{PLACE}.lora_A.weight", f"{PLACE}.lora_A.weight.", "x" * 100_000, "é\u202e\U0001f600",
        "; rm -rf /", "$(touch x)", "%s%n", "{0.__class__}", "base_model.model.peft_config", "CON",
    ]  # fmt: skip
    for index, name in enumerate(names):
        label = f"{index}_{name[:20]!r}"
        yield label, REFUSED, tensors(lambda values, name=name: values.update({name: torch.ones(2)}))
        if index % 3 == 0:
            yield f"{label}_alone", REFUSED, tensors(lambda values, name=name: {name: torch.ones(2)})


@kind
def a_weight_twice(rng: Random) -> Iterator[Case]:
    for older in ("lora_A.default.weight", "lora_B.default.weight"):

        def change(values: dict[str, Any], older: str = older) -> None:
            values[f"{PLACE}.{older}"] = values[f"{PLACE}.{older.replace('.default', '')}"].clone()

        yield older, REFUSED, tensors(change)
        yield f"{older}.compiled", REFUSED, tensors(
            lambda values, key=older.replace(".default", ""): values.update(
                {f"_orig_mod.{PLACE}.{key}": values[f"{PLACE}.{key}"].clone()}
            )
        )


@kind
def values_that_are_no_numbers(rng: Random) -> Iterator[Case]:
    """peft loads them: a run that has diverged can be looked at. merge_adapter(safe_merge=True) refuses them."""
    for value in (float("nan"), float("inf"), float("-inf"), 3e38, 1e-45):
        yield f"{value}", LOADS, tensors(lambda values, value=value: [v.fill_(value) for v in values.values()] and None)
        yield f"one {value}", LOADS, tensors(lambda values, value=value: values[f"{PLACE}.lora_A.weight"][0, :1].fill_(
            value) is None)  # fmt: skip


@kind
def lengths_of_headers(rng: Random) -> Iterator[Case]:
    for length in (0, 1, 7, 10**6, 10**8 + 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1):
        yield f"{length}", REFUSED, raw(lambda content, length=length: struct.pack("<Q", length) + content[8:])
    yield "huge", REFUSED, header(lambda values: b'{"a":"' + b"x" * 30_000_000 + b'"}')
    yield "spaces", REFUSED, header(lambda values: b" " * 30_000_000)


@kind
def broken_headers(rng: Random) -> Iterator[Case]:
    key = f"{PLACE}.lora_A.weight"
    for text in (b"{", b"[]", b"null", b"3", b'"x"', b"{}}", b'{"a":}', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000):
        yield f"{text[:9]!r}", REFUSED, header(lambda values, text=text: text)
    entries = [
        {"data_offsets": [0, 10**15]}, {"data_offsets": [-1, 1023]}, {"data_offsets": [1024, 0]}, {"data_offsets": []},
        {"data_offsets": [0, 1]}, {"data_offsets": "x"}, {"data_offsets": [8, 1032]}, {"data_offsets": None},
        {"shape": [2**62, 4]}, {"shape": [-4, -64]}, {"shape": [4.5, 64]}, {"shape": "x"}, {"shape": [2**32, 2**32]},
        {"shape": [10**30]}, {"shape": [[4], [64]]}, {"dtype": "F31"}, {"dtype": "I32", "shape": [4, 32]},
        {"dtype": None}, {"dtype": 3}, {"dtype": "../x"}, {"shape": [4] * 100_000},
    ]  # fmt: skip
    for entry in entries:
        yield str(entry)[:40], REFUSED, header(lambda values, entry=entry: values[key].update(entry))
    yield "no dtype", REFUSED, header(lambda values: values[key].pop("dtype") and None)
    yield "metadata", EITHER, header(lambda values: values.update(__metadata__={"format": "tf"}))
    yield "metadata is a list", REFUSED, header(lambda values: values.update(__metadata__=[1]))
    yield "all at one place", REFUSED, header(
        lambda values: [v.update(data_offsets=[0, 1024]) for k, v in values.items() if k[0] != "_"] and None
    )


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
            yield f"in_{name}_{new}", REFUSED, as_bin(
                lambda values, marker, make=make: {**values, "x": make(marker)}, **options
            )

        def plain(folder: Path, marker: Path, make: Any = make) -> None:
            (folder / WEIGHTS).unlink()
            (folder / BIN).write_bytes(pickle.dumps(make(marker)))

        yield f"{name}_plain", REFUSED, plain


@kind
def pickles_of_other_things(rng: Random) -> Iterator[Case]:
    key = f"{PLACE}.lora_A.weight"
    for name, value in {
        "list": [torch.ones(2)], "none": None, "number": 3, "text": "x", "set": {1}, "empty": {}, "keys": {1: torch.ones(2)},
        "tensor": torch.ones(2), "nested": {"state_dict": {"x": torch.ones(2)}}, "bytes": b"x",
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


@kind
def expressions_without_end(rng: Random) -> Iterator[Case]:
    for pattern in ("(.*)*X", ".*.*.*.*.*.*.*.*.*X", r"(\w|\w\w|\.)+!"):
        yield pattern, REFUSED, config(target_modules=pattern)
    yield "exclude", REFUSED, config(exclude_modules="(.*)*X")
    yield "rank", REFUSED, config(rank_pattern={"(.*)*X": 4})
    yield "layers", REFUSED, config(layers_to_transform=[0], layers_pattern="(.*)*X")


@kind
def broken_expressions(rng: Random) -> Iterator[Case]:
    for pattern in ("(", "[", "*", "a{3,1}", r"\1", "(?P<a", "(?<=a*)b", "(" * 5000 + ")" * 5000, "a{99999999999999999999}"):
        yield f"{pattern[:12]}", REFUSED, config(target_modules=pattern)
        yield f"rank {pattern[:12]}", REFUSED, config(rank_pattern={pattern: 4})


@kind
def cut_configs(rng: Random) -> Iterator[Case]:
    for share in sorted(rng.random() * 0.99 for _ in range(25)):
        change = raw(lambda content, share=share: content[: int(share * len(content))], CONFIG)
        yield f"{share:.3f}", REFUSED, change


@kind
def broken_configs(rng: Random) -> Iterator[Case]:
    texts = {
        "empty": b"", "list": b"[]", "number": b"3", "text": b'"x"', "null": b"null", "true": b"true", "{}": b"{}",
        "deep": b"[" * 100_000, "deep object": b'{"a":' * 100_000, "long number": b'{"peft_type":"LORA","r":' + b"9" * 9999,
        "comment": b'{"peft_type":"LORA" // x\n}', "single": b"{'peft_type':'LORA'}", "noise": Random(1).randbytes(300),
        "utf-16": '{"peft_type":"LORA"}'.encode("utf-16"), "bom": b'\xef\xbb\xbf{"peft_type":"LORA"}', "nul": bytes(20),
        "latin": b'{"peft_type":"L\xd6RA"}', "lfs": b"version https://git-lfs.github.com/spec/v1\n", "yaml": b"r: 8",
        "surrogate": b'{"peft_type":"\\ud800"}', "html": b"<html>", "nan": b'{"peft_type":"LORA","lora_alpha":NaN}',
        "infinity": b'{"peft_type":"LORA","lora_alpha":Infinity}', "twice": b'{"peft_type":"LORA","r":4,"r":0}',
    }  # fmt: skip
    for name, text in texts.items():
        yield name, REFUSED, raw(text, CONFIG)


@kind
def values_of_options(rng: Random) -> Iterator[Case]:
    from peft_fast import LoraConfig

    values = [3, -1, 0, 2.5, True, "x", "", [], ["x"], [[1]], [None], {}, {"x": 1}, {"x": "y"}, 1e300]
    for name in sorted(LoraConfig.option_names() - {"runtime_config"}):
        for value in rng.sample(values, 6):
            yield f"{name}={value!r}", EITHER, config(**{name: value})


@kind
def peft_types(rng: Random) -> Iterator[Case]:
    for value in ("IA3", "ADALORA", "PROMPT_TUNING", "lora", "LORA ", "", None, 3, ["LORA"], {"LORA": 1}, "../x", "__class__"):
        yield f"{value!r}", REFUSED, config(peft_type=value)
    yield "none", REFUSED, lambda folder, marker: (folder / CONFIG).write_text('{"r": 4}')


@kind
def unknown_options(rng: Random) -> Iterator[Case]:
    for name in ("rnak", "__class__", "__init__", "self", "cls", "check", "to_dict", "../x", "", "peft_typ", "é", "x" * 9999):
        yield f"{name[:12]!r}", REFUSED, config(**{name: 1})
        newer = {name: 1, "peft_version": "0.99.0"}
        yield f"newer {name[:12]!r}", f"{LOADS}: does not know", config(**newer)
        yield f"off {name[:12]!r}", LOADS, config(**{name: None})


@kind
def targets_that_do_not_fit(rng: Random) -> Iterator[Case]:
    for value in ([], ["zzz"], [""], "zzz", "", ".*", ["model"], ["self_attn"], ["embed_tokens", "q_proj"], ["../q_proj"]):
        yield f"{value!r}", REFUSED, config(target_modules=value)
    yield "fewer", REFUSED, config(target_modules=["q_proj"])
    yield "excluded", REFUSED, config(exclude_modules=["q_proj"])
    yield "other layers", REFUSED, config(layers_to_transform=[1])
    yield "no layers", REFUSED, config(layers_to_transform=[99])
    for value in (["q_proj", "v_proj", "k_proj"], "all-linear"):
        yield f"more {value!r}", f"{LOADS}: the file lacks weights", config(target_modules=value)
    for value in ([""], ["zzz"], ["layers"], ["q_proj"], ["model"], "lm_head", [".."]):
        yield f"saved {value!r}", REFUSED, config(modules_to_save=value)
    yield "saved more", f"{LOADS}: the file lacks weights", config(modules_to_save=["lm_head"])


@kind
def another_size(rng: Random) -> Iterator[Case]:
    for rank in (1, 2, 3, 5, 8, 64):
        yield f"r={rank}", REFUSED, config(r=rank)
    for rank in (0, -1, 2.5, "4", None, True, [4]):
        yield f"r={rank!r}", REFUSED, config(r=rank)
    yield "pattern", REFUSED, config(rank_pattern={"q_proj": 2})
    yield "bias", REFUSED, config(lora_bias=3)
    yield "with bias", f"{LOADS}: the file lacks weights", config(lora_bias=True)


@kind
def names_of_base_models(rng: Random) -> Iterator[Case]:
    """Nothing is looked up when an adapter is put into a model that is there."""
    for name in ("../../etc", "/", "http://127.0.0.1:9/x", "a\nb: c", "x" * 9999, "~", "$(touch x)", "a/b/c/d", "\0"):
        yield f"{name[:12]!r}", LOADS, config(base_model_name_or_path=name)
    yield "library", LOADS, config(task_type=None, auto_mapping={"base_model_class": "system", "parent_library": "os"})
    yield "mapping", REFUSED, config(auto_mapping="os.system")


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


@kind
def other_tasks(rng: Random) -> Iterator[Case]:
    for value in ("CHAT", "", "causal_lm", 3, ["CAUSAL_LM"], {"a": 1}, "../x"):
        yield f"{value!r}", REFUSED, config(task_type=value)
    for value in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        yield value, LOADS, config(task_type=value)  # a head that the model lacks is not trained
    yield "none", LOADS, config(task_type=None)


def cases() -> Iterator[tuple[str, int, Case]]:
    """(kind, number within it, case): always the same ones."""
    for name, make in KINDS.items():
        for number, case in enumerate(make(Random(name))):
            yield name, number, case
