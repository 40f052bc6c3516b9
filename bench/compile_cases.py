"""Which launches the compile matrix compiles: what the launchers do with real arguments, under a name for each.

Shapes only matter by their divisibility by 16 and by the class that configs.py puts them into; ranks by that, by their
tile and by whether one tile is enough. What `auto` launches beyond these cases is compiled too (compile_picks.py).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch

from bench import compile_picks
from bench.launches import Launch, record
from peft_fast.kernels import (
    autotune,
    configs,
    dequantize,
    dequantize_merge,
    dropout,
    glu,
    lora_down,
    lora_embedding,
    lora_experts,
    lora_glu,
    lora_multi,
    lora_up_add,
    quant_gemv,
    quant_matmul,
    scale_columns,
)
from peft_fast.kernels.segments import Drop, of_samples, of_sorted, pieces_of
from peft_fast.quant import blockwise, int8
from peft_fast.quant.weight import QuantizedWeight

NF4, AT_ODD = "nf4 G64 nested", " at odd address"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Named = Iterator[tuple[str, Launch]]


def launches(quick: bool, target: int) -> Named:
    """(variant, launch) of everything, as it would be launched on a GPU of this compute capability."""
    known = list(_cases(quick, target))
    yield from known
    if not quick:
        yield from compile_picks.beyond([launch for _, launch in known], target)


def _cases(quick: bool, target: int) -> Named:
    with configs.target(target):
        for dname, dtype in DTYPES.items():
            if quick and dname == "fp16":  # the instructions of bf16, but for conversions
                continue
            yield from _lora(dname, dtype, quick)
            yield from _groups(dname, dtype, quick)
            yield from _multi(dname, dtype, quick)
            yield from _experts(dname, dtype, quick)
            yield from _dequantize(dname, dtype, quick)
            yield from _merge(dname, dtype, quick)
            yield from _products(dname, dtype, quick)
            yield from _glu(dname, dtype, quick)
            yield from _up_glu(dname, dtype, quick)
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
                tag, lambda y=y, s=s, B=B: lora_up_add.lora_up_add_(y, s, B, 2.0, None if quick else y[0])
            )
            # With several programs along N ds is a sum of theirs; with one it is written at once: for two ranks.
            for width in (N, 1024 + N % 16) if R in (16, 17) else (1024 + N % 16,):
                dy, of_dy = torch.zeros(M, width, dtype=dtype), torch.zeros(width, R, dtype=adapter)
                yield from _recorded(
                    tag + ("" if width == N else " wide"),
                    lambda dy=dy, s=s, B=of_dy: lora_up_add.lora_up_backward(dy, s, B, 2.0),
                )


def _groups(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    """Two and three adapters that share x, which in fp32 go one by one."""
    if dname == "fp32" or (quick and dname == "fp16"):
        return
    for R in (16,) if quick else {"fp16": (32,), "bf16": (8, 16, 17, 32, 64)}[dname]:
        # fp32 is what get_peft_model makes of adapters; of one odd rank and of the largest one dtype does.
        both = dname == "bf16" and R in (8, 16, 32) and not quick
        adapters = (dtype, torch.float32) if both else (torch.float32 if R == 17 else dtype,)
        for count, adapter in itertools.product((3,) if quick else (2, 3), adapters):
            M, N, K = 256, 64, 64
            x, s = torch.zeros(M, K, dtype=dtype), torch.zeros(M, count * R, dtype=dtype)
            y = [torch.zeros(M, N, dtype=dtype) for _ in range(count)]
            A, B = ([torch.zeros(shape, dtype=adapter)] * count for shape in ((R, K), (N, R)))
            tag = f"{dname} {count}xR{R}" + ("" if adapter == dtype else " fp32-adapter")
            for p in (0.1,) if quick else (0.0, 0.1):
                drop = [p] * count, [dropout.new_key("cpu")] * count
                yield from _recorded(
                    tag + (" dropout" if p else ""),
                    lambda x=x, A=A, drop=drop: lora_down.lora_down_group(x, A, *drop),
                    lambda s=s, x=x, A=A, drop=drop: lora_down.lora_down_group_backward(
                        s, x, A, *drop, torch.zeros_like(x)
                    ),
                )
            scale, bias = [2.0] * count, [None] * count
            yield from _recorded(
                tag, lambda y=y, s=s, B=B, scale=scale, bias=bias: lora_up_add.lora_up_add_group_(y, s, B, scale, bias)
            )
            for width in (N, 1024) if R == 16 else (1024,):
                dy, of_dy = [torch.zeros(M, width, dtype=dtype)] * count, [torch.zeros(width, R, dtype=adapter)] * count
                yield from _recorded(
                    tag + ("" if width == N else " wide"),
                    lambda dy=dy, s=s, B=of_dy, scale=scale: lora_up_add.lora_up_group_backward(dy, s, B, scale),
                )


def _multi(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    """Two adapters: in a decoding step, one row each, and with many rows. What differs by rank is the widest one's
    tile; ranks that are no multiples of 8 are loaded element by element. Rows in any order, for one rank also as they
    come."""
    ranks = (16,) if quick or dname == "fp16" else (16, 17, 64)
    for R, rows in ((r, m) for r in ranks for m in ((100,) if quick else (1, 100))):
        K = 64 if R % 8 == 0 else 67
        for factors in dict.fromkeys((dtype, torch.float32) if R < 64 else (dtype,)):
            x, s = torch.zeros(2 * rows, K, dtype=dtype), torch.zeros(2 * rows, R, dtype=dtype)
            A, B = [torch.zeros(R, K, dtype=factors)] * 2, [torch.zeros(K, R, dtype=factors)] * 2
            tag = f"{dname} R{R} M{rows}" + (" fp32-adapter" if factors != dtype else "")
            plain = () if quick else (([1, 0], [0, 1]) if R == 16 else ([1, 0],))
            for p, adapters in ((0.1, [1, 0]), *((0.0, order) for order in plain)):
                segments = of_samples(adapters, rows, 2, "cpu")
                drop = Drop((p, p), torch.zeros(2, 2, dtype=torch.int32))
                down = functools.partial(lora_multi.lora_down_multi, x, A, segments, drop)
                back = functools.partial(lora_multi.lora_down_multi_backward, s, x, A, segments, drop, x.clone())
                up = functools.partial(lora_multi.lora_up_add_multi_, x.clone(), s, B, (2.0, 2.0), segments)
                up_back = functools.partial(lora_multi.lora_up_multi_backward, x, s, B, (2.0, 2.0), segments)
                forward, backward = ((down,), (back,)) if p else ((down, up), (back, up_back))
                calls = (*forward, *(backward if rows > 1 else ()))  # nobody trains on one row
                yield from _recorded(tag + (" dropout" if p else "") + (" sorted" if adapters[0] == 0 else ""), *calls)


def _experts(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    """Pieces of 16 and of 32 rows. B has been copied into the dtype of x, its gradient is fp32."""
    for R, rows in ((16, 8), (16, 100), *(() if quick or dname == "fp16" else ((17, 100), (64, 100), (64, 8)))):
        K = 64 if R % 8 == 0 else 67
        numbers = torch.arange(2).repeat_interleave(rows)
        groups = of_sorted(numbers, 2, pieces_of)
        x, s = torch.zeros(2 * rows, K, dtype=dtype), torch.zeros(2 * rows, R, dtype=dtype)
        A, B = torch.zeros(2, R, K), torch.zeros(2, K, R, dtype=dtype)
        calls = (
            functools.partial(lora_experts.pieces_of, groups.starts, groups.M, groups.size),
            functools.partial(lora_experts.lora_down_experts, x, A, groups),
            functools.partial(lora_experts.lora_up_add_experts_, x.clone(), s, B, 2.0, groups),
            functools.partial(lora_experts.lora_up_experts_backward, x, s, B, 2.0, groups),
            functools.partial(lora_experts.lora_down_experts_backward, s, x, A, groups, x.clone()),
        )
        yield from _recorded(f"{dname} R{R} M{rows} experts", *calls)


def _weight(kind: str, N: int, K: int) -> QuantizedWeight:
    """`kind`: "nf4 G64 nested", "fp4 G32", "int8"; "at odd address" behind it. The type of four bits is in the table of
    codes, which a kernel is given: fp4 compiles to the same."""
    kind, _, odd = kind.partition(" at ")
    if kind == "int8":
        weight = int8.quantize(torch.zeros(N, K))
    else:
        quant_type, G, *nested = kind.split()
        weight = blockwise.quantize(torch.zeros(N, K), quant_type, int(G[1:]), bool(nested))
    if not odd:
        return weight
    return dataclasses.replace(weight, data=torch.cat([weight.data[:1], weight.data])[1:])


def _dequantize(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    """64 x 128 fills every program: the variant without masks, for which the budgets hold."""
    kinds = [NF4, "int8"] if quick else [NF4, "nf4 G64", "fp4 G32 nested", "nf4 G4096 nested", "int8", NF4 + AT_ODD]
    for kind in kinds:
        yield from _recorded(f"{dname} {kind}", lambda kind=kind: dequantize.dequantize(_weight(kind, 64, 128), dtype))
    for kind in () if quick else (NF4, "int8", NF4 + AT_ODD, "int8" + AT_ODD):
        for name, N, K in (("masked", 33, 272), ("odd", 61, 71)):
            yield from _recorded(
                f"{dname} {kind} {name}", lambda k=kind, N=N, K=K: dequantize.dequantize(_weight(k, N, K), dtype)
            )


def _merge(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    cases = [(NF4, 256, 256, 16, dtype)]
    if not quick:
        cases += [(NF4, 256, 256, 100, torch.float32), (NF4, 61, 71, 17, torch.float32), ("int8", 256, 256, 16, dtype)]
        cases += [(kind + AT_ODD, 256, 256, 16, dtype) for kind in (NF4, "int8")]
    for kind, N, K, R, adapter in cases:
        weight, A, B = _weight(kind, N, K), torch.zeros(R, K, dtype=adapter), torch.zeros(N, R, dtype=adapter)
        name = f"{dname} {kind} R{R}" + ("" if K % 16 == 0 else " odd")
        yield from _recorded(
            name + (" norms" if R > 16 else ""),
            lambda w=weight, A=A, B=B, R=R: dequantize_merge.dequantize_merge(w, A, B, 2.0, dtype, R > 16),
        )


def _products(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    """Both products for every class of M, the forward with bias and LoRA, dx with dropout; then what differs."""
    classes = (1, 64) if quick else (1, 2, 4, 8, 16, 32, 64, 512)
    cases = [(M, NF4, 256, 2048, 16, dtype) for M in classes]
    if not quick:
        for M in (1, 64):
            cases += [(M, "int8", 256, 2048, 16, dtype), (M, NF4, 256, 2048, 0, dtype)]
        cases += [(M, "int8" + AT_ODD, 256, 2048, 16, dtype) for M in (1, 64)]
        cases += [(64, NF4 + AT_ODD, 256, 2048, 16, dtype)]
        cases += [(M, NF4, 250, 72, 17, torch.float32) for M in (8, 16, 32, 64, 512)]  # odd, fp32 adapter
    for M, kind, N, K, R, adapter in cases:
        tag = f"{dname} {kind} M{M} R{R}" + ("" if K % 16 == 0 else " odd")
        yield from _product(tag, M, _weight(kind, N, K), R, dtype, adapter)
        if dname == "fp32" and M == 64 and K % 16 == 0 and R:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
            yield from _product(tag + " tf32", M, _weight(kind, N, K), R, dtype, adapter)
            torch.set_float32_matmul_precision(before)
    for M in () if quick else classes:
        yield from _second_candidates(f"{dname} {NF4} M{M} R16", M, _weight(NF4, 256, 2048), dtype)


def _second_candidates(tag: str, M: int, weight: QuantizedWeight, dtype: torch.dtype) -> Named:
    """What PEFT_FAST_AUTOTUNE=1 tries against the launch configurations that are taken without it."""
    have_several: set[str] = set()

    def pick(kernel: str, key: tuple, candidates: list[dict], *_: object) -> dict:
        if len(candidates) > 1:
            have_several.add(f"{kernel}_kernel")
        return candidates[-1]

    with patch.object(autotune, "pick", pick):
        launched = list(_product(tag + " second", M, weight, 16, dtype, dtype))
    yield from ((variant, launch) for variant, launch in launched if launch.name in have_several)


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


def _up_glu(dname: str, dtype: torch.dtype, quick: bool) -> Named:
    """In fp32 it is lora_up_add and glu. What differs with the activation and without updates: for one rank."""
    if dname == "fp32":
        return
    for R in (16,) if quick else {"fp16": (16, 64), "bf16": (8, 16, 17, 32, 64)}[dname]:
        g, s = torch.zeros(64, 256, dtype=dtype), torch.zeros(64, 2 * R, dtype=dtype)
        for adapter in dict.fromkeys((dtype, torch.float32)):
            B = [torch.zeros(256, R, dtype=adapter)] * 2
            tag = f"{dname} R{R}" + (" fp32-adapter" if adapter != dtype else "")
            every = dname == "bf16" and R == 16 and not quick
            for activation, update in (
                ("silu", True), *((("silu", False), ("gelu", True), ("gelu_tanh", True)) if every else ()),
            ):  # fmt: skip
                yield from _recorded(
                    f"{tag} {activation}" + ("" if update else " over g"),
                    lambda a=activation, k=update, g=g, s=s, B=B: lora_glu.lora_up_glu(
                        g, g.clone(), s, B, [2.0, 1.5], a, k, None if k else g
                    ),
                )
            A = torch.zeros(R, 256, dtype=adapter)
            yield from _recorded(
                f"{tag} silu",
                lambda g=g, s=s, B=B, A=A, R=R: lora_glu.lora_glu_backward_(
                    g.clone(), g, g.clone(), s, B, [2.0, 1.5], s[:, :R], A, 0.1, dropout.new_key("cpu"), "silu"
                ),
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
