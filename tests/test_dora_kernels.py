"""DoRA's Triton kernels, in the interpreter or on a GPU: values and gradients against fp64, odd shapes, strides."""

import pytest
import torch

from peft_fast import LoraConfig, ops
from peft_fast.kernels import reference_dora, scale_columns
from peft_fast.testing import assert_as_accurate_as_torch
from peft_fast.tuners.lora import Linear

from .conftest import INTERPRETING
from .test_dora_ops import opcheck_all

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETING else [torch.bfloat16])
SHAPES = [(1, 7), (130, 71), (65, 256), (64, 300), (3, 2051), (0, 16)]  # a slab is 64 rows of 256 columns


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients(shape, dtype, with_bias, device):
    N = shape[-1]
    z, d_y = torch.randn(*shape, device=device).to(dtype), torch.randn(*shape, device=device).to(dtype)
    factor = 1 + 0.1 * torch.randn(N, device=device)
    bias = torch.randn(N, device=device).to(dtype) if with_bias else None

    def by_torch(convert):
        leaves = [convert(t).requires_grad_() for t in (z, factor, bias) if t is not None]
        y = leaves[0] * leaves[1] + (leaves[2] if with_bias else 0)
        y = y.to(convert(z).dtype)
        return [y, *torch.autograd.grad(y, leaves, convert(d_y))]

    leaves = [t.clone().requires_grad_() for t in (z, factor, bias) if t is not None]
    y = ops.scale_columns(*leaves, backend="triton")
    got = [y, *torch.autograd.grad(y, leaves, d_y)]
    for value, torchs, truth in zip(got, by_torch(lambda t: t.clone()), by_torch(lambda t: t.double())):
        assert value.dtype == torchs.dtype
        assert_as_accurate_as_torch("scale_columns", value, torchs, truth, value.dtype)


def test_strided_operands_and_every_subset_of_gradients(device):
    wide = torch.randn(130, 160, device=device)
    factor, bias = torch.rand(160, device=device)[::2], torch.rand(160, device=device)[1::2]
    dy = torch.randn(80, 130, device=device).t()
    for z in (wide[:, :80], wide[:, ::2], wide[:1, :80].expand(130, 80)):
        torch.testing.assert_close(
            scale_columns.scale_columns(z, factor, bias), reference_dora.scale_columns(z, factor, bias)
        )
        for needs in ((True, True), (True, False), (False, True), (False, False)):
            got = scale_columns.scale_columns_backward(dy, z, factor, *needs)
            wanted = reference_dora.scale_columns_backward(dy, z, factor, *needs)
            for mine, other, need in zip(got, wanted, needs):
                assert (mine is None) == (other is None) == (not need)
                if need:
                    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_bits_repeat(device):
    dy, z, factor = (torch.randn(1000, 300, device=device), torch.randn(1000, 300, device=device), torch.rand(300))
    factor = factor.to(device)
    first = scale_columns.scale_columns_backward(dy, z, factor)
    assert all(torch.equal(a, b) for a, b in zip(first, scale_columns.scale_columns_backward(dy, z, factor)))


def test_opcheck(device):
    opcheck_all("triton", device)


def test_what_it_does_not_take(device):
    assert scale_columns.why_not(torch.float16, torch.float32) is None
    assert "factor is torch.float64" in scale_columns.why_not(torch.float64, torch.float64)
    assert "float8" in scale_columns.why_not(torch.float8_e4m3fn, torch.float32)


def test_a_layer_with_dora_gives_the_same_on_both_backends(device):
    layer = torch.nn.Linear(64, 48, device=device)
    config = LoraConfig(r=4, init_lora_weights=False, use_dora=True)
    lora = Linear(layer, "default", config=config, r=4, lora_alpha=8)
    lora.set_adapter("default")
    lora.lora_magnitude_vector["default"].weight.data *= 1.5
    x, results = torch.randn(33, 64, device=device), []
    for backend in ("triton", "torch"):
        lora.backend = backend
        lora.zero_grad()
        leaf = x.clone().requires_grad_()
        y = lora(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad.clone() for p in lora.adapter_parameters("default"))])
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)
