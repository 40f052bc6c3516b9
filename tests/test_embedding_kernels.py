"""The Triton kernels of lora_embedding, in the interpreter or on a GPU: values and gradients against fp64, bits."""

import itertools

import pytest
import torch

from peft_fast import ops
from peft_fast.kernels import lora_embedding, reference_embedding

from .conftest import INTERPRETING
from .embedding_cases import SHAPES, check_against_fp64, make_case
from .test_embedding import opcheck_all

pytestmark = pytest.mark.kernel

FP32 = (torch.float32, torch.float32)
DTYPES = [FP32, (torch.float16, torch.float16), (torch.float16, torch.float32)]
if not INTERPRETING:
    DTYPES += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=str)
@pytest.mark.parametrize("adds", [False, True])
def test_values_and_gradients(shape, dtype, adapter, adds, device):
    check_against_fp64(make_case(*shape, dtype, adapter, device), "triton", adds)


@pytest.mark.parametrize("R", [1, 16, 17, 100])
@pytest.mark.parametrize("repeats", [1, 15, 16, 17, 64])
def test_segments_that_end_on_and_off_a_tile(R, repeats, device):
    """Every id as often as a tile has places, or one more or less; unsorted; the last segment ends with the ids."""
    ids = torch.arange(5, device=device).repeat(repeats)[torch.randperm(5 * repeats)]
    ds, A = torch.randn(len(ids), R, device=device), torch.zeros(R, 9, device=device)
    for padding_idx in (-1, 3):
        expected = reference_embedding.segment_sum(ds.double(), ids, 9, padding_idx).t()
        got = lora_embedding.segment_sum(ds, ids, A, padding_idx)
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_sums_of_16_bit_rows_are_taken_in_fp32(device):
    ids = torch.zeros(3000, dtype=torch.int64, device=device)
    ds = torch.ones(3000, 2, dtype=torch.float16, device=device)
    assert lora_embedding.segment_sum(ds, ids, torch.zeros(2, 4, device=device))[:, 0].tolist() == [3000.0, 3000.0]


def test_every_subset_of_gradients(device):
    case = make_case(*SHAPES[0], *FP32, device)
    everything = case.run("triton", ("weight", "A", "B"))
    for n in (0, 1, 2):
        for needs in itertools.combinations(("weight", "A", "B"), n):
            for name, value in case.run("triton", needs).items():
                assert torch.equal(value, everything[name])


def test_bits_repeat_and_ids_may_be_int32(device):
    case = make_case((500,), 40, 16, 4, *FP32, device)
    first = case.run("triton")
    assert all(torch.equal(value, first[name]) for name, value in case.run("triton").items())
    case.ids = case.ids.int()
    assert all(torch.equal(value, first[name]) for name, value in case.run("triton").items())


def test_strided_operands(device):
    case = make_case((33,), 50, 40, 20, *FP32, device)
    expected = case.run("torch")
    case.A, case.B = case.A.t().contiguous().t(), case.B.t().contiguous().t()
    case.d_y, case.ids = case.d_y.t().contiguous().t(), torch.stack([case.ids, case.ids], 1)[:, 0]
    for name, value in case.run("triton").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not INTERPRETING, reason="on a GPU torch's assertion ends the process's use of it")
def test_ids_out_of_range(device):
    """Where torch looks up, its error; where the kernel alone does, NaN, and nothing is read."""
    case = make_case((6,), 50, 40, 4, *FP32, device)
    for wrong in (-1, 50, 2**40):
        case.ids[2] = wrong
        with pytest.raises(IndexError, match="index out of range"):
            ops.lora_embedding(case.ids, case.weight, case.A, case.B, 1.0, backend="triton")
        y = ops.lora_embedding_add(torch.zeros(6, 40), case.ids, case.A, case.B, 1.0, backend="triton")
        assert y.isnan().any(1).tolist() == [False, False, True, False, False, False]


def test_opcheck(device):
    opcheck_all(make_case(*SHAPES[0], *FP32, device), "triton")
