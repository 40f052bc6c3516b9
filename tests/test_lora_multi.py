"""lora_linear_multi, in torch and in Triton: batches of many adapters against fp64, against each adapter alone, and in
batches that hypothesis thinks up."""

import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.counts import measure
from peft_fast import ops
from peft_fast.kernels import reference, reference_multi, segments
from peft_fast.testing import assert_as_accurate_as_torch

from .conftest import INTERPRETING
from .multi_cases import check_against_fp64, check_to_1e_5, make_case

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def scattered(lengths: dict[int, int]) -> list[int]:
    """So many rows of each adapter, in any order, the same in every run."""
    rows = [t for t, count in lengths.items() for _ in range(count)]
    random.Random(0).shuffle(rows)
    return rows


CASES = {
    "one adapter": lambda d: make_case([0] * 33, [8], device=d),
    "some of no adapter": lambda d: make_case(scattered({-1: 5, 0: 7, 1: 3, 2: 20}), [8, 16, 3], device=d),
    "all of no adapter": lambda d: make_case([-1] * 5, [8, 4], device=d),
    "no adapters": lambda d: make_case([-1] * 5, [], device=d),
    "no rows": lambda d: make_case([], [8, 4], device=d),
    "one without rows": lambda d: make_case(scattered({0: 4, 2: 9}), [8, 8, 8], device=d),
    "rank 0": lambda d: make_case(scattered({0: 4, 1: 9}), [0, 5], device=d),
    "all of rank 0": lambda d: make_case(scattered({0: 4, 1: 9}), [0, 0], device=d),
    "one row each": lambda d: make_case(range(20), [8] * 20, device=d),
    "decode, split along K": lambda d: make_case(range(3), [8, 8, 24], K=1024, device=d),
    "ranks 1 to 256": lambda d: make_case(scattered(dict.fromkeys(range(5), 6)), [1, 7, 16, 65, 256], device=d),
    "odd sizes": lambda d: make_case(scattered({-1: 2, 0: 17, 1: 6}), [3, 10], K=71, N=33, device=d),
    "dropout": lambda d: make_case(scattered({-1: 2, 0: 17, 1: 6, 2: 5}), [8, 3, 8], p=(0.1, 0.0, 0.5), device=d),
    "dropout, odd sizes": lambda d: make_case(scattered({0: 17, 1: 40}), [8, 8], K=71, N=33, p=(0.2,), device=d),
    "everything dropped": lambda d: make_case(scattered({0: 9, 1: 4}), [8, 8], p=(1.0, 0.0), device=d),
    "nf4": lambda d: make_case(scattered({-1: 2, 0: 17, 1: 6}), [8, 16], base="nf4", p=(0.1,), device=d),
    "int8": lambda d: make_case(scattered({-1: 2, 0: 17, 1: 6}), [8, 16], base="int8", device=d),
    "no base layer": lambda d: make_case(scattered({-1: 2, 0: 17, 1: 6}), [8, 16], base=None, device=d),
    "fp16": lambda d: make_case(scattered({-1: 3, 0: 17, 1: 36}), [8, 16], dtype=FP16, p=(0.1, 0.0), device=d),
    "fp16, fp32 adapters": lambda d: make_case(scattered({0: 17, 1: 36}), [8, 3], dtype=FP16, factors=FP32, device=d),
}


@pytest.mark.parametrize("name", CASES)
def test_reference_against_fp64(name):
    check_against_fp64(CASES[name]("cpu"), "torch")


@pytest.mark.kernel
@pytest.mark.parametrize("name", CASES)
def test_kernels_against_fp64(name, device):
    check_against_fp64(CASES[name](device), "triton")


@pytest.mark.parametrize("factors", [BF16, FP32])
def test_reference_in_bf16(factors):
    case = make_case(scattered({-1: 3, 0: 17, 1: 36}), [8, 16], dtype=BF16, factors=factors, p=(0.1, 0.0))
    check_against_fp64(case, "torch")


@pytest.mark.slow
def test_4096_adapters():
    check_to_1e_5(
        make_case(scattered(dict.fromkeys(range(4096), 1)), [(1, 2, 3)[t % 3] for t in range(4096)], 8, 4), "torch"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter computes bf16 wrongly")
@pytest.mark.parametrize("factors", [BF16, FP32])
@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("T", [1, 64])
def test_kernels_in_bf16(factors, rows, T):
    adapter = scattered(dict.fromkeys(range(-1, T), rows))
    ranks = [(8, 16, 64, 1, 256)[t % 5] for t in range(T)]
    case = make_case(adapter, ranks, K=1024, N=512, dtype=BF16, factors=factors, p=(0.1, 0.0), device="cuda")
    check_against_fp64(case, "triton")


@st.composite
def batches(draw) -> partial:
    """Any segments: empty ones, one row each, all of the base model, ranks from 1 to 256, rows in any order. Not made
    yet, so that what fails is printed as these numbers."""
    T = draw(st.integers(0, 12))
    ranks = draw(st.lists(st.one_of(st.integers(1, 20), st.integers(1, 256)), min_size=T, max_size=T))
    rows = st.integers(-1, T - 1)
    adapter = draw(st.one_of(st.lists(rows, max_size=60), st.permutations(range(T)), st.just([-1] * 7)))
    K, N = draw(st.sampled_from([(32, 48), (33, 20), (7, 64)]))
    p = draw(st.lists(st.sampled_from([0.0, 0.1, 0.9]), min_size=1, max_size=3))
    base = draw(st.sampled_from(["dense", None] if T else ["dense"]))
    return partial(make_case, tuple(adapter), tuple(ranks), K, N, base=base, p=tuple(p))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(batches())
def test_any_batch_in_torch(batch):
    check_to_1e_5(batch(), "torch")


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETING, reason="on the CPU")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches())
def test_any_batch_in_the_interpreter(batch):
    check_to_1e_5(batch(), "triton")


@pytest.mark.kernel
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_as_each_adapter_alone(backend, device):
    """Output and gradients of an adapter are those of lora_linear with its rows, dropout included: the others in the
    batch change nothing."""
    case = make_case(scattered({-1: 3, 0: 17, 1: 6, 2: 9}), [8, 16, 5], p=(0.3, 0.0, 0.5), device=device)
    together = case.run(backend)
    adapter = torch.full((case.x.shape[0],), -1)
    starts = case.segments.starts
    for t in range(3):
        adapter[case.segments.order[starts[t] : starts[t + 1]].long().cpu()] = t
    for t in range(3):
        rows = torch.nonzero(adapter == t)[:, 0].to(device)
        x, A, B = (leaf.detach().requires_grad_() for leaf in (case.x[rows], case.A[t], case.B[t]))
        y = ops.lora_linear(
            x, case.weight, A, B, case.scales[t], case.bias,
            dropout_p=case.p[t], dropout_key=case.keys[t], backend=backend,
        )  # fmt: skip
        dx, dA, dB = torch.autograd.grad(y, (x, A, B), case.d_y[rows])
        for name, alone, own in (
            ("y", y, together["y"][rows]), ("x", dx, together["x"][rows]),
            ("A", dA, together[f"A{t}"]), ("B", dB, together[f"B{t}"]),
        ):  # fmt: skip
            torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-5, msg=lambda m, n=name, t=t: f"{n} of {t}: {m}")


@pytest.mark.kernel
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_runs_give_the_same_bits(backend, device):
    case = make_case(scattered({-1: 3, 0: 17, 1: 6, 2: 9}), [8, 16, 5], p=(0.3, 0.0), device=device)
    first, second = case.run(backend), case.run(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mode", [torch.inference_mode, partial(FakeTensorMode, allow_non_fake_inputs=True)])
def test_what_other_modes_leave_serves_training(mode):
    """Memory for stacks and tables of places are kept from call to call."""
    case = make_case(scattered({-1: 1, 0: 2, 1: 3, 2: 2}), [8, 8, 8], K=520)
    vars(reference_multi._of_thread).clear()
    with mode() as entered:
        x, *A = (entered.from_tensor(t) if entered else t for t in (case.x, *case.A))
        reference_multi.lora_down_multi(x, A, case.segments, segments.Drop((0.0,) * 3))
    check_against_fp64(case, "torch")


@pytest.mark.parametrize("needs", [(), ("x",), ("A0",), ("B1",), ("x", "A1"), ("bias",), ("A0", "B0")])
def test_only_the_gradients_that_are_wanted(needs):
    case = make_case(scattered({-1: 3, 0: 7, 1: 6}), [8, 5])
    everything, some = case.run("torch"), case.run("torch", needs)
    assert set(some) == {"y", *needs}
    assert all(torch.equal(value, everything[name]) for name, value in some.items())


def test_kept_for_backward_is_x_and_s():
    """And the adapters and the weight, which are there anyway."""
    case, kept = make_case(scattered({0: 30, 1: 34}), [8, 5], p=(0.1,)), []
    x, *leaves = case.leaves()
    own = {t.data_ptr() for t in (x, *leaves, case.weight, case.keys, case.segments.order)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapters = ops.Adapters(leaves[:2], leaves[2:4], case.scales, case.p)
        ops.lora_linear_multi(x, case.weight, adapters, case.segments, dropout_keys=case.keys)
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(64, 8)]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives(p):
    case = make_case(scattered({-1: 1, 0: 2, 1: 3}), [2, 1], K=6, N=4, p=(p, 0.0), dtype=torch.float64)
    given = [case.x, *case.A, *case.B, case.bias]

    def call(x, A0, A1, B0, B1, bias):
        adapters = ops.Adapters([A0, A1], [B0, B1], case.scales, case.p)
        return ops.lora_linear_multi(x, case.weight, adapters, case.segments, bias, dropout_keys=case.keys)

    leaves = [leaf.detach().requires_grad_() for leaf in given]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    by_func = torch.func.grad(lambda x: call(x, *given[1:]).sin().sum())(case.x)
    torch.testing.assert_close(by_func, torch.autograd.grad(call(*leaves).sin().sum(), leaves[0])[0])


def opcheck_all(backend: str, device: str) -> None:
    """Every row has an adapter, all of one rank: what else there is of s is not written by Triton, and opcheck would
    compare it."""
    case = make_case(scattered({0: 5, 1: 3}), [4, 4], p=(0.1,), device=device)
    order, lengths = case.segments.order, list(case.segments.lengths)
    common = order, lengths, case.scales, case.p, case.keys
    op = torch.ops.peft_fast
    args = case.x, [case.weight], "", case.bias, case.A, case.B, *common, FP32, backend
    torch.library.opcheck(op.lora_linear_multi.default, args)
    s = torch.randn(8, 4, device=device)
    backward = case.d_y, case.x, s, [case.weight], "", case.A, case.B, *common, [True, True, True], backend
    torch.library.opcheck(op.lora_linear_multi_backward.default, backward)


@pytest.mark.kernel
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend, device):
    opcheck_all(backend, device)


def test_segments_of_samples_are_those_of_their_rows():
    for adapter in ([0, 1, 2], [1, 0, -1, 1], [], [-1, -1], [2, 2, 0], [0, 0, 2]):
        by_samples = segments.of_samples(adapter, 3, 3, "cpu")
        by_rows = segments.of_rows(torch.tensor(adapter, dtype=torch.int64).repeat_interleave(3), 3)
        assert by_samples.lengths == by_rows.lengths
        assert by_samples.M == by_rows.M == 3 * len(adapter)
        order = torch.arange(by_rows.M) if by_samples.order is None else by_samples.order
        assert order.tolist() == by_rows.order.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(9, 64)), "segments are of 8 rows, and x"),
        (dict(x=torch.randn(8, 60)), "x must have K=64 features"),
        (dict(weight=torch.randn(48, 60), x=torch.randn(8, 60)), "adapters are for a weight of shape"),
        (dict(weight=None), "without a weight"),
        (dict(bias=torch.zeros(5)), "bias must be"),
        (dict(dropout_keys=None), r"needs dropout_keys, int32 \[2, 2\]"),
        (dict(segments=segments.of_samples([0] * 8, 1, 1, "cpu")), "segments are of 1 adapters, got 2"),
    ],
)
def test_refuses(change, message):
    case = make_case([0, 1] * 4, [4, 3], p=(0.1,))
    adapters = ops.Adapters(case.A, case.B, case.scales, case.p)
    arguments = dict(x=case.x, weight=case.weight, adapters=adapters, segments=case.segments, bias=case.bias)
    with pytest.raises(ValueError, match=message):
        ops.lora_linear_multi(**{**arguments, "dropout_keys": case.keys, **change})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([torch.zeros(4, 8)], [torch.zeros(6, 4)], []), ValueError, "1 adapters scales must have as many"),
        (([torch.zeros(4, 8)], [torch.zeros(6, 3)], [1.0]), ValueError, r"A must be \[R, 8\] and B \[6, R\]"),
        (([torch.zeros(4, 8)], [torch.zeros(6, 4)], [1.0], [2.0]), ValueError, "dropout_p must lie in"),
        (([torch.zeros(4, 8, dtype=torch.int8)], [torch.zeros(6, 4)], [1.0]), TypeError, "cast them"),
    ],
)
def test_adapters_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.Adapters(*arguments)


@pytest.mark.kernel
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_constant_adapters(backend, device):
    """What is kept of them serves other batches and lengths too, and gives the same outputs."""
    first, second = (
        make_case(scattered(lengths), [8, 8, 3, 8], device=device)
        for lengths in ({0: 1, 1: 1, 2: 1, 3: 1}, {-1: 3, 0: 5, 2: 5, 3: 2})
    )
    adapters = ops.Adapters(first.A, first.B, first.scales, constant=True)
    for case in (first, second, first):
        case.A, case.B, case.p = first.A, first.B, [0.0] * 4
        with torch.no_grad():
            y = ops.lora_linear_multi(case.x, case.weight, adapters, case.segments, case.bias, backend=backend)
        expected = case.run(backend, ())["y"]
        if backend == "triton":
            assert torch.equal(y, expected)
        else:  # the layout of what is kept is another, and with it the order of sums
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert adapters.A.kept


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize(
    ("rows", "K"), [(1, 256), (3, 256), (1, 33)], ids=["sums", "several rows", "too small for sums"]
)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_constant_adapters_at_once(dtype, rows, K, base, monkeypatch):
    """As many rows of each adapter, in their order: one product for all A and one for all B, and of one row sums."""
    T, N = 64, 192 if K > 64 else 9
    case = make_case([t for t in range(T) for _ in range(rows)], [16 if K > 64 else 3] * T, K, N, dtype, base=base)
    case.scales = [0.7] * T
    case.segments = ops.segments_of_samples(range(T), rows, T, "cpu")
    adapters = ops.Adapters(case.A, case.B, case.scales, constant=True)
    sums, own = [], torch.embedding_bag
    monkeypatch.setattr(torch, "embedding_bag", lambda *args: sums.append(args[0].shape) or own(*args))

    def run(x):
        return ops.lora_linear_multi(x, case.weight, adapters, case.segments, case.bias, backend="torch")

    def plain(dtype):
        W = (reference.dequantize(case.weight, case.x.dtype) if base == "nf4" else case.weight).to(dtype)
        y = torch.nn.functional.linear(case.x.to(dtype), W, case.bias.to(dtype)).view(T, rows, N)
        A, B = (torch.stack(factors).to(dtype).mT for factors in (case.A, case.B))
        return (y + 0.7 * (case.x.to(dtype).view(T, rows, K) @ A @ B)).view(T * rows, N)

    with torch.no_grad():
        y = run(case.x)
        assert torch.equal(run(case.x), y)
        assert sums == ([(T * K, 16), (T * 16, N)] * 2 if rows == 1 and K == 256 else [])
        strided = run(torch.stack([case.x, case.x], -1)[..., 0])
        by_sample = run(case.x.view(T, rows, K))
    assert torch.equal(by_sample, y.view(T, rows, N))
    assert [key for key in adapters.A.kept if key[0] == "at once"]
    by_torch, truth = plain(dtype), plain(torch.float64)
    for name, value in {"y": y, "strided": strided, "with gradients": run(case.x).detach()}.items():
        assert_as_accurate_as_torch(name, value, by_torch, truth)
    with torch.no_grad(), pytest.raises(ValueError, match="x must have K"):
        run(case.x[:, 1:])
    with torch.no_grad(), pytest.raises(ValueError, match="the segments are of"):
        run(case.x[1:])


def test_refuses_numbers_of_no_adapter():
    with pytest.raises(ValueError, match="numbered from 0 to 1, or -1"):
        segments.of_rows(torch.tensor([0, 2]), 2)
    with pytest.raises(TypeError, match="int32 or int64"):
        segments.of_rows(torch.tensor([0.0]), 2)


@pytest.mark.kernel
def test_adapters_of_several_dtypes_go_by_torch(device):
    """Where Triton was asked for by name, that is an error."""
    from peft_fast.dispatch import TritonUnsupported

    case = make_case([0, 1] * 4, [4, 4], dtype=FP16, device=device)
    case.A[0], case.B[0] = case.A[0].float(), case.B[0].float()
    with pytest.raises(TritonUnsupported, match="several dtypes"):
        case.run("triton")
    check_against_fp64(case, "torch")


@pytest.mark.parametrize(
    ("rows", "p"),
    [(1, 0.1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0.0), (32, 0.0), (32, 0.1)))],
)
def test_launches_do_not_grow_with_the_number_of_adapters(rows, p):
    """At most 3 in the forward and 6 in the backward beside the base layer's product, with 512 adapters as with one:
    one less each with many, where K need not be split among programs."""
    counts = {T: _launches(T, rows, p) for T in (0, 1, 8, 64, 512)}
    beside = {T: tuple(own - base for own, base in zip(counts[T], counts[0])) for T in (1, 8, 64, 512)}
    assert beside == {1: (3, 5), 8: (3, 5), 64: (3, 5), 512: (2, 4)}


def _launches(T: int, rows: int, p: float) -> tuple[int, int]:
    case = make_case(scattered(dict.fromkeys(range(T), rows) or {-1: rows}), [16] * T, K=1024, N=256, p=(p,))
    x, *leaves = case.leaves()
    adapters = ops.Adapters(leaves[:T], leaves[T : 2 * T], case.scales, case.p)

    def forward() -> torch.Tensor:
        keys = case.keys if p else None
        return ops.lora_linear_multi(x, case.weight, adapters, case.segments, case.bias, dropout_keys=keys)

    def backward(y: torch.Tensor) -> object:
        return torch.autograd.grad(y, [x, *leaves[: 2 * T]], case.d_y)

    measure(lambda: backward(forward()), triton=True)  # tables of addresses and rows are copied to the device once
    y, of_forward = measure(forward, triton=True)
    _, of_backward = measure(lambda: backward(y), triton=True)
    return of_forward.ops.total(), of_backward.ops.total()
