"""What `auto` launches for a LoRA layer, for layers that share x and for a gated MLP on a card of each generation, as
ops/table.py picks it: recorded, not run.

The layers are on the meta device: a route's steps allocate and launch there as they do on a GPU, and nothing computes.
The compile matrix compiles what of this it does not have by itself, and tests/test_picks.py looks up every launch in
its results.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, product
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from bench.launches import Launch, record
from peft_fast import dispatch
from peft_fast.kernels import configs
from peft_fast.ops import routes, table
from peft_fast.ops.glu import ACTIVATIONS, GLU
from peft_fast.ops.library import implementation
from peft_fast.quant import blockwise, int8
from peft_fast.quant.weight import QuantizedWeight

META = torch.device("meta")
MEMOS = (dispatch._choose, table._dequantization, table._product, table._product_dx, table._linear)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKENS = (1, 2, 4, 8, 9, 32, 64, 256, 512)  # one of every class of configs.py and on both sides of the table's limits


class Pick(NamedTuple):
    """A layer, what it is called with, and what that launches."""

    dtype: str  # of x
    adapter: str  # of A and B
    base: str
    shape: tuple[int, int, int]  # N, K, R
    tokens: int
    p: float
    wanted: str  # "training", "first layer" (x wants no gradient), "inference"
    launches: tuple[Launch, ...]

    @property
    def variant(self) -> str:
        """As compile_cases.py names variants."""
        tag = f"{self.dtype} auto {self.base} M{self.tokens} R{self.shape[2]}"
        odd, narrow = self.shape[1] % 16, self.adapter != self.dtype
        tag += (" odd" if odd else "") + (" fp32-adapter" if narrow else "") + (" dropout" if self.p else "")
        return tag + ("" if self.wanted == "training" else f" {self.wanted}")


@contextmanager
def card(capability: int) -> Iterator[None]:
    """Within, `auto` picks and configures as on a card of this generation, without bitsandbytes' own kernels."""

    def cannot_run(device: object, dtype: object, needs_dot: bool, interpreter: bool) -> str | None:
        return "no tensor cores in Triton" if needs_dot and capability < 80 else None

    with ExitStack() as stack:
        for module in (dispatch, table):
            stack.enter_context(patch.object(module, "cannot_run_triton", cannot_run))
        stack.enter_context(patch.object(table, "generation", lambda device: capability))
        stack.enter_context(configs.target(capability))
        for memo in MEMOS:
            memo.cache_clear()
        try:
            yield
        finally:
            for memo in MEMOS:
                memo.cache_clear()


@functools.cache
def weight_of(base: str, N: int, K: int, dtype: torch.dtype) -> Tensor | QuantizedWeight:
    if base == "dense":
        return torch.empty(N, K, dtype=dtype, device=META)
    dense = torch.zeros(N, K, dtype=dtype)
    return (int8.quantize(dense) if base == "int8" else blockwise.quantize(dense, base)).to(META)


def picks(capability: int) -> Iterator[Pick]:
    """For every dtype, base, number of tokens, dropout; with ranks and sizes that are multiples of 16 and others."""
    kinds = [("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]
    dropouts = (0.0, 0.1) if capability >= 80 else (0.0,)  # below, adapters are torch's
    with card(capability):
        for (dtype, adapter), base, shape in product(
            kinds, ("dense", "nf4", "int8"), ((2048, 2048, 16), (2048, 2040, 17))
        ):
            weight = weight_of(base, *shape[:2], DTYPES[dtype])
            for p, wanted, M in product(dropouts, ("training", "first layer", "inference"), TOKENS):
                if wanted != "inference" or not p:
                    launched = _launched(weight, M, shape[2], DTYPES[dtype], DTYPES[adapter], p, wanted)
                    yield Pick(dtype, adapter, base, shape, M, p, wanted, launched)


def _launched(
    weight: Tensor | QuantizedWeight, M: int, R: int, dtype: torch.dtype, adapter: torch.dtype, p: float, wanted: str
) -> tuple[Launch, ...]:
    N, K = weight.shape
    x, dy = (torch.empty(M, width, dtype=dtype, device=META) for width in (K, N))
    A, B = (torch.empty(shape, dtype=adapter, device=META) for shape in ((R, K), (N, R)))
    key = torch.empty(2, dtype=torch.int32, device=META) if p else None
    lora = routes.Lora(weight, A, B, 2.0, p, key, wanted != "inference", "auto", "auto")
    with record() as launches:
        _, s = routes.forward(x, None, lora)
        if wanted != "inference":
            routes.backward(dy, x, s, lora, (wanted == "training", True, True))
    return tuple(launches)


def together(capability: int) -> Iterator[tuple[str, Launch]]:
    """(variant, launch) of two and three dense layers that share x, as q, k and v do, and of a gated MLP's gate and up;
    a k-bit base adds what `picks` has. Of ranks up to 256, and of an odd one at an odd size."""
    sizes = [(R, 4096) for R in (8, 16, 32, 64, 128, 256)] + [(17, 2040)]
    kinds = product(("bf16", "fp16"), (False, True), sizes, (0.0, 0.1) if capability >= 80 else (0.0,), TOGETHER)
    with card(capability):
        for dtype, has_fp32_adapters, (R, K), p, M in kinds:
            adapter = "fp32" if has_fp32_adapters else dtype
            tag = f"R{R} M{M}" + (" fp32-adapter" if has_fp32_adapters else "") + (" dropout" if p else "")
            for widths in ((4096, 1024), (4096, 1024, 1024)):
                layers = [_layer(N, K, R, p, DTYPES[dtype], DTYPES[adapter]) for N in widths]
                for launch in _launched_by_group(layers, M):
                    yield f"{dtype} auto group of {len(widths)} {tag}", launch
            both = [_layer(11008, K, R, p, DTYPES[dtype], DTYPES[adapter])] * 2
            down = _layer(K, 11008, R, p, DTYPES[dtype], DTYPES[adapter])
            for activation, keep in product(ACTIVATIONS, KEEPS):
                for launch in _launched_by_gated(both, down, M, activation, keep):
                    yield f"{dtype} auto {activation} {tag}" + KEEPS[keep], launch


KEEPS: dict[routes.Keep, str] = {"outputs": "", "nothing": " inference", "base": " in one"}
TOGETHER = (1, 64, 512)  # tokens: one of every class of configs.py that a dense layer is asked about


def _layer(N: int, K: int, R: int, p: float, dtype: torch.dtype, adapter: torch.dtype) -> routes.Lora:
    A, B = (torch.empty(shape, dtype=adapter, device=META) for shape in ((R, K), (N, R)))
    key = torch.empty(2, dtype=torch.int32, device=META) if p else None
    return routes.Lora(weight_of("dense", N, K, dtype), A, B, 2.0, p, key, True, "auto", "auto")


def _input(layers: Sequence[routes.Lora], M: int) -> Tensor:
    weight = layers[0].weight
    return torch.empty(M, weight.shape[1], dtype=weight.dtype, device=META)


def _launched_by_group(layers: Sequence[routes.Lora], M: int) -> tuple[Launch, ...]:
    x, every = _input(layers, M), [True] * len(layers)
    with record() as launches:
        y, s = routes.forward_group(x, [None] * len(layers), layers)
        routes.backward_group(y, x, s, layers, True, every, every)
    return tuple(launches)


def _launched_by_gated(
    both: Sequence[routes.Lora], down: routes.Lora, M: int, activation: str, keep: routes.Keep
) -> tuple[Launch, ...]:
    """The gate itself: without what a layer or the group of both launches in its backward. `keep`: without down's
    adapter, for inference, and with it."""
    x, s_down = _input(both, M), torch.empty(M, down.A.shape[0], dtype=down.weight.dtype, device=META)
    choice = GLU.choose("auto", x.device, x.dtype)
    if keep == "base" and not routes.keeps_base(x, *both, down, choice):
        return ()
    with record() as launches:
        g, u, s, h = routes.forward_gated(x, [None, None], both, activation, choice, keep)
        for needs_dA in (True, False) if keep != "nothing" else ():
            if keep == "base":
                needs = True, needs_dA, True
                routes.backward_gated(x, g, u, s, s_down, *both, down, activation, choice, needs, None)
            else:
                implementation(choice).glu_backward_(h, g, u, activation, needs_h=needs_dA)
    return tuple(launches)


def covers(known: Launch, launch: Launch) -> bool:
    """Whether `known` is the same kernel but for pointers that it has and `launch` has not: to a bias, to a key, ..."""
    if known.kernel is not launch.kernel or known.options != launch.options:
        return False
    signature, of_known = dict(launch.signature), dict(known.signature)
    constants, known_constants = dict(launch.constexprs), dict(known.constexprs)
    absent = {n for n in signature if constants.get(n, 0) is None and of_known[n] != "constexpr"}
    switched_off = {n for n in ("HAS_BIAS", "HAS_LORA") if known_constants.get(n) and not constants.get(n)}
    return (
        all(of_known[n] == kind for n, kind in signature.items() if n not in absent)
        and {n: v for n, v in constants.items() if n not in absent | switched_off}
        == {n: v for n, v in known_constants.items() if n not in absent | switched_off}
        and set(known.divisible) - absent == set(launch.divisible)
    )


def beyond(known: list[Launch], capability: int) -> Iterator[tuple[str, Launch]]:
    """(variant, launch) of what `auto` launches on this card and `known` does not cover."""
    seen = dict.fromkeys(known)
    of_layers = ((pick.variant, launch) for pick in picks(capability) for launch in pick.launches)
    for variant, launch in chain(of_layers, together(capability)):
        if launch in seen:
            continue
        if not any(covers(other, launch) for other in seen):
            yield variant, launch
        seen[launch] = None
