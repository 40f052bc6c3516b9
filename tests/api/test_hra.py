"""What is particular to HRA: the compact form of many reflections, convolutions of every shape, k-bit bases."""

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peft_fast
from peft_fast.quantized_linear import quantize_linear_layers

LIBRARIES = (peft_fast, peft)


def layer_of(model):
    return model.base_model.model[0]


@pytest.mark.parametrize("r", [1, 2, 7, 16, 24])
def test_many_reflections_at_once(r):
    """One after the other; more than there are inputs, too."""
    model = peft_fast.get_peft_model(
        nn.Sequential(nn.Linear(16, 5)), peft_fast.HRAConfig(target_modules=["0"], r=r, init_weights=False)
    )
    product = torch.eye(16, dtype=torch.double)
    for vector in layer_of(model).hra_u["default"].detach().double().T:
        product = product @ (torch.eye(16) - 2 * torch.outer(vector, vector) / vector.dot(vector))
    delta = layer_of(model).get_delta_weight("default")
    torch.testing.assert_close(delta.double(), product, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(delta @ layer_of(model).get_delta_weight("default", reverse=True), torch.eye(16))
    x = torch.randn(3, 16)
    expected = F.linear(x, layer_of(model).weight @ product.float(), layer_of(model).bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_pairs_of_equal_vectors():
    """Which the start consists of: their reflections undo each other, for many of them too."""
    base = nn.Sequential(nn.Linear(16, 5))
    x = torch.randn(3, 16)
    expected = base(x)
    model = peft_fast.get_peft_model(base, peft_fast.HRAConfig(target_modules=["0"], r=16))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apply_GS", [False, True])
def test_convolutions(apply_GS):
    x = torch.randn(2, 4, 7, 7)
    results = []
    for library in LIBRARIES:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            base = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1))
        torch.manual_seed(2)
        config = library.HRAConfig(target_modules=["0"], r=4, apply_GS=apply_GS, init_weights=False)
        model = library.get_peft_model(base, config)
        y = model(x)
        y.square().sum().backward()
        results.append((y, layer_of(model).hra_u["default"].grad, model.merge_and_unload()(x)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[0][0], results[0][2], rtol=1e-4, atol=1e-5)


def test_convolutions_that_peft_computes_otherwise():
    """Oblong kernels and paddings, dilation, other borders: as the merged convolution."""
    x = torch.randn(2, 4, 9, 9)
    base = nn.Sequential(nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(1, 0), dilation=2, padding_mode="reflect"))
    config = peft_fast.HRAConfig(target_modules=["0"], r=3, init_weights=False)
    model = peft_fast.get_peft_model(base, config)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_kbit_bases(bits):
    """peft multiplies by the bytes of such a weight, and fails."""
    base = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(3, 64)
    quantize_linear_layers(base, bits=bits)
    plain = base(x)
    model = peft_fast.get_peft_model(base, peft_fast.HRAConfig(target_modules=["0"], r=4, init_weights=False))
    y = model(x)
    assert not torch.allclose(y, plain, atol=1e-2)
    y.square().sum().backward()
    assert layer_of(model).hra_u["default"].grad.norm() > 0
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain)


def test_warnings():
    with pytest.warns(UserWarning, match="apply_GS cannot make the pairs"):
        peft_fast.HRAConfig(apply_GS=True)
    with pytest.warns(UserWarning, match="r=3 is odd"):
        peft_fast.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft_fast.HRAConfig(r=3, target_modules=["0"]))
