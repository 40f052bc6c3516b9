"""Which launches the compile matrix compiles: what the launchers do with real arguments, under a name for each.

Shapes only matter by their divisibility by 16 and by the class that configs.py puts them into; ranks by that, by their
tile and by whether one tile is enough.
"""

from collections.abc import Callable, Iterator

import torch

from bench.launches import Launch, record
from peft_fast.kernels import (
    configs,
    dequantize,
    dequantize_merge,
    dropout,
    glu,
    lora_down,
    lora_embedding,
    lora_up_add,
    quant_gemv,
    quant_matmul,
    scale_columns,
)
from peft_fast.quant import blockwise, int8
from peft_fast.quant.weight import QuantizedWeight

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Named = Iterator[tuple[str, Launch]]


def launches(quick: bool, target: int) -> Named:
    """(variant, launch) of everything, as it would be launched on a GPU of this compute capability."""
    with configs.target(target):
        for dname, dtype in DTYPES.items():
            if quick and dname == "fp16":  # the instructions of bf16, but for conversions
                continue
            yield from _lora(dname, dtype, quick)
            yield from _dequantize(dname, dtype, quick)
            yield from _merge(dname, dtype, quick)
            yield from _products(dname, dtype, quick)
            yield from _glu(dname, dtype, quick)
            yield from _scale_columns(dname, dtype, quick)
            yield from _embedding(dname, dtype, quick)


def _recorded(variant: str, *calls: Callable[[], object]) -> Named:
    with record() as launched:
        for call in calls:
            call()
    yield from ((variant, launch) for launch in launched)


def _lora(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    aligned, odd = ((16, 80), ()) if quick else ((8, 16, 32, 64, 128), (17, 80))
    for R, sname in [*((r, "aligned") for r in aligned), *((r, "odd") for r in odd)]:
        M, N, K = (64, 64, 64) if sname == "aligned" else (33, 71, 67)
        x, y, s = torch.zeros(M, K, dtype=dtype), torch.zeros(M, N, dtype=dtype), torch.zeros(M, R, dtype=dtype)
        for adapter in dict.fromkeys((dtype, torch.float32)):
            tag = f"{dname} R{R} {sname}" + (" fp32-adapter" if adapter != dtype else "")
            A, B, key = torch.zeros(R, K, dtype=adapter), torch.zeros(N, R, dtype=adapter), dropout.new_key("cpu")
            for p in (0.1,) if quick else (0.0, 0.1):
                yield from _recorded(
                    tag + (" dropout" if p else ""),
                    lambda x=x, A=A, p=p, key=key: lora_down.lora_down(x, A, p, key),
                    lambda s=s, x=x, A=A, p=p, key=key: lora_down.lora_down_backward(
                        s, x, A, p, key, torch.zeros_like(x)
                    ),
                )
            yield from _recorded(
                tag,
                lambda y=y, s=s, B=B: lora_up_add.lora_up_add_(y, s, B, 2.0, None if quick else y[0]),
                lambda y=y, s=s, B=B: lora_up_add.lora_up_backward(y, s, B, 2.0),
            )


def _weight(kind: str, N: int, K: int) -> QuantizedWeight:
    """`kind`: "nf4 G64 nested", "fp4 G32", "int8"."""
    if kind == "int8":
        return int8.quantize(torch.zeros(N, K))
    quant_type, G, *nested = kind.split()
    return blockwise.quantize(torch.zeros(N, K), quant_type, int(G[1:]), bool(nested))


def _dequantize(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    """64 x 128 fills every program: the variant without masks, for which the budgets hold."""
    kinds = (
        ["nf4 G64 nested", "int8"]
        if quick
        else ["nf4 G64 nested", "nf4 G64", "fp4 G32 nested", "nf4 G4096 nested", "int8"]
    )
    for kind in kinds:
        yield from _recorded(f"{dname} {kind}", lambda kind=kind: dequantize.dequantize(_weight(kind, 64, 128), dtype))
    for kind in () if quick else ("nf4 G64 nested", "int8"):
        for name, N, K in (("masked", 33, 272), ("odd", 61, 71)):
            yield from _recorded(
                f"{dname} {kind} {name}", lambda k=kind, N=N, K=K: dequantize.dequantize(_weight(k, N, K), dtype)
            )


def _merge(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    cases = [("nf4 G64 nested", 256, 256, 16, dtype)]
    if not quick:
        cases += [("nf4 G64 nested", 256, 256, 100, torch.float32), ("int8", 256, 256, 16, dtype)]
        cases += [("nf4 G64 nested", 61, 71, 17, torch.float32)]
    for kind, N, K, R, adapter in cases:
        weight, A, B = _weight(kind, N, K), torch.zeros(R, K, dtype=adapter), torch.zeros(N, R, dtype=adapter)
        name = f"{dname} {kind} R{R}" + ("" if K % 16 == 0 else " odd")
        yield from _recorded(
            name + (" norms" if R > 16 else ""),
            lambda w=weight, A=A, B=B, R=R: dequantize_merge.dequantize_merge(w, A, B, 2.0, dtype, R > 16),
        )


def _products(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    """Both products for every class of M, the forward with bias and LoRA, dx with dropout; then what differs."""
    nf4 = "nf4 G64 nested"
    cases = [(M, nf4, 256, 2048, 16, dtype) for M in ((1, 64) if quick else (1, 2, 4, 8, 16, 32, 64, 512))]
    if not quick:
        for M in (1, 64):
            cases += [(M, "int8", 256, 2048, 16, dtype), (M, nf4, 256, 2048, 0, dtype)]
        cases += [(M, nf4, 250, 72, 17, torch.float32) for M in (8, 16, 32, 64, 512)]  # odd, fp32 adapter
    for M, kind, N, K, R, adapter in cases:
        tag = f"{dname} {kind} M{M} R{R}" + ("" if K % 16 == 0 else " odd")
        yield from _product(tag, M, _weight(kind, N, K), R, dtype, adapter)
        if dname == "fp32" and M == 64 and K % 16 == 0 and R:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
            yield from _product(tag + " tf32", M, _weight(kind, N, K), R, dtype, adapter)
            torch.set_float32_matmul_precision(before)


def _product(tag: str, M: int, weight: QuantizedWeight, R: int, dtype: torch.dtype, adapter: torch.dtype) -> Named:
    N, K = weight.shape
    x, dy, s = (torch.zeros(M, n, dtype=dtype) for n in (K, N, R))
    A, B = torch.zeros(R, K, dtype=adapter), torch.zeros(N, R, dtype=adapter)
    lora, lora_dx = ((s, B, 2.0), (s, A, 0.1, dropout.new_key("cpu"))) if R else ((), ())
    tiles = configs.capability(x.device) >= 80  # tl.dot
    if tiles or M <= quant_gemv.MAX_M:
        bias = dy[0] if R else None
        yield from _recorded(tag, lambda: quant_matmul.quant_matmul(x, weight, bias, *lora))
    if tiles:
        yield from _recorded(
            tag + (" dropout" if R else ""), lambda: quant_matmul.quant_matmul_dx(dy, weight, *lora_dx)
        )


def _glu(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    g = torch.zeros(4, 256, dtype=dtype)
    for activation in ("silu",) if quick else ("silu", "gelu", "gelu_tanh"):
        yield from _recorded(
            f"{dname} {activation}",
            lambda a=activation: glu.glu(g, g.clone(), a),
            lambda a=activation: glu.glu_backward_(g.clone(), g, g.clone(), a, needs_h=True),
        )


def _scale_columns(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    for N in (256,) if quick else (256, 71):
        z, factor = torch.zeros(80, N, dtype=dtype), torch.zeros(N)
        yield from _recorded(
            dname if N == 256 else f"{dname} odd",
            lambda z=z, factor=factor: scale_columns.scale_columns(z, factor, z[0]),
            lambda z=z, factor=factor: scale_columns.scale_columns_backward(z, z.clone(), factor),
        )


def _embedding(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    ids = torch.arange(64)
    for R, N in ((16, 64),) if quick else ((16, 64), (64, 64), (100, 71)):
        for adapter in dict.fromkeys((dtype, torch.float32)):
            y, A, B = (
                torch.zeros(64, N, dtype=dtype),
                torch.zeros(R, 64, dtype=adapter),
                torch.zeros(N, R, dtype=adapter),
            )
            tag = f"{dname} R{R}" + ("" if N == 64 else " odd") + (" fp32-adapter" if adapter != dtype else "")
            yield from _recorded(
                tag,
                lambda y=y, A=A, B=B: lora_embedding.lora_embedding_add_(y, ids, A, B, 2.0),
                lambda R=R, A=A: lora_embedding.segment_sum(torch.zeros(64, R, dtype=dtype), ids, A, 3),
            )
