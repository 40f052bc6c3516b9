"""ops.lora_embedding in plain torch: values and gradients against fp64, ids and padding as torch has them."""

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from peft_fast import ops
from peft_fast.dispatch import TritonUnsupported
from peft_fast.kernels import reference_embedding

from .embedding_cases import SHAPES, check_against_fp64, make_case
from .test_ops import saved_by

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
FP32 = (torch.float32, torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "adapter"), [*DTYPES, (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("adds", [False, True])
def test_values_and_gradients(shape, dtype, adapter, adds):
    check_against_fp64(make_case(*shape, dtype, adapter), "torch", adds)


@pytest.mark.parametrize("adds", [False, True])
def test_every_subset_of_gradients(adds):
    case = make_case(*SHAPES[0], *FP32)
    everything = case.run("torch", ("weight", "A", "B"), adds)
    for n in (0, 1, 2):
        for needs in itertools.combinations(("weight", "A", "B"), n):
            for name, value in case.run("torch", needs, adds).items():
                assert torch.equal(value, everything[name])


def test_padding_gets_no_gradient_and_is_looked_up():
    case = make_case(*SHAPES[0], *FP32)
    case.ids[0, :3] = 3
    for padding_idx in (3, 3 - 50):  # torch counts from the end too
        case.padding_idx = padding_idx
        got = case.run("torch", ("weight", "A"))
        assert got["A"][:, 3].abs().sum() == 0
        assert got["weight"][3].abs().sum() == 0
        assert (got["y"][0, 0] - case.weight[3]).abs().sum() > 0
    case.padding_idx = None
    assert case.run("torch", ("A",))["A"][:, 3].abs().sum() > 0
    for wrong in (50, -51):
        case.padding_idx = wrong
        with pytest.raises(ValueError, match=rf"padding_idx must be in \[-50, 50\), got {wrong}"):
            case.run("torch")


@pytest.mark.parametrize("wrong", [-1, 50, 2**31])
@pytest.mark.parametrize("adds", [False, True])
def test_ids_out_of_range_are_torchs_error(wrong, adds):
    case = make_case(*SHAPES[0], *FP32)
    case.ids[1, 1] = wrong
    with pytest.raises(IndexError, match="index out of range in self"):
        F.embedding(case.ids, case.weight)
    function, base = (
        (ops.lora_embedding_add, (torch.zeros(*case.ids.shape, 40), case.ids))
        if adds
        else (ops.lora_embedding, (case.ids, case.weight))
    )
    with pytest.raises(IndexError, match="index out of range in self"):
        function(*base, case.A, case.B, 1.0)


def test_int32_ids():
    case = make_case(*SHAPES[0], *FP32)
    expected = case.run("torch")
    case.ids = case.ids.int()
    for name, value in case.run("torch").items():
        assert torch.equal(value, expected[name])


def test_bits_repeat_with_many_equal_ids():
    case = make_case((4096,), 4, 16, 4, *FP32)
    first = case.run("torch")
    for _ in range(3):
        again = case.run("torch")
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_segment_sums_are_taken_in_fp32():
    """A thousand ones of one id in bf16: added in bf16 they would stop at 256."""
    ids = torch.zeros(1000, dtype=torch.int64)
    total = reference_embedding.segment_sum(torch.ones(1000, 2, dtype=torch.bfloat16), ids, 4)
    assert (total.dtype, total[0, 0].item(), total[1:].abs().sum().item()) == (torch.float32, 1000.0, 0.0)


def test_saved_for_backward_are_the_ids_and_the_adapter():
    case = make_case(*SHAPES[0], *FP32)
    A, B = case.A.requires_grad_(), case.B.requires_grad_()
    saved = saved_by(lambda: ops.lora_embedding(case.ids, case.weight, A, B, 1.0))
    assert {t.data_ptr() for t in saved} == {case.ids.data_ptr(), A.data_ptr(), B.data_ptr()}


def test_autocast_changes_nothing():
    case = make_case(*SHAPES[0], *FP32)
    expected = case.run("torch")
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run("torch")
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_opcheck():
    case = make_case(*SHAPES[0], *FP32)
    opcheck_all(case, "torch")


def opcheck_all(case, backend):
    ids, dy, lib = case.ids.reshape(-1), case.d_y.reshape(-1, case.d_y.shape[-1]), torch.ops.peft_fast
    calls = [
        (lib.lora_embedding, (ids, case.weight, case.A, case.B, 2.0, backend)),
        (lib.lora_embedding_add_, (dy.clone(), ids, case.A, case.B, 2.0, backend)),
        *(
            (lib.lora_embedding_backward, (dy, ids, case.A, case.B, 2.0, 3, needs, backend))
            for needs in ([True, True], [True, False], [False, True])
        ),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def test_torch_compile_has_one_graph_for_all_lengths():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def run(ids, weight, A, B):
        y = ops.lora_embedding(ids, weight, A, B, 1.7, padding_idx=3)
        return ops.lora_embedding_add(y, ids, A, B, 0.5)

    for M in (5, 6, 9, 12):
        case = make_case((2, M), 50, 40, 4, *FP32)
        A, B = case.A.requires_grad_(), case.B.requires_grad_()
        y = run(case.ids, case.weight, A, B)
        expected = ops.lora_embedding(case.ids, case.weight, A, B, 1.7, padding_idx=3)
        expected = ops.lora_embedding_add(expected, case.ids, A, B, 0.5)
        torch.testing.assert_close(y, expected)
        for got, wanted in zip(torch.autograd.grad(y.sum(), [A, B]), torch.autograd.grad(expected.sum(), [A, B])):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(3)}, TypeError, "ids must be int64 or int32, got torch.float32"),
        ({"weight": torch.zeros(49, 40)}, ValueError, r"weight must be \[V, N\] with V=50 as A has, got \(49, 40\)"),
        ({"weight": torch.zeros(50, 40).long()}, TypeError, "weight is torch.int64"),
        ({"B": torch.zeros(40, 5)}, ValueError, r"A must be \[R, V\] and B \[40, R\], got \(4, 50\) and \(40, 5\)"),
        ({"A": torch.zeros(4, 50, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_arguments(change, error, message):
    case = make_case(*SHAPES[0], *FP32)
    arguments = {"ids": case.ids, "weight": case.weight, "A": case.A, "B": case.B, **change}
    with pytest.raises(error, match=message):
        ops.lora_embedding(*arguments.values(), 1.0)


def test_triton_is_refused_on_a_cpu():
    case = make_case(*SHAPES[0], *FP32)
    with pytest.raises(TritonUnsupported, match="lora_embedding: backend triton was asked for"):
        case.run("triton")
