"""Who runs what: the route of a linear layer as a pure function of what the call looks like.

A k-bit weight can be multiplied by in three ways, and which is fastest depends on the card and on the tokens M:

    fused         kernels/quant_matmul.py decodes the weight inside the product
    bitsandbytes  bitsandbytes >= 0.50 does (forward only, 4 bits)
    dequantize    W is written out once, then multiplied by with cuBLAS

and a LoRA layer on top of it in three (routes.py has the steps of each):

    split         the product, by bitsandbytes or on the dequantised W, then lora_down and lora_up_add_
    fused         lora_down, then our product with the up projection in its epilogue
    merge         W' = W + scale * B @ A, rounded once, written out where W would be; then one product

`reference` is split in plain torch. None of the limits on M below was measured by us: no kernel of this project has run
on a GPU. Each says where it comes from; bench/crossover.py measures those of the products, in 4 and 8 bits.
"""

import functools
from typing import NamedTuple

import torch

from peft_fast.dispatch import REFERENCE, Backend, Choice, Op, Route, cannot_run_triton
from peft_fast.quant import bitsandbytes_kernels
from peft_fast.quant.weight import Format

from .library import resolve, resolve_route

# Up to this many tokens our GEMV class runs: a row of x against each weight as it is decoded, no tensor cores. Prior:
# bitsandbytes 0.50 takes its own SIMT kernel up to 3 to 8 (backends/cuda/ops.py there). Ours goes first because theirs
# rounds code, scale and product to 16 bits each, ours the product only (csrc/gemm_4bit.cu, read at 95f9af3).
GEMV_M = 8

# Up to this many tokens decoding inside a tensor-core product beats dequantise + cuBLAS, by compute capability; the
# forward, and the product for dx. Prior: for weights of 16 M elements and more bitsandbytes 0.50 takes its own kernel
# up to 16-64 tokens on sm_90, 64-128 on sm_86, 128-256 on sm_89 and sm_120 (the table in backends/cuda/ops.py): the
# forward has the lower ends, dx the upper ones, because there its alternative moves dy and W through cuBLAS just so.
FUSED_M = {80: (64, 64), 86: (64, 128), 89: (128, 256), 90: (16, 16), 100: (8, 8), 120: (128, 256)}

# The same for bitsandbytes' own kernel, on the generations that its table was made for and no others: elsewhere (sm_87,
# sm_110) it dequantises itself, in three launches. On a T4 fp16 only; Triton has no tensor cores there.
BITSANDBYTES_M = {75: 64} | {generation: forward for generation, (forward, _) in FUSED_M.items()}

# Weights that are small (below SMALL elements) and short (2 K < N) are multiplied within one wave of programs, and the
# dequantisation is most of the alternative: up to this many tokens. Prior: the least of what bitsandbytes' table has
# for such weights on sm_80 and later, 320 to 1536.
SMALL, SMALL_M = 4 << 20, 320

# From this many tokens merging beats split. Calculated: merging costs 2 R operations a weight more than dequantising,
# split moves 2 M K + 4 M N bytes and launches two kernels more; at 4096 x 4096, R = 16 they are equal near M = 330 on a
# card of 1 TB/s, launches not counted (kernels.md 2.3, 3.2). For inference only: in training the gate of
# bench/merge_gate.py is not passed (layers below 2**20 weights keep 0.8 to 1.4 of the smallest updates, and not 0.95 to
# 1.05; bench/results/merge_gate.md), so that merging is for who asks for it by name, use_route("merge").
MERGE_M = 256


class Call(NamedTuple):
    """All that a route may depend on: the device, and y [M, N] = x [M, K] @ W.T with an adapter of rank R."""

    device: torch.device
    dtype: torch.dtype  # of the product
    tokens: int  # M
    N: int
    K: int
    R: int = 0  # 0: no adapter
    fmt: str = ""  # str(weight.format); empty for a dense weight
    p: float = 0.0  # dropout
    trained: bool = False  # the adapter wants gradients, now or when a checkpoint runs this forward again


def generation(device: torch.device) -> int:
    """89 for sm_89; 0 for what is no NVIDIA GPU: there nothing beats dequantising."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _newest(table: dict, cc: int) -> int:
    """The key of the newest generation in the table that is not newer than the card; 0 where all are."""
    return max((key for key in table if key <= cc), default=0)


def _why_not_dequantize(dtype: torch.dtype) -> str | None:
    from peft_fast.kernels import dequantize

    return dequantize.why_not(dtype)


def _why_not_lora(dtype: torch.dtype) -> str | None:
    from peft_fast.kernels import lora_down, lora_up_add

    return lora_down.why_not(dtype) or lora_up_add.why_not(dtype)


DEQUANTIZE = Op("dequantize", "triton", _why_not_dequantize, needs_dot=False)
LORA_LINEAR = Op("lora_linear", "split", _why_not_lora)


def dequantization(backend: Backend, device: torch.device, dtype: torch.dtype, fmt: str) -> Choice:
    """Whose code writes a k-bit weight out. All of them give the same bits."""
    return _dequantization(backend, device, dtype, fmt, bitsandbytes_kernels.is_loaded())


@functools.lru_cache(maxsize=4096)
def _dequantization(backend: Backend, device: torch.device, dtype: torch.dtype, fmt: str, loaded: bool) -> Choice:
    """`loaded`: a model that was used before bitsandbytes was imported is asked about anew afterwards."""
    choice = DEQUANTIZE.choose(backend, device, dtype)
    if backend != "auto" or choice.backend != "torch" or not loaded:
        return choice
    if bitsandbytes_kernels.why_not_dequantize(Format.parse(fmt), device, dtype):
        return choice
    because = f"{choice.because}, where bitsandbytes' C++ gives the same bits faster than torch"
    return Choice("dequantize", "bitsandbytes", because, "bitsandbytes")


def why_not_fused(call: Call, backend: Backend, *, dx: bool = False) -> str | None:
    """The reason our kernels cannot decode the weight inside the product x @ W.T, or with `dx` dy @ W; None if they
    can."""
    if not call.fmt:
        return "the weight is dense"
    if backend == "torch":
        return "backend torch was asked for"
    needs_dot = dx or call.tokens > GEMV_M
    if reason := cannot_run_triton(call.device, call.dtype, needs_dot, interpreter=backend == "triton"):
        return reason
    from peft_fast.kernels import configs, quant_matmul

    fmt, cc = Format.parse(call.fmt), configs.capability(call.device)
    if dx:
        return quant_matmul.why_not_dx(fmt, call.dtype, cc)
    return quant_matmul.why_not(fmt, call.dtype, cc, call.tokens)


def product(call: Call, backend: Backend) -> Choice:
    """Who computes x @ W.T for a k-bit W: "fused", "bitsandbytes" or "dequantize"."""
    return _product(call, backend, bitsandbytes_kernels.is_loaded())


@functools.lru_cache(maxsize=4096)
def _product(call: Call, backend: Backend, loaded: bool) -> Choice:
    if call.tokens <= GEMV_M:
        if why_not_fused(call, backend) is None:
            return Choice("quant_matmul", "fused", f"{call.tokens} tokens, at most {GEMV_M}", "triton")
        return _dequantize(call, backend, loaded)
    cc = generation(call.device)
    limit = _limit(call, BITSANDBYTES_M.get(cc, 0))
    if (
        backend == "auto"
        and loaded
        and call.tokens <= limit
        and bitsandbytes_kernels.why_not_matmul(Format.parse(call.fmt), call.device, call.dtype) is None
    ):
        because = f"{call.tokens} tokens, at most {limit} on sm_{cc} (prior: bitsandbytes' table)"
        return Choice("quant_matmul", "bitsandbytes", because, "bitsandbytes")
    limit = _limit(call, FUSED_M.get(_newest(FUSED_M, cc), (0, 0))[0])
    if call.tokens <= limit and why_not_fused(call, backend) is None:
        return Choice("quant_matmul", "fused", f"{call.tokens} tokens, at most {limit} on sm_{cc} (prior)", "triton")
    return _dequantize(call, backend, loaded)


def product_dx(call: Call, backend: Backend) -> Choice:
    """Who computes dy @ W for a k-bit W: "fused" or "dequantize"."""
    return _product_dx(call, backend, bitsandbytes_kernels.is_loaded())


@functools.lru_cache(maxsize=4096)
def _product_dx(call: Call, backend: Backend, loaded: bool) -> Choice:
    cc = generation(call.device)
    limit = _limit(call, FUSED_M.get(_newest(FUSED_M, cc), (0, 0))[1])
    if call.tokens <= limit and why_not_fused(call, backend, dx=True) is None:
        return Choice("quant_matmul_dx", "fused", f"{call.tokens} tokens, at most {limit} on sm_{cc} (prior)", "triton")
    return _dequantize(call, backend, loaded)


def _limit(call: Call, large: int) -> int:
    """Up to how many tokens, where `large` is the limit for large weights."""
    if call.dtype == torch.float32:
        return 0  # no tensor cores, or tf32: nothing hides the decoding
    return max(large, SMALL_M) if large > GEMV_M and 2 * call.K < call.N and call.N * call.K < SMALL else large


def _dequantize(call: Call, backend: Backend, loaded: bool) -> Choice:
    choice = _dequantization(backend, call.device, call.dtype, call.fmt, loaded)
    return Choice("quant_matmul", "dequantize", choice.because, choice.backend)


def linear(call: Call, backend: Backend, route: Route = "auto") -> Choice:
    """The route of lora_linear's forward.

    Raises TritonUnsupported where Triton was asked for by name and cannot run, ValueError where a route was.
    """
    return _linear(call, backend, route, bitsandbytes_kernels.is_loaded())


@functools.lru_cache(maxsize=4096)
def _linear(call: Call, backend: Backend, route: Route, loaded: bool) -> Choice:
    can = LORA_LINEAR.choose(backend, call.device, call.dtype)
    if route != "auto":
        if problem := _why_not_route(route, call, can):
            raise ValueError(f"route {route} was asked for, but {problem}; route auto would take what can")
        return Choice("lora_linear", route, "asked for", can.backend)
    if not call.fmt:
        return can
    base = _product(call, backend, loaded)
    if can.backend == "torch":  # LoRA is; the base weight may be in other hands
        others = "" if base.backend == "torch" else f"; base product: {base.route} by {base.backend}"
        return Choice("lora_linear", can.route, can.because + others)
    if base.route == "fused":
        return Choice("lora_linear", "fused", base.because, "triton")
    if _merges(call):
        because = f"{call.tokens} tokens, at least {MERGE_M}, no dropout, no gradients for the adapter"
        return Choice("lora_linear", "merge", because, "triton")
    return Choice("lora_linear", "split", f"{base.route}: {base.because}", "triton")


def _merges(call: Call) -> bool:
    """Not in fp32, where rounding the merged weight would be the largest error of the layer."""
    if call.trained or call.p or call.tokens < MERGE_M or call.dtype == torch.float32:
        return False
    return _why_not_merge(call) is None


def _why_not_merge(call: Call) -> str | None:
    from peft_fast.kernels import dequantize_merge

    return dequantize_merge.why_not(Format.parse(call.fmt), call.dtype)


def linear_backward(call: Call, backend: Backend, route: Route = "auto") -> Choice:
    """The route of lora_linear's backward, for the same call as the forward's."""
    return _backward_of(linear(call, backend, route), call, backend, route)


def _backward_of(forward: Choice, call: Call, backend: Backend, route: Route) -> Choice:
    if route != "auto" or forward.route in (REFERENCE, "merge") or not call.fmt:
        return forward
    base = product_dx(call, backend)
    return Choice("lora_linear", "fused" if base.route == "fused" else "split", base.because, "triton")


def is_split(call: Call, backend: Backend, route: Route, *, backward: bool = False) -> bool:
    """Whether lora_linear goes route split on Triton: for who asks in the forward, asks again in the backward, and has
    to get the same answer. So bitsandbytes, which may be imported in between, is left out of it: what is split without
    it is split with it."""
    choice = _linear(call, backend, route, loaded=False)
    if backward:
        choice = _backward_of(choice, call, backend, route)
    return (choice.route, choice.backend) == ("split", "triton")


def _why_not_route(route: Route, call: Call, can: Choice) -> str | None:
    if route == "split":
        return None
    if not call.fmt:
        return "the weight is dense: there is nothing to decode"
    if route == "merge" and call.p:
        return "dropout is not a change of the weight"
    if route == "merge":
        return None if can.backend == "torch" else _why_not_merge(call)
    if can.backend == "torch":
        return None
    return why_not_fused(call, "triton") or why_not_fused(call, "triton", dx=True)


def choose(call: Call, backend: str | None = None, route: str | None = None) -> Choice:
    """The route that lora_linear takes for this call, with the reason; backend and route default to the process's."""
    return linear(call, resolve(backend), resolve_route(route))


def choose_product(call: Call, backend: str | None = None) -> Choice:
    """Who multiplies by a k-bit weight without an adapter, with the reason."""
    return product(call, resolve(backend))
