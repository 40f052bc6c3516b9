"""Requests with an adapter each, 64 and on a GPU 8 too: HF PEFT's mixed batch, ours, and a store's, for one forward
and for generating.

Each is of a 2-layer Llama, base included; `base` is the model without adapters, and "base, adapters read" that and the
sum of all adapters' weights, each read once: who has these weights and this memory cannot be faster.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fast
from bench.harness import Case, half_of
from peft_fast.testing import relative_error

RANK, TOKENS = 16, 8
SHAPES = {  # width, adapters, base
    "cpu": ((256, 64, "dense"), (4096, 64, "dense")),
    "cuda": ((4096, 8, "nf4"), (4096, 64, "nf4"), (4096, 8, "dense"), (4096, 64, "dense")),
}


def llama(width: int, kind: str, dtype: torch.dtype, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=2,
        num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    for path, linear in list(model.model.named_modules()) if kind == "nf4" else ():
        if isinstance(linear, nn.Linear):
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, False, compute_dtype=dtype, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            model.model.set_submodule(path, layer)
    return model.to(device).eval()


def with_adapters(library: Any, base: Any, names: list[str]) -> Any:
    model = None
    for name in names:
        torch.manual_seed(hash(name) % 1000)
        config = library.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        if model is None:
            model = library.get_peft_model(base, config, name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    return model.eval()


def a_store(model: Any, base: Any, names: list[str]) -> peft_fast.AdapterStore:
    store = peft_fast.AdapterStore(base)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in names:
            store.load(name, Path(folder) / name)
    return store


@functools.cache
def steps(
    width: int, count: int, kind: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], torch.Tensor]]:
    """The providers, which take seconds and gigabytes to make: when the first of them runs."""
    names = [f"user{i}" for i in range(count)]
    base = llama(width, kind, dtype, device)
    theirs, ours = (with_adapters(library, copy.deepcopy(base), names) for library in (peft, peft_fast))
    adapters = {name: value for name, value in theirs.state_dict().items() if ".lora_" in name}
    ours.load_state_dict(adapters, strict=False)
    store = a_store(ours, copy.deepcopy(base), names)
    ids = torch.randint(0, 256, (count, 1), device=device)

    def step(model: Any, **kwargs: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(ids, **kwargs).logits

    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    generating = [
        ("peft", theirs, {"adapter_names": names}), ("peft_fast", ours, {"adapter_names": names}),
        ("peft_fast store", store, {"adapter_names": names}), ("base", base, {}),
    ]  # fmt: skip

    def generate(model: Any, **kwargs: Any) -> torch.Tensor:
        return model.generate(**prompts, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False, **kwargs)

    def one_by_one() -> torch.Tensor:
        outputs = []
        for i, name in enumerate(names):
            theirs.set_adapter(name)
            with torch.inference_mode():
                outputs.append(theirs(ids[i : i + 1]).logits)
        return torch.cat(outputs)

    weights = [
        torch.cat([p.detach().flatten() for n, p in ours.named_parameters() if f".{kind}." in n])
        for kind in ("lora_A", "lora_B")
    ]

    def reading() -> torch.Tensor:
        with torch.inference_mode():
            logits = base(ids).logits
            for of_kind in weights:
                of_kind.sum()
            return logits

    return {
        "peft": functools.partial(step, theirs, adapter_names=names),
        "peft_fast": functools.partial(step, ours, adapter_names=names),
        "peft_fast store": functools.partial(step, store, adapter_names=names),
        "peft, one after the other": one_by_one,
        "base, adapters read": reading,
        "base": functools.partial(step, base),
        **{f"generate, {name}": functools.partial(generate, model, **kwargs) for name, model, kwargs in generating},
    }


def _run(name: str, asked: tuple) -> torch.Tensor:
    return steps(*asked)[name]()


def cases(device: torch.device) -> Iterator[Case]:
    for width, count, kind in SHAPES[device.type]:
        dtype = torch.float32 if width < 1024 else half_of(device)
        names = ("peft", "peft_fast", "peft_fast store", "base, adapters read", "base")
        if width < 1024 or device.type == "cuda":  # on a CPU the whole base model 64 times: 20 s
            names += ("peft, one after the other",)
        runs = {name: functools.partial(_run, name, (width, count, kind, dtype, device)) for name in names}
        generating = {
            name: functools.partial(_run, f"generate, {name}", (width, count, kind, dtype, device))
            for name in ("peft", "peft_fast", "peft_fast store", "base")
        }

        def gate(runs=runs, dtype=dtype) -> None:
            for name in ("peft_fast", "peft_fast store"):
                assert relative_error(runs[name](), runs["peft"]()) < 16 * torch.finfo(dtype).eps, name

        shape = (
            f"2-layer llama width {width}, {count} adapters r={RANK}, one token each{', nf4' if kind == 'nf4' else ''}"
        )
        yield Case("mixed_batch", shape, dtype, "inference", runs, gate)

        def tokens_gate(generating=generating) -> None:
            same = (generating["peft_fast"]() == generating["peft"]()).float().mean()
            assert same > 0.9, f"{same:.0%} of the tokens are peft's"

        yield Case("mixed_batch", f"{shape}, {TOKENS} tokens generated", dtype, "inference", generating, tokens_gate)
