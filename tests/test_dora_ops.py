"""DoRA's ops in plain torch: the norms of a merged weight that is never made, and the scaling of columns."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_fast import ops
from peft_fast.kernels import reference_dora
from peft_fast.quant import blockwise, int8
from peft_fast.testing import assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"dense": None, "nf4": blockwise.quantize, "int8": int8.quantize}


def matrices(kind="dense", N=70, K=96, R=5, dtype=torch.float32):
    W = (torch.randn(N, K) / K**0.5).to(dtype)
    weight = W if kind == "dense" else KINDS[kind](W)
    return weight, torch.randn(R, K) / K**0.5, torch.randn(N, R)


def dense(weight):
    return (weight if isinstance(weight, torch.Tensor) else ops.dequantize(weight)).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_those_of_the_merged_weight(kind, dtype):
    weight, A, B = matrices(kind, dtype=dtype)
    truth = (dense(weight) + 0.7 * B.double() @ A.double()).norm(dim=1)
    by_torch = (dense(weight).to(dtype) + 0.7 * (B @ A).to(dtype)).norm(dim=1)  # as peft takes them
    for squares in (None, ops.row_squares(weight)):
        norms = ops.merged_norms(weight, A, B, 0.7, squares)
        assert norms.dtype == torch.float32
        assert_as_accurate_as_torch("norms", norms, by_torch, truth, dtype)


def test_norms_of_a_transposed_view_and_in_fp64():
    weight, A, B = (t.double() for t in matrices())
    truth = (weight + 2 * B @ A).norm(dim=1)
    stored = weight.t().contiguous()
    torch.testing.assert_close(ops.merged_norms(stored.t(), A, B, 2.0), truth)


def test_norms_that_cancel_are_not_below_zero():
    weight, A, _ = matrices(N=5, K=8, R=8)
    B = -weight @ torch.linalg.inv(A)
    norms = ops.merged_norms(weight, A, B, 1.0)
    assert (norms >= 0).all()
    assert (norms < 1e-2).all()


def test_row_squares_of_a_long_k_bit_weight():
    weight = blockwise.quantize(torch.randn(2500, 64))
    torch.testing.assert_close(ops.row_squares(weight), ops.dequantize(weight).square().sum(1))


class Largest(TorchDispatchMode):
    """The largest fp32 tensor that anything makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_matrix_of_the_weights_size_is_made_in_fp32():
    weight, A, B = matrices(N=4096, K=256, R=4, dtype=torch.bfloat16)
    squares = ops.row_squares(weight)
    with Largest() as largest:
        ops.row_squares(weight)
        ops.merged_norms(weight, A, B, 1.0, squares)
    assert 0 < largest.numel <= 4096 * 4
    with Largest() as naive:
        (weight.float() + B @ A).norm(dim=1)
    assert naive.numel == 4096 * 256


@pytest.mark.parametrize("shape", [(5, 33), (2, 7, 64), (0, 8), (3000, 500)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_scale_columns(shape, dtype, with_bias):
    N = shape[-1]
    z, d_y = torch.randn(*shape).to(dtype), torch.randn(*shape).to(dtype)
    factor, bias = 1 + 0.1 * torch.randn(N), torch.randn(N).to(dtype) if with_bias else None

    def by_torch(convert):
        leaves = [convert(t).requires_grad_() for t in (z, factor, bias) if t is not None]
        y = leaves[0] * leaves[1] + (leaves[2] if with_bias else 0)
        y = y.to(convert(z).dtype)
        return [y, *torch.autograd.grad(y, leaves, convert(d_y))]

    leaves = [t.clone().requires_grad_() for t in (z, factor, bias) if t is not None]
    y = ops.scale_columns(*leaves)
    got = [y, *torch.autograd.grad(y, leaves, d_y)]
    assert [t.dtype for t in got[:3]] == [dtype, dtype, torch.float32]
    for value, torchs, truth in zip(got, by_torch(lambda t: t.clone()), by_torch(lambda t: t.double())):
        assert_as_accurate_as_torch("scale_columns", value, torchs, truth, value.dtype)


def test_every_subset_of_gradients():
    tensors = {"z": torch.randn(4, 6), "factor": torch.rand(6), "bias": torch.randn(6)}
    everything = None
    for needs in [("z", "factor", "bias"), *itertools.chain(*(itertools.combinations(tensors, n) for n in (1, 2)))]:
        leaves = {name: t.clone().requires_grad_(name in needs) for name, t in tensors.items()}
        y = ops.scale_columns(*leaves.values())
        grads = dict(zip(needs, torch.autograd.grad(y.square().sum(), [leaves[name] for name in needs])))
        everything = everything or grads
        assert all(torch.equal(grads[name], everything[name]) for name in needs)


def test_the_magnitudes_gradient_is_summed_in_fp32():
    """A thousand ones in bf16: added in bf16 they would stop at 256."""
    ones = torch.ones(1000, 2, dtype=torch.bfloat16)
    _, dfactor = reference_dora.scale_columns_backward(ones, ones, torch.ones(2))
    assert dfactor.tolist() == [1000.0, 1000.0]


def test_opcheck():
    opcheck_all("torch", "cpu")


def opcheck_all(backend: str, device: str) -> None:
    z, factor, bias = torch.randn(4, 6, device=device), torch.rand(6, device=device), torch.randn(6, device=device)
    lib = torch.ops.peft_fast
    for arguments in ((z, factor, bias), (z, factor, None), (z.t().contiguous().t(), factor, None)):
        torch.library.opcheck(lib.scale_columns.default, (*arguments, backend))
    for needs in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(lib.scale_columns_backward.default, (z, z.clone(), factor, needs, backend))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(3)), ValueError, r"factor must be \[4\], one value a feature, got \(3,\)"),
        ((torch.zeros(3, 4), torch.zeros(4), torch.zeros(3)), ValueError, r"bias must be \[4\]"),
        ((torch.zeros(3, 4).long(), torch.zeros(4)), TypeError, "z is torch.int64"),
        ((torch.zeros(3, 4), torch.zeros(4, device="meta")), ValueError, "one device"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.scale_columns(*arguments)
