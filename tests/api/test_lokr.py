"""What is particular to LoKr: the ways through the product, and its dropouts."""

import sys
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization as their_factorization

import peft_fast
from peft_fast.tuners.lokr.layer import WAYS, factorization

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tuner_cases import BY_NAME, adapted

LIBRARIES = (peft_fast, peft)
LOKR = BY_NAME["LoKr"]


def down_proj(llama, **options):
    model = adapted(peft_fast, llama(), LOKR, **{**LOKR.llama, **options})
    return model.base_model.model.model.layers[0].mlp.down_proj


def test_every_way(llama, monkeypatch):
    """W1 then W2, W2 then W1, and the delta: the same."""
    x = torch.randn(3, 40, 128)
    layer = down_proj(llama, r=3, decompose_factor=4)
    (a, b), (c, d) = layer.sizes("default")
    assert (a * b, c * d) == (64, 128)
    expected = x @ layer.get_delta_weight("default").T
    for way in WAYS:
        monkeypatch.setattr(layer, "way", lambda name, tokens, way=way: way)
        torch.testing.assert_close(layer.change("default", x), expected, rtol=1e-4, atol=1e-5)


def test_the_cheapest_way(llama):
    layer = down_proj(llama)
    assert layer.sizes("default") == ((8, 8), (8, 16))
    assert layer.way("default", 100) == "second"
    assert "W2, then W1" in layer.route(100).because
    model = adapted(peft_fast, llama(), LOKR, target_modules=["up_proj"], decompose_factor=4)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.sizes("default") == ((4, 32), (4, 16))
    assert layer.way("default", 100) == "first"
    # of primes nothing is left to take apart, and for few tokens two products are fewer than the delta and its own
    prime = peft_fast.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(7, 5)), peft_fast.LoKrConfig(r=2, target_modules=["0"])
    ).base_model.model[0]
    assert prime.sizes("default") == ((1, 5), (1, 7))
    assert prime.way("default", 2) != "delta"
    assert prime.way("default", 1000) == "delta"
    assert "as a matrix" in prime.route(1000).because


def test_the_product_with_kernels():
    """Of rank 1 too, where torch.kron fails in peft."""
    base = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1))
    options = {"target_modules": ["0"], "use_effective_conv2d": True, "init_weights": False}
    layer = adapted(peft_fast, base, LOKR, **options).base_model.model[0]
    assert layer.lokr_t2["default"].shape == (1, 1, 3, 3)
    first, second = layer.pair("default", torch.float32)
    second = second.clone(memory_format=torch.contiguous_format).reshape(4, 2, 3, 3)
    expected = layer.scaling["default"] * torch.kron(first[..., None, None], second)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    x = torch.randn(2, 4, 5, 5)
    both = torch.nn.functional.conv2d(x, layer.weight + expected, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), both, rtol=1e-4, atol=1e-5)


def test_factors_are_pefts():
    for dimension in (*range(1, 70), 127, 128, 320, 4096):
        for factor in (-1, 1, 2, 3, 4, 6, 8, 16, 100):
            assert factorization(dimension, factor) == their_factorization(dimension, factor)


@pytest.mark.parametrize("dropout", [{"rank_dropout": 0.5}, {"rank_dropout": 0.5, "rank_dropout_scale": True}])
def test_rank_dropout(dropout, llama, tokens):
    models = [adapted(library, llama(), LOKR, **LOKR.llama, **dropout).train() for library in LIBRARIES]
    for layer in models[0].modules():
        if isinstance(layer, peft_fast.tuners.lokr.LoKrLayer):  # peft draws for the module too, at probability 0
            layer.register_forward_pre_hook(lambda *_: torch.rand(1) and None)
    outputs = []
    for model in models:
        torch.manual_seed(1)
        outputs.append(model(tokens).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[0], models[0].eval()(tokens).logits, atol=1e-3)


def test_module_dropout(llama, tokens):
    models = [adapted(library, llama(), LOKR, **LOKR.llama, module_dropout=0.5).train() for library in LIBRARIES]
    for seed in range(3):
        outputs = []
        for model in models:
            torch.manual_seed(seed)
            outputs.append(model(tokens).logits)
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"decompose_factor": 0}, "decompose_factor must be a positive integer, or -1"),
        ({"init_weights": "lycori"}, "init_weights must be one of True, False, 'lycoris'"),
        ({"decompose_both": 1}, "decompose_both must be True or False"),
        ({"r": 0}, "r must be a positive integer"),
        ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_options_that_cannot_be(options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        peft_fast.LoKrConfig(**options)
