"""Kernel launches of a piece of code, counted without a GPU: HF PEFT + bitsandbytes and ours by one counter.

    python -m bench.counts [--tokens 512]

A launch is an aten op that computes (no view, no allocation), an op of bitsandbytes, or a launch of Triton. Ours is
counted as on a GPU: dispatch is told that Triton can run, and its launches are recorded and not carried out, so values
are meaningless and counts are not. bitsandbytes' CPU ops stand for its CUDA ones: each is one launch there, and its
product of more than 1536 tokens, or beyond its table, is dequantise (three launches with nested scales) and matmul.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import peft_fast
from bench import launches
from peft_fast import dispatch
from peft_fast.dispatch import use_backend, use_route
from peft_fast.ops import library, table

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias"}  # that their schemas do not tell
# Dropout is three ops on a CPU (bernoulli_, div_, mul) and one launch on a GPU: the product stands for it.
FREE = ALLOCATIONS | VIEWS | {"bernoulli_", "div_"}
NESTED = 7  # the argument of bitsandbytes' gemm_4bit that is there where scales are nested


def _is_view(func: Any) -> bool:
    """Whether an op only returns another view of an argument."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


class Count(TorchDispatchMode):
    """Within, ops are counted by name in `self.ops`; ops of peft_fast are looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    @property
    def launches(self) -> int:
        return sum(self.ops.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._opname, kwargs or {}
        if func.namespace == "peft_fast":
            with self:
                return library.IMPLEMENTATIONS[name](*args, **kwargs)
        if func.namespace == "bitsandbytes" and name == "gemm_4bit":
            nested = kwargs.get("absmax_8bit", args[NESTED] if len(args) > NESTED else None) is not None
            parts = ["dequantize_blockwise", "offset"] if nested else []
            self.ops.update(f"bitsandbytes.{part}" for part in [*parts, "dequantize_4bit", "matmul"])
        elif name not in FREE and not _is_view(func):
            self.ops[f"{func.namespace}.{name}"] += 1
        return func(*args, **kwargs)


@contextmanager
def as_on_a_gpu() -> Iterator[list[launches.Launch]]:
    """Within, Triton routes are taken on the CPU and their launches recorded instead of carried out."""
    memos = (dispatch._choose, table._dequantization, table._product, table.product_dx, table._linear)
    original = dispatch.cannot_run_triton, table.cannot_run_triton
    dispatch.cannot_run_triton = table.cannot_run_triton = lambda *args, **kwargs: None
    for memo in memos:
        memo.cache_clear()
    try:
        with use_backend("triton"), launches.record() as recorded:
            yield recorded
    finally:
        dispatch.cannot_run_triton, table.cannot_run_triton = original
        for memo in memos:
            memo.cache_clear()


def count(run: Callable[[], object], *, triton: bool = False) -> Counter[str]:
    """{op: launches} of one call of `run`; with `triton`, of what it would launch on a GPU."""
    with Count() as counter:
        if not triton:
            run()
            return counter.ops
        with as_on_a_gpu() as recorded:
            run()
    return counter.ops + Counter(f"triton.{launch.name}" for launch in recorded)


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.proj = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def _linear4bit(dense: torch.Tensor) -> nn.Module:
    """Nested scales, as every QLoRA recipe has them."""
    N, K = dense.shape
    base = bnb.nn.Linear4bit(K, N, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    base.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", module=base)
    return base.to("cpu")


def qlora_layer(library_: Any, width: int, p: float, bits: int = 4) -> nn.Module:
    """A bitsandbytes layer [width, width] in bf16 with a LoRA adapter of rank 16, by peft or by peft_fast."""
    dense = torch.randn(width, width, dtype=torch.bfloat16)
    base: nn.Module
    if bits == 4:
        base = _linear4bit(dense)
    else:
        base = bnb.nn.Linear8bitLt(width, width, bias=False, has_fp16_weights=False)
        base.weight = bnb.nn.Int8Params(dense, requires_grad=False, has_fp16_weights=False)
    config = library_.LoraConfig(r=16, lora_dropout=p, target_modules=["proj"])
    model = library_.get_peft_model(OneLayer(base.to("cpu")), config, autocast_adapter_dtype=False)
    return model.train()


class Projections(nn.Module):
    """What a Llama layer has of linear layers, at the proportions of Llama-3-8B: q, k, v and o, and the MLP. Attention
    itself, which is not ours, is left out: o takes q's output."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        config = LlamaConfig(hidden_size=hidden, intermediate_size=7 * hidden // 2)
        for name, width in (("q_proj", hidden), ("k_proj", hidden // 4), ("v_proj", hidden // 4), ("o_proj", hidden)):
            self.add_module(name, nn.Linear(hidden, width, bias=False))
        self.mlp = LlamaMLP(config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return k, v, self.mlp(self.o_proj(q))


def llama_layer(library_: Any, hidden: int, p: float, bits: int = 4) -> nn.Module:
    """Projections in bf16, dense (16 bits) or of bitsandbytes' 4-bit layers, LoRA of rank 16 on all seven."""
    layer = Projections(hidden).bfloat16()
    for name, linear in list(layer.named_modules()):
        if bits == 4 and isinstance(linear, nn.Linear):
            layer.set_submodule(name, _linear4bit(linear.weight.data))
    config = library_.LoraConfig(
        r=16,
        lora_dropout=p,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    return library_.get_peft_model(layer, config, autocast_adapter_dtype=False).train()


def forward_and_backward(model: nn.Module, x: torch.Tensor, dy: Any) -> Callable[[], object]:
    """The outputs and gradients of one micro-batch whose .grad are None."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> object:
        return torch.autograd.grad(model(x), [x, *parameters], dy)

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    width = 1024
    x = torch.randn(options.tokens, width, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(options.tokens, width, dtype=torch.bfloat16)
    print(f"launches of one QLoRA linear, bf16, r=16, {options.tokens} tokens, forward + backward")
    with torch.compiler.set_stance("force_eager"):
        for p in (0.0, 0.05):
            rows = {"peft + bitsandbytes": count(forward_and_backward(qlora_layer(peft, width, p), x, dy))}
            run = forward_and_backward(qlora_layer(peft_fast, width, p), x, dy)
            for route in ("split", "fused", *(["merge"] if not p else [])):
                with use_route(route):
                    rows[f"peft_fast, {route}"] = count(run, triton=True)
            for name, ops in rows.items():
                print(f"  dropout {p:<5} {name:22}{sum(ops.values()):>4}  {dict(ops)}")
        print("launches of a Llama layer's seven linear layers and SwiGLU, the same otherwise, 4 bits and dense")
        for bits, p in ((4, 0.0), (4, 0.05), (16, 0.0), (16, 0.05)):
            theirs, ours = layer_counts(options.tokens, bits, p)
            print(
                f"  {bits:>2} bits, dropout {p:<5} peft {sum(theirs.values())}, "
                f"peft_fast {sum(ours.values())}  {dict(ours)}"
            )
    return 0


def layer_counts(tokens: int, bits: int, p: float, hidden: int = 512) -> tuple[Counter[str], Counter[str]]:
    """(peft's, ours by route split) of one Llama layer's projections, forward and backward."""
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    dy = [torch.randn(tokens, width, dtype=torch.bfloat16) for width in (hidden // 4, hidden // 4, hidden)]
    theirs, ours = (forward_and_backward(llama_layer(lib, hidden, p, bits), x, dy) for lib in (peft, peft_fast))
    with use_route("split"):
        return count(theirs), count(ours, triton=True)


if __name__ == "__main__":
    sys.exit(main())
