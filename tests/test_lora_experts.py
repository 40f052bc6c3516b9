"""lora_experts, in torch and in Triton: mixtures' experts against fp64, expert by expert."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.counts import measure
from peft_fast import ops
from peft_fast.kernels import reference, reference_experts, segments
from peft_fast.ops import ExpertAdapter, group_rows, lora_experts
from peft_fast.quant import blockwise
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.testing import assert_as_accurate_as_torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass
class Case:
    x: Tensor  # [M, K]
    weight: Tensor | QuantizedWeight
    numbers: Tensor  # [M], ascending
    E: int
    A: list[Tensor]
    B: list[Tensor]
    scales: list[float]
    is_transposed: bool
    d_y: Tensor

    def leaves(self) -> dict[str, Tensor]:
        T = range(len(self.A))
        named = {"x": self.x, **{f"A{t}": self.A[t] for t in T}, **{f"B{t}": self.B[t] for t in T}}
        return {name: tensor.detach().requires_grad_() for name, tensor in named.items()}

    def run(self, backend: str, needs: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """{"y": output, name: gradient for each name in `needs`, default all}"""
        named = self.leaves()
        needs = tuple(named) if needs is None else needs
        for name, leaf in named.items():
            leaf.requires_grad_(name in needs)
        T = range(len(self.A))
        adapters = [ExpertAdapter(named[f"A{t}"], named[f"B{t}"], self.scales[t]) for t in T]
        groups = group_rows(self.numbers, self.E, backend)
        y = lora_experts(named["x"], self.weight, groups, adapters, is_transposed=self.is_transposed, backend=backend)
        grads = torch.autograd.grad(y, [named[n] for n in needs], self.d_y) if needs else []
        return {"y": y.detach(), **dict(zip(needs, grads))}

    def dense(self) -> Tensor:
        """[E, N, K]"""
        W = self.weight if isinstance(self.weight, Tensor) else reference.dequantize(self.weight, self.x.dtype)
        W = W.unflatten(0, (self.E, -1)) if W.dim() == 2 else W
        return W.mT if self.is_transposed else W

    def truth(self, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """From plain torch, row by row: each row's own W + scale * B A. Factors are rounded to x's dtype first."""
        leaves = {name: convert(t.detach()).requires_grad_() for name, t in self.leaves().items()}
        named = {
            name: t.to(self.x.dtype).to(t.dtype) if t.dtype == torch.float64 else t.to(self.x.dtype)
            for name, t in leaves.items()
        }
        x, W = named["x"], convert(self.dense())[self.numbers]
        y = torch.einsum("mk,mnk->mn", x, W)
        for t, scale in enumerate(self.scales):
            A = named[f"A{t}"].unflatten(0, (self.E, -1))[self.numbers]
            B = named[f"B{t}"].unflatten(1, (-1, self.E)).permute(2, 0, 1)[self.numbers]
            y = y + scale * torch.einsum("mr,mnr->mn", torch.einsum("mk,mrk->mr", x, A), B)
        grads = torch.autograd.grad(y, list(leaves.values()), convert(self.d_y).to(y.dtype))
        return {"y": y.detach(), **dict(zip(leaves, grads))}


def make_case(
    rows: list[int],
    ranks: tuple[int, ...] = (8,),
    K: int = 64,
    N: int = 48,
    dtype: torch.dtype = FP32,
    factors: torch.dtype | None = None,
    base: str = "dense",
    is_transposed: bool = False,
    device: str = "cpu",
) -> Case:
    """rows: of each expert; ranks: of each adapter"""
    E, M, T = len(rows), sum(rows), len(ranks)
    W = (torch.randn(E, N, K) / K**0.5).to(dtype)
    W = W.mT.contiguous() if is_transposed else W
    weight = W if base == "dense" else blockwise.quantize(W.flatten(0, 1), base)
    return Case(
        x=torch.randn(M, K, dtype=dtype, device=device),
        weight=weight.to(device),
        numbers=torch.arange(E, device=device).repeat_interleave(torch.tensor(rows, device=device)),
        E=E,
        A=[(torch.randn(R * E, K) / K**0.5).to(device, factors or dtype) for R in ranks],
        B=[torch.randn(N, R * E).to(device, factors or dtype) for R in ranks],
        scales=[(1.7, -0.3)[t % 2] for t in range(T)],
        is_transposed=is_transposed,
        d_y=torch.randn(M, N, dtype=dtype, device=device),
    )


CASES = {
    "one expert": lambda d: make_case([33], device=d),
    "some without rows": lambda d: make_case([0, 5, 0, 0, 40, 1, 0], device=d),
    "one row each": lambda d: make_case([1] * 20, device=d),
    "many rows": lambda d: make_case([70, 3, 100, 64, 32, 31], device=d),
    "odd sizes": lambda d: make_case([17, 0, 6], (3,), K=71, N=33, device=d),
    "rank 1": lambda d: make_case([17, 6], (1,), device=d),
    "two adapters": lambda d: make_case([17, 6, 9], (8, 20), device=d),
    "wide rank": lambda d: make_case([17, 6], (96,), device=d),
    "transposed": lambda d: make_case([17, 0, 6], is_transposed=True, device=d),
    "split along K": lambda d: make_case([1, 0, 2], K=1024, device=d),
    "nf4": lambda d: make_case([17, 0, 6], base="nf4", device=d),
    "nf4, transposed": lambda d: make_case([17, 0, 6], base="nf4", is_transposed=True, device=d),
    "fp16": lambda d: make_case([17, 40], (16,), dtype=FP16, device=d),
    "fp16, fp32 adapters": lambda d: make_case([17, 40], (3,), dtype=FP16, factors=FP32, device=d),
    "no adapters": lambda d: make_case([17, 6], (), device=d),
}


def check_against_fp64(case: Case, backend: str) -> None:
    got, by_torch, truth = case.run(backend), case.truth(lambda t: t), case.truth(Tensor.double)
    dtypes = {"y": case.x.dtype, **{name: leaf.dtype for name, leaf in case.leaves().items()}}
    for name, value in got.items():
        assert value.dtype == dtypes[name], name
        assert_as_accurate_as_torch(name, value, by_torch[name], truth[name], case.x.dtype, eps=1.0)


@pytest.mark.parametrize("name", CASES)
def test_reference_against_fp64(name):
    check_against_fp64(CASES[name]("cpu"), "torch")


@pytest.mark.kernel
@pytest.mark.parametrize("name", CASES)
def test_kernels_against_fp64(name, device):
    check_against_fp64(CASES[name](device), "triton")


@pytest.mark.parametrize("factors", [BF16, FP32])
def test_reference_in_bf16(factors):
    check_against_fp64(make_case([17, 0, 36], (16,), dtype=BF16, factors=factors), "torch")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter computes bf16 wrongly")
@pytest.mark.parametrize("factors", [BF16, FP32])
@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("E", [1, 128])
def test_kernels_in_bf16(factors, rows, E):
    counts = [rows * (1, 0, 3)[e % 3] for e in range(E)]
    check_against_fp64(make_case(counts, (16,), K=1024, N=512, dtype=BF16, factors=factors, device="cuda"), "triton")


@pytest.mark.parametrize("rows", [[0, 5, 0, 0, 40, 1, 0], [1], [0, 0, 64], [16, 16, 33]])
@pytest.mark.parametrize("size", [16, 32])
def test_pieces_are_those_of_lengths_that_the_host_knows(rows, size):
    starts, M = torch.tensor(segments.starts_of(rows), dtype=torch.int32), sum(rows)
    pieces = segments.pieces_of(starts, M, size)
    assert pieces.shape == (M // size + len(rows), 4)
    assert pieces.dtype == torch.int32
    expected = segments.blocks(tuple(rows), size, torch.device("cpu"))
    assert torch.equal(pieces[: len(expected)], expected)
    assert not pieces[len(expected) :, 2].any()


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [[0, 5, 0, 0, 40, 1, 0], [1], [0, 0, 64], [16, 16, 33], [3] * 70, [2000, 1]])
@pytest.mark.parametrize("size", [16, 32])
def test_pieces_of_the_kernel(rows, size, device):
    from peft_fast.kernels import lora_experts as kernels

    starts, M = torch.tensor(segments.starts_of(rows), dtype=torch.int32, device=device), sum(rows)
    pieces, expected = kernels.pieces_of(starts, M, size), segments.pieces_of(starts, M, size)
    there = expected[:, 2] > 0
    assert torch.equal(pieces[there], expected[there])
    assert not pieces[~there, 2].any()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernel)])
@pytest.mark.parametrize("needs", [(), ("x",), ("A0",), ("B0",), ("x", "B1"), ("A0", "A1")])
def test_any_subset_of_gradients(needs, backend, device):
    case = make_case([5, 0, 9], (8, 4), device=device if backend == "triton" else "cpu")
    all_of_them, some = case.run(backend), case.run(backend, needs)
    assert some.keys() == {"y", *needs}
    for name, value in some.items():
        assert torch.equal(value, all_of_them[name]), name


@pytest.mark.parametrize("is_transposed", [False, True])
def test_gradient_of_a_dense_weight(is_transposed):
    case = make_case([5, 0, 9], is_transposed=is_transposed)
    W = case.weight.requires_grad_()
    groups = group_rows(case.numbers, case.E)
    y = lora_experts(
        case.x, W, groups, [ExpertAdapter(case.A[0], case.B[0], 2.0)], is_transposed=is_transposed, backend="torch"
    )
    (got,) = torch.autograd.grad(y, W, case.d_y)
    own = (W.mT if is_transposed else W)[case.numbers]
    (expected,) = torch.autograd.grad(torch.einsum("mk,mnk->mn", case.x, own), W, case.d_y)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernel)])
def test_no_rows(backend, device):
    got = make_case([0, 0, 0], device=device if backend == "triton" else "cpu").run(backend)
    assert got["y"].shape == (0, 48)
    assert not got["A0"].any()
    assert not got["B0"].any()


def test_launches_do_not_grow_with_the_number_of_experts():
    """Beside torch's product: two in the forward and a copy of B, four in the backward, and copies of B and of its
    gradient."""
    counts = {(E, R): _launches(E, R) for E in (2, 16, 128) for R in (0, 16)}
    beside = {E: tuple(own - base for own, base in zip(counts[E, 16], counts[E, 0])) for E in (2, 16, 128)}
    assert beside == {2: (3, 6), 16: (3, 6), 128: (3, 6)}


def _launches(E: int, R: int) -> tuple[int, int]:
    case = make_case([256 // E] * E, (R,) if R else ())
    named = case.leaves()
    adapters = [ExpertAdapter(named["A0"], named["B0"], 2.0)] if R else []
    groups = group_rows(case.numbers, E, "torch")._replace(
        pieces=torch.zeros((256 // 32 + E, 4), dtype=torch.int32), size=16 if E >= 16 else 32
    )

    def forward() -> Tensor:
        return lora_experts(named["x"], case.weight, groups, adapters)

    def backward(y: Tensor) -> object:
        return torch.autograd.grad(y, list(named.values()), case.d_y)

    measure(lambda: backward(forward()), triton=True)  # tables are copied to the device once
    y, of_forward = measure(forward, triton=True)
    _, of_backward = measure(lambda: backward(y), triton=True)
    return of_forward.ops.total(), of_backward.ops.total()


def test_second_derivatives_and_torch_func():
    case = make_case([3, 0, 4], (2,), K=8, N=6)
    groups, W = group_rows(case.numbers, case.E), case.weight.double()
    inputs = [t.double().requires_grad_() for t in (case.x, case.A[0], case.B[0])]

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_experts(x, W, groups, [ExpertAdapter(A, B, 0.5)])

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    of_rows = torch.func.jacrev(call)(*inputs)
    assert of_rows.shape == (7, 6, 7, 8)
    torch.testing.assert_close(of_rows[0, :, 0], torch.autograd.functional.jacobian(call, tuple(inputs))[0][0, :, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: {"x": c.x[:, :-1]}, ValueError, "x must be"),
        (lambda c: {"x": c.x[:-1]}, ValueError, "x must be"),
        (lambda c: {"x": c.x.half()}, TypeError, "cast one of them"),
        (lambda c: {"weight": c.weight[:1]}, ValueError, "of 3 experts"),
        (lambda c: {"adapters": [ExpertAdapter(c.A[0], c.B[0].t(), 1.0)]}, ValueError, "B \\[48, R \\* 3\\]"),
        (lambda c: {"adapters": [ExpertAdapter(c.A[0][:-1], c.B[0], 1.0)]}, ValueError, "A must be"),
        (lambda c: {"is_transposed": True}, ValueError, "x must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    case = make_case([3, 0, 4])
    arguments = {"x": case.x, "weight": case.weight, "groups": group_rows(case.numbers, case.E)}
    with pytest.raises(error, match=message):
        lora_experts(**{**arguments, **change(case)})


def test_reference_is_the_truth_expert_by_expert():
    case = make_case([5, 0, 9])
    adapters = [(case.A[0].unflatten(0, (3, -1)), case.B[0].unflatten(1, (-1, 3)).permute(2, 0, 1), 1.7)]
    y = reference_experts.lora_experts(case.x, case.dense(), adapters, group_rows(case.numbers, 3))
    torch.testing.assert_close(y, case.truth(lambda t: t)["y"])


def test_which_backend():
    assert ops.choose_experts(torch.device("cpu"), FP32, set(), "torch").route == "reference"


def opcheck_all(backend: str, device: str) -> None:
    op, case = torch.ops.peft_fast, make_case([3, 0, 6], (4, 8), base="nf4", device=device)
    groups, weight = segments.of_sorted(case.numbers, case.E, segments.pieces_of), case.weight
    common = [weight.tensors(), str(weight.format), False, groups.starts, groups.pieces, groups.size, case.A, case.B]
    torch.library.opcheck(op.lora_experts.default, (case.x, *common, case.scales, backend))
    s = [torch.randn(9, R, device=device) for R in (4, 8)]
    backward = case.d_y, case.x, s, *common, case.scales, [True, True], backend
    torch.library.opcheck(op.lora_experts_backward.default, backward)


@pytest.mark.kernel
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend, device):
    opcheck_all(backend, device)
