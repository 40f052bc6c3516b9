"""lora_linear in all that it can be called with: every pair of types, routes, ranks, tokens, shapes, dropout, layouts
of x and wanted gradients, against fp64; and that two runs give the same bits.

In the interpreter pairs (triples with `slow`) of what it computes rightly. On a GPU the product of all that decides
about kernels, bf16 and 4096 tokens included, with layouts and gradients in turn.
"""

import itertools

import pytest
import torch
from torch import Tensor

from peft_fast.kernels import reference
from peft_fast.testing import assert_as_accurate_as_torch

from .covering import Row, covering
from .lora_cases import GRADIENTS, LoraCase, autograd_truth, make_case

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TYPES = ("fp32 fp32", "fp16 fp16", "fp16 fp32")  # of x, and of A and B
SUBSETS = tuple(" ".join(s) for n in range(5) for s in itertools.combinations(GRADIENTS, n))
FACTORS = {
    "types": TYPES,
    "route": ("reference", "split", "merge", "fused"),
    "base": ("dense", "nf4", "fp4", "int8"),
    "R": (1, 8, 16, 17, 64, 256),
    "M": (0, 1, 7, 16, 513),
    "KN": ((64, 48), (72, 50), (130, 71)),
    "p": (0.0, 0.1),
    "layout": ("dense", "rows apart", "columns apart", "transposed", "broadcast"),
    "needs": SUBSETS,
    "weight": (False, True),  # wants a gradient too
}


def allowed(row: Row) -> bool:
    """Whether ops.lora_linear takes it; what a part of a row does not say is taken to be right."""
    route, base, needs = row.get("route"), row.get("base"), row.get("needs")
    if base == "dense" and route in ("merge", "fused"):
        return False  # nothing to decode
    if route == "merge" and row.get("p"):
        return False  # no change of the weight
    if route == "fused" and row.get("KN", (64, 48))[0] % 8:
        return False  # rows begin within a word
    if row.get("weight") and (base not in (None, "dense") or route in ("merge", "fused")):
        return False  # k-bit weights have no gradient
    return needs != "" or row.get("weight", True)  # something must be wanted


PAIRS = covering(FACTORS, allowed)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x, or with "broadcast" its first row's, in other strides."""
    M, K = x.shape
    if layout == "rows apart":
        return torch.cat([x, x], dim=1)[:, :K]
    if layout == "columns apart":
        return x.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "transposed":
        return x.t().contiguous().t()
    return x.new_ones(1, K).mul(x[:1] if M else 1).expand(M, K) if layout == "broadcast" else x


def case_of(row: Row, device: str) -> LoraCase:
    x, adapter = (DTYPES[name] for name in row["types"].split())
    case = make_case(row["M"], *row["KN"], row["R"], x, adapter, row["base"], row["p"], device)
    case.x = laid_out(case.x, row["layout"])
    return case


def check(row: Row, device: str) -> None:
    """Outputs and gradients have the inputs' dtypes and errors of at most 1.5 times plain torch's at this dtype + eps.

    As in lora_cases.py route merge in fp32 is granted 4 times, as it rounds the merged weight.
    """
    case = case_of(row, device)
    needs = (*row["needs"].split(), *(["weight"] if row["weight"] else []))
    by = (
        dict(backend="torch", route=None) if row["route"] == "reference" else dict(backend="triton", route=row["route"])
    )
    got, again = (case.run(needs=needs, **by) for _ in range(2))
    by_torch, truth = (truth_of(case, convert) for convert in (lambda t: t, Tensor.double))
    factor, eps = 4.0 if (row["route"], case.x.dtype) == ("merge", torch.float32) else 1.5, granted(case)
    assert set(got) == {"y", *needs}
    for name, value in got.items():
        assert value.dtype == (case.x if name == "y" else getattr(case, name)).dtype, name
        assert_as_accurate_as_torch(name, value, by_torch[name], truth[name], case.x.dtype, factor, eps)
        assert torch.equal(value, again[name]), name


def granted(case: LoraCase) -> float:
    """How many eps. One; but with rank 1 and one row, or one that is repeated, all of a gradient hangs on the rounding
    of one sum, in which torch may be lucky: as many as the terms of that sum are larger than it.
    """
    if case.A.shape[0] > 1 or not case.x.shape[0] or (case.x.shape[0] > 1 and case.x.stride(0)):
        return 1.0
    x, A, B, dy = (t.double() for t in (case.x[0], case.A[0], case.B[:, 0], case.d_y))
    sums = ((x, A), (dy.sum(0), B)) if case.x.shape[0] == 1 else ((x, A), (dy.flatten(), B.repeat(dy.shape[0])))
    return max(1.0, *((a * b).abs().sum().item() / abs((a @ b).item()) for a, b in sums))


def truth_of(case: LoraCase, convert) -> dict[str, Tensor]:
    found = autograd_truth(case, convert)
    return found if case.quantized else found | {"weight": convert(case.d_y).t() @ convert(case.x)}


def name_of(row: Row) -> str:
    flags = [row["types"], row["route"], row["base"], "R{R} M{M} K{KN[0]} N{KN[1]} p{p}".format(**row), row["layout"]]
    return ", ".join([*flags, f"d({row['needs']}{' weight' if row['weight'] else ''})"])


def slow_where_large(row: Row):
    """A minute and a half each at the most: the interpreter runs one program after another."""
    return pytest.param(row, marks=[pytest.mark.slow] if row["M"] > 100 and row["R"] > 16 else [], id=name_of(row))


@pytest.mark.kernel
@pytest.mark.parametrize("row", [slow_where_large(row) for row in PAIRS])
def test_pairs(row, device):
    check(row, device)


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.parametrize("route", FACTORS["route"])
def test_triples(route, device):
    """Of smaller sizes."""
    sizes = {"R": (1, 8, 17, 64), "M": (0, 1, 7, 33), "route": (route,)}
    for row in covering({**FACTORS, **sizes}, allowed, strength=3):
        check(row, device)


GPU_TYPES = (*TYPES, "bf16 bf16", "bf16 fp32")
INNER = list(itertools.product((*FACTORS["M"], 4096), FACTORS["R"], (*FACTORS["KN"], (256, 1024)), FACTORS["p"]))


# Of the whole product, which takes longer than a lent card is there: every pair of values, in bf16 too.
ON_GPU = {
    **FACTORS, "types": GPU_TYPES, "M": (*FACTORS["M"], 4096), "KN": (*FACTORS["KN"], (256, 1024))
}  # fmt: skip
GPU_PAIRS = covering(ON_GPU, allowed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="in bf16 and 4096 tokens, for GPUs")
@pytest.mark.parametrize("row", GPU_PAIRS, ids=name_of)
def test_pairs_of_the_product(row):
    check(row, "cuda")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the whole product is for GPUs, in bf16 and 4096 tokens too")
@pytest.mark.parametrize("types", GPU_TYPES)
@pytest.mark.parametrize("route", FACTORS["route"])
@pytest.mark.parametrize("base", FACTORS["base"])
def test_the_whole_product(types, route, base):
    """K and N are here also multiples of 16 and large enough for several tiles."""
    outer = {"types": types, "route": route, "base": base}
    turns = itertools.cycle(itertools.product((False, True), FACTORS["layout"], SUBSETS[1:]))  # 15 last: out of step
    for values in INNER:
        row = outer | dict(zip(("M", "R", "KN", "p", "weight", "layout", "needs"), (*values, *next(turns))))
        row["weight"] = row["weight"] and base == "dense"
        if allowed(row):
            check(row, "cuda")


def test_every_pair_is_in_a_row():
    for (a, values), (b, others) in itertools.combinations(FACTORS.items(), 2):
        found = {(row[a], row[b]) for row in PAIRS}
        possible = {(v, w) for v, w in itertools.product(values, others) if some_row({a: v, b: w})}
        assert found == possible, (a, b)
    assert all(allowed(row) for row in PAIRS)
    assert covering(FACTORS, allowed) == PAIRS  # no chance in it
    assert {row["types"] for row in GPU_PAIRS} == set(GPU_TYPES)
    assert len(GPU_PAIRS) < 2 * len(SUBSETS) * len(FACTORS["R"])
    assert len(PAIRS) < 1.5 * len(SUBSETS) * len(FACTORS["R"])  # of which each needs a row


def some_row(part: Row) -> bool:
    """By brute force over the factors that `allowed` looks at."""
    asked = {name: FACTORS[name] for name in ("route", "base", "KN", "p", "needs", "weight") if name not in part}
    return any(allowed({**part, **dict(zip(asked, values))}) for values in itertools.product(*asked.values()))


def test_triples_are_covered_too():
    factors = {"a": (0, 1, 2), "b": (0, 1), "c": (0, 1, 2), "d": (0, 1)}
    rows = covering(factors, lambda row: (row.get("a"), row.get("d")) != (2, 1), strength=3)
    for names in itertools.combinations(factors, 3):
        found = {tuple(row[name] for name in names) for row in rows}
        wanted = itertools.product(*(factors[name] for name in names))
        assert found == {v for v in wanted if (dict(zip(names, v)).get("a"), dict(zip(names, v)).get("d")) != (2, 1)}
    assert len(rows) < 3 * 2 * 3 * 2


def test_layouts_are_what_they_say():
    x = torch.randn(5, 8)
    strides = {layout: laid_out(x, layout).stride() for layout in FACTORS["layout"]}
    assert len(set(strides.values())) == 5, strides
    assert all(torch.equal(laid_out(x, layout), x) for layout in FACTORS["layout"] if layout != "broadcast")
    assert reference.lora_down(laid_out(x, "broadcast"), torch.ones(1, 8)).unique().numel() == 1
