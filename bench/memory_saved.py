"""Bytes that a forward keeps for the backward: HF PEFT + bitsandbytes and ours, on the same models, by one counter.

    python -m bench.memory_saved [--hidden 512] [--tokens 512] [--list]

One decoder layer of a Llama with Llama-3-8B's proportions, adapters on all of its linear layers: what a model of three
layers keeps, minus what one of two keeps. Parameters and buffers do not count, a storage counts once. --list shows the
tensors of one setting.

A CPU's dropout keeps its mask in the dtype of its input, a GPU's in one byte an element; the columns "as on a GPU"
count HF PEFT with the latter. Ours keeps no mask.
"""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fast

VOCABULARY = 64
Kept = list[tuple[tuple[int, ...], torch.dtype, int]]  # shape and dtype as saved first, bytes of the storage


@dataclass(frozen=True)
class Setting:
    base: str  # "dense" or "4-bit", both bf16
    prepare: bool  # prepare_model_for_kbit_training: a residual stream in fp32
    autocast: bool
    p: float


SETTINGS = [
    *(Setting("4-bit", *rest) for rest in product((True, False), (False, True), (0.0, 0.05))),
    *(Setting("dense", False, *rest) for rest in product((False, True), (0.0, 0.05))),
]


def llama(hidden: int, layers: int, base: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers, vocab_size=VOCABULARY,
        num_attention_heads=8, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    if base == "4-bit":
        for name, linear in list(model.model.named_modules()):
            if isinstance(linear, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(model.model.get_submodule(parent), child, _four_bits(linear))
        model.is_loaded_in_4bit = model.is_quantized = True
    return model


def _four_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def build(library: ModuleType, setting: Setting, hidden: int, layers: int) -> Any:
    """The decoder of an adapted model, whose input requires a gradient as it does in a layer further up."""
    model: Any = llama(hidden, layers, setting.base)
    if setting.prepare:
        model = library.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.enable_input_require_grads()
    rank = max(1, hidden // 256)  # 16 at Llama-3-8B's 4096
    config = library.LoraConfig(r=rank, lora_dropout=setting.p, target_modules="all-linear", task_type="CAUSAL_LM")
    return library.get_peft_model(model, config).train()


class GpuDropout(TorchFunctionMode):
    """Dropout as CUDA has it: one op, which keeps a mask of bools."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout:
            return torch.native_dropout(*args, kwargs["p"], kwargs["training"])[0]
        return func(*args, **(kwargs or {}))


def kept(forward: Any, model: nn.Module) -> Kept:
    """What autograd keeps of a call, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model)}
    found: dict[int, tuple[tuple[int, ...], torch.dtype, int]] = {}
    storages = []  # held: one that is freed would give its address to the next

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes():
            found.setdefault(storage.data_ptr(), (tuple(tensor.shape), tensor.dtype, storage.nbytes()))
            storages.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return list(found.values())


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and what bitsandbytes keeps beside a weight."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from (value for value in vars(part or object).values() if isinstance(value, torch.Tensor))


def of_a_layer(library: ModuleType, setting: Setting, hidden: int, tokens: int, mode: str = "", gpu=False) -> Kept:
    """What one layer keeps: what three keep and two do not. `mode`: of set_lora_mlp; `gpu`: with a GPU's dropout."""
    ids = torch.randint(1, VOCABULARY, (2, tokens // 2))
    counts = []
    for layers in (3, 2):
        model = build(library, setting, hidden, layers)
        if mode:
            peft_fast.set_lora_mlp(model, mode)
        decoder = model.get_base_model().model
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast), GpuDropout() if gpu else nullcontext():
            counts.append(Counter(kept(lambda decoder=decoder: decoder(input_ids=ids), model)))
    return list((counts[0] - counts[1]).elements())


def total(tensors: Kept) -> int:
    return sum(size for _, _, size in tensors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--list", action="store_true", help="the tensors that each keeps, of the first setting")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    sizes = (options.hidden, options.tokens)
    if options.list:
        for library in (peft, peft_fast):
            print(library.__name__)
            for (shape, dtype, size), count in Counter(of_a_layer(library, SETTINGS[0], *sizes)).most_common():
                print(f"  {count:3} x {size:9,} bytes  {dtype!s:15} {shape}")
        return 0
    print(f"bytes per token and layer in units of the hidden size; {options.hidden} wide, {options.tokens} tokens")
    print(f"{'':37}{'HF PEFT':>10}{'as on a GPU':>12}{'ours':>8}{'ratio':>8}{'GPU':>8}{'recompute':>11}{'GPU':>8}")
    for setting in SETTINGS:
        theirs, on_gpu = (total(of_a_layer(peft, setting, *sizes, gpu=gpu)) for gpu in (False, True))
        ours, again = (total(of_a_layer(peft_fast, setting, *sizes, mode=mode)) for mode in ("fused", "recompute"))
        unit = options.hidden * options.tokens
        stream = "fp32 residual" if setting.prepare else "bf16 residual"
        label = f"{setting.base} {stream}{' autocast' if setting.autocast else ''} p={setting.p}"
        print(
            f"{label:37}{theirs / unit:10.1f}{on_gpu / unit:12.1f}{ours / unit:8.1f}"
            f"{ours / theirs:8.3f}{ours / on_gpu:8.3f}{again / theirs:11.3f}{again / on_gpu:8.3f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
