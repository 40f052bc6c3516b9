"""Kernel launches of a piece of code and the bytes they move, counted without a GPU: HF PEFT + bitsandbytes and ours by
one counter.

    python -m bench.counts [--tokens 512] [--traffic-tokens 4096]

A launch is an aten op that computes (no view, no allocation), an op of bitsandbytes, or a launch of Triton. Ours is
counted as on a GPU: dispatch is told that Triton can run, and its launches are recorded and not carried out, so values
are meaningless and counts are not. bitsandbytes' CPU ops stand for its CUDA ones: each is one launch there, and its
product of more than 1536 tokens, or beyond its table, is dequantise (three launches with nested scales) and matmul.
Dropout of torch is counted as on a GPU: one launch each way, and a mask of one byte an element. Bytes: traffic.py.
"""

import argparse
import copy
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import bitsandbytes as bnb
import peft
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import peft_fast
from bench import launches, traffic
from bench.memory_saved import GpuDropout
from peft_fast import dispatch
from peft_fast.dispatch import use_backend, use_route
from peft_fast.ops import library, table
from peft_fast.quant.bitsandbytes import read_linear

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias"}  # that their schemas do not tell
FREE = ALLOCATIONS | VIEWS
SHAPES_ONLY = 1 << 20  # elements


def _is_view(func: Any) -> bool:
    """Whether an op only returns another view of an argument."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


class Count(TorchDispatchMode):
    """Within, launches are counted by name in `self.ops` and bytes in `self.nbytes`; ops of peft_fast are looked into.

    An op on a tensor of more than `carried_out` elements is not carried out, only its shapes are: what is as large as a
    model's activations would take minutes, and what is small may be kept by somebody, so that it has to be right.
    """

    def __init__(self, carried_out: float = float("inf")) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()
        self.carried_out = carried_out

    @property
    def launches(self) -> int:
        return sum(self.ops.values())

    def add(self, name: str, nbytes: int) -> None:
        self.ops[name] += 1
        self.nbytes[name] += nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._opname, kwargs or {}
        if func.namespace == "peft_fast":
            with self:
                return library.IMPLEMENTATIONS[name](*args, **kwargs)
        if name in FREE or _is_view(func):
            return func(*args, **kwargs)
        out = self._call(func, args, kwargs)
        if func.namespace == "bitsandbytes" and name == "gemm_4bit":
            given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
            for part, nbytes in _of_gemm_4bit(out, given):
                self.add(f"bitsandbytes.{part}", nbytes)
        else:
            self.add(f"{func.namespace}.{name}", traffic.of_op(func, args, kwargs, out))
        return out

    def _call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if all(t.numel() <= self.carried_out for t in given):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return kwargs.get("out", args[0]) if func._schema.returns else None
        on_meta = tree_map_only(Tensor, lambda t: _empty(t, "meta"), (args, kwargs))
        return tree_map_only(Tensor, lambda t: _empty(t, "cpu"), func(*on_meta[0], **on_meta[1]))


def _empty(like: Tensor, device: str) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def _of_gemm_4bit(y: Tensor, given: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(launch, bytes) of those that it consists of on a GPU."""
    x, absmax, inner = given["A"], given["absmax"], given.get("absmax_8bit")
    weights = prod(given["shapeB"])
    scales = 4 * weights // given["blocksize"]
    if inner is not None:  # absmax are the outer scales
        yield "dequantize_blockwise", inner.nbytes + absmax.nbytes + given["absmax_code"].nbytes + scales
        yield "offset", 2 * scales
    W = x.element_size() * weights
    yield "dequantize_4bit", given["B"].nbytes + scales + W
    yield "matmul", x.nbytes + W + y.nbytes


@contextmanager
def as_on_a_gpu() -> Iterator[list[launches.Launch]]:
    """Within, Triton routes are taken on the CPU and their launches recorded instead of carried out."""
    memos = (dispatch._choose, table._dequantization, table._product, table._product_dx, table._linear)
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
    return measure(run, triton=triton)[1].ops


def measure(run: Callable[[], Any], *, triton: bool = False, carried_out: float = float("inf")) -> tuple[Any, Count]:
    """What `run` returns, and its launches and bytes; with `triton`, those that it would have on a GPU."""
    with Count(carried_out) as counter, GpuDropout():
        if not triton:
            return run(), counter
        with as_on_a_gpu() as recorded:
            result = run()
    for launch in recorded:
        counter.add(f"triton.{launch.name}", launch.nbytes)
    return result, counter


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


@functools.cache
def _zeros4bit(N: int, K: int) -> nn.Module:
    return _linear4bit(torch.zeros(N, K, dtype=torch.bfloat16))  # quantising takes longer than all that is counted


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
    model = _as_loaded(OneLayer(base.to("cpu")), bits)
    return library_.get_peft_model(model, config, autocast_adapter_dtype=False).train()


def _as_loaded(model: nn.Module, bits: int) -> nn.Module:
    """With the attribute that transformers gives a k-bit model: without it peft takes the layers for dense ones."""
    if bits < 16:
        setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


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
    """Projections in bf16, dense (16 bits) or bitsandbytes' 4-bit layers, LoRA of rank 16 on all seven; all zeros."""
    with torch.device("meta"):  # random weights of this size would take longer than everything else
        layer = Projections(hidden).bfloat16()
    layer.to_empty(device="cpu")
    for weight in layer.parameters():
        weight.data.zero_()
    for name, linear in list(layer.named_modules()):
        if bits == 4 and isinstance(linear, nn.Linear):
            layer.set_submodule(name, copy.deepcopy(_zeros4bit(linear.out_features, linear.in_features)))
    config = library_.LoraConfig(
        r=16,
        lora_dropout=p,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    return library_.get_peft_model(_as_loaded(layer, bits), config, autocast_adapter_dtype=False).train()


def forward_and_backward(model: nn.Module, x: torch.Tensor, dy: Any) -> Callable[[], object]:
    """The outputs and gradients of one micro-batch whose .grad are None."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> object:
        return torch.autograd.grad(model(x), [x, *parameters], dy)

    return run


def layer_counts(tokens: int, bits: int, p: float, hidden: int = 512) -> tuple[Counter[str], Counter[str]]:
    """(peft's, ours by route split) of one Llama layer's projections, forward and backward."""
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    dy = [torch.randn(tokens, width, dtype=torch.bfloat16) for width in (hidden // 4, hidden // 4, hidden)]
    theirs, ours = (forward_and_backward(llama_layer(lib, hidden, p, bits), x, dy) for lib in (peft, peft_fast))
    with use_route("split"):
        return count(theirs), count(ours, triton=True)


class Pass(NamedTuple):
    """A forward or a backward of a model's linear layers: its launches, and its bytes by what they are for."""

    counted: Count
    products: int  # of the base layers: x and W read and y written, or dy, W and dx; W in 16 bits
    dequantised: int  # W of k-bit layers, read in k bits and written in 16, with whatever else that launches

    @property
    def extra(self) -> int:
        """All other bytes: what adapters and activations cost on top of the bare base layers."""
        return self.with_dequantising - self.dequantised

    @property
    def with_dequantising(self) -> int:
        """All bytes but those of the products."""
        return self.counted.nbytes.total() - self.products


def passes(model: nn.Module, x: Tensor, dy: Any, *, triton: bool = False, carried_out=SHAPES_ONLY) -> tuple[Pass, Pass]:
    """The forward and the backward of one micro-batch whose .grad are None."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    layers = [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]
    products, dequantised = base_bytes(layers, x.shape[0])
    y, forward = measure(lambda: model(x), triton=triton, carried_out=carried_out)
    _, backward = measure(lambda: torch.autograd.grad(y, [x, *parameters], dy), triton=triton, carried_out=carried_out)
    return tuple(Pass(each, products, _by_bitsandbytes(each) or dequantised) for each in (forward, backward))


def _by_bitsandbytes(counted: Count) -> int:
    """What its three launches a weight with nested scales move; the second is an aten.add_ in the backward. Ours is one
    launch, whose bytes base_bytes knows."""
    found = {
        op: n for op, n in counted.nbytes.items() if op.startswith("bitsandbytes.") and op != "bitsandbytes.matmul"
    }
    return sum(found.values()) + (counted.nbytes["aten.add_"] if found else 0)


def base_bytes(layers: list[nn.Module], tokens: int) -> tuple[int, int]:
    """(bytes of their 16-bit products, bytes of one launch each that writes out a k-bit weight)"""
    products = dequantised = 0
    for layer in layers:
        N, K = layer.out_features, layer.in_features
        products += 2 * (tokens * (N + K) + N * K)
        if (weight := read_linear(layer)) is not None:
            dequantised += weight.nbytes + 2 * N * K
    return products, dequantised


def layer_passes(library_: Any, tokens: int, bits: int, p: float, hidden: int = 4096, route="split") -> list[Pass]:
    """Forward and backward of a Llama layer's projections; ours as on a GPU, by this route."""
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    dy = [torch.zeros(tokens, width, dtype=torch.bfloat16) for width in (hidden // 4, hidden // 4, hidden)]
    with use_route(route):
        return list(passes(llama_layer(library_, hidden, p, bits), x, dy, triton=library_ is peft_fast))


# bits, dropout, route: the most of peft's extra bytes, forward and backward, that issue 4 wants; of dense ones nothing
TARGETS: dict[tuple[int, float, str], tuple[float, float] | None] = {
    (4, 0.0, "split"): (0.35, 0.45),
    (4, 0.05, "split"): (0.28, 0.38),
    (4, 0.0, "merge"): (0.16, 0.36),
    (16, 0.0, "split"): None,
    (16, 0.05, "split"): None,
}


def print_traffic(tokens: int) -> None:
    print(f"extra traffic of a Llama-3-8B layer's seven linear layers and SwiGLU, r=16, {tokens} tokens, in MB:")
    print("  all bytes but those of the base layers' products, and of dequantising, which a bare base layer has too;")
    print("  and the ratio with dequantising")
    print(f"  {'':32}{'peft':>8}{'ours':>8}{'ratio':>7}{'with':>7}{'target':>8}   dequantising, peft and ours")
    for (bits, p, route), targets in TARGETS.items():
        theirs, ours = (layer_passes(lib, tokens, bits, p, route=route) for lib in (peft, peft_fast))
        for name, their, our, target in zip(("forward", "backward"), theirs, ours, targets or ("-", "-")):
            ratios = our.extra / their.extra, our.with_dequantising / their.with_dequantising
            print(
                f"  {bits:>2} bits, p={p:<5}{route:7}{name:9}{their.extra / 1e6:8.1f}{our.extra / 1e6:8.1f}"
                f"{ratios[0]:7.3f}{ratios[1]:7.3f}{target:>8}   "
                f"{their.dequantised / 1e6:.1f} {our.dequantised / 1e6:.1f}"
            )


def print_launches(tokens: int) -> None:
    width = 1024
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, width, dtype=torch.bfloat16)
    print(f"launches of one QLoRA linear, bf16, r=16, {tokens} tokens, forward + backward")
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
        theirs, ours = layer_counts(tokens, bits, p)
        print(
            f"  {bits:>2} bits, dropout {p:<5} peft {sum(theirs.values())}, "
            f"peft_fast {sum(ours.values())}  {dict(ours)}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="for the launches (default: %(default)s)")
    parser.add_argument("--traffic-tokens", type=int, default=4096, help="for the bytes (default: %(default)s)")
    options = parser.parse_args()
    with torch.compiler.set_stance("force_eager"):
        print_launches(options.tokens)
        print_traffic(options.traffic_tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
