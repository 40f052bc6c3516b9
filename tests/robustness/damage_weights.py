"""Damage to adapter_model.safetensors, and to what is in it."""

import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from damage import BIN, EITHER, LOADS, PLACE, REFUSED, WEIGHTS, Case, as_bin, flipped, header, kind, raw, tensors


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
        f"{PLACE}.base_layer.weight", "base_model.model.model.layers.0.mlp.up_proj.weight",
        "base_model.model.lm_head.bias",
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
        f"{PLACE}..lora_A..weight", f".{PLACE}.lora_A.weight", f"{PLACE}.lora_A.weight.", "x" * 100_000,
        "é\u202e\U0001f600", "; rm -rf /", "$(touch x)", "%s%n", "{0.__class__}", "base_model.model.peft_config", "CON",
    ]  # fmt: skip
    for index, name in enumerate(names):
        label = f"{index}_{name[:20]!r}"
        yield label, REFUSED, tensors(lambda values, name=name: values.update({name: torch.ones(2)}))
        if index % 3 == 0:
            yield f"{label}_alone", REFUSED, tensors(lambda values, name=name: {name: torch.ones(2)})


@kind
def a_weight_twice(rng: Random) -> Iterator[Case]:
    """With the same values it is no damage: peft itself writes some twice."""
    for factor in ("lora_A", "lora_B"):
        compiled, named = f"_orig_mod.{PLACE}.{factor}.weight", f"{PLACE}.{factor}.default.weight"
        for older, offs in ((compiled, ((1, REFUSED), (0, LOADS))), (named, ((1, REFUSED),))):
            for off, expected in offs:

                def change(values: dict[str, Any], factor: str = factor, older: str = older, off: int = off) -> None:
                    values[older] = values[f"{PLACE}.{factor}.weight"] + off

                yield f"{older} off by {off}", expected, tensors(change)


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
    for text in (
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"{}}",
        b'{"a":}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ):
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
    yield (
        "all at one place",
        REFUSED,
        header(lambda values: [v.update(data_offsets=[0, 1024]) for k, v in values.items() if k[0] != "_"] and None),
    )
