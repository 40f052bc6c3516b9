"""LoRA on 4- and 8-bit base layers: merging and unmerging, and beside bitsandbytes' own forward."""

import copy

import pytest
import torch
from torch import nn

from peft_fast import LoraConfig
from peft_fast.tuners.base_weight import matmul_weight
from peft_fast.tuners.lora import Linear

from .test_lora_layer import KBIT, K, base_matrix, expected, lora


def stored(layer: Linear) -> list[torch.Tensor]:
    weight = layer.base_weight()
    return [t.clone() for t in (*weight.tensors(), *([] if layer.bias is None else [layer.bias]))]


@pytest.mark.parametrize("kind", KBIT)
@pytest.mark.parametrize("bias", [True, False])
def test_unmerging_gives_a_kbit_base_back_byte_for_byte(kind, bias):
    layer = lora(kind, bias=bias, lora_bias=bias)
    layer.update_layer("other", 3, 5, LoraConfig(init_lora_weights=False))
    before = stored(layer)
    layer.merge()
    with pytest.warns(UserWarning, match="merged already: merging"):
        layer.merge(adapter_names=["other"])
    assert not torch.equal(stored(layer)[0], before[0])
    layer.unmerge()
    assert all(torch.equal(new, old) for new, old in zip(stored(layer), before, strict=True))


@pytest.mark.parametrize("kind", KBIT)
def test_merging_one_by_one_into_k_bits_is_merging_together(kind):
    """The second merge starts from the exact weight, not from what the first one rounded it to."""
    together = lora(kind, lora_bias=True)
    together.update_layer("other", 3, 5, LoraConfig(init_lora_weights=False, lora_bias=True))
    one_by_one = copy.deepcopy(together)
    together.merge(adapter_names=["default", "other"])
    one_by_one.merge(adapter_names=["default"])
    one_by_one.merge(adapter_names=["other"])
    assert one_by_one.merged_adapters == ["default", "other"]
    for mine, other in zip(stored(one_by_one), stored(together), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", KBIT)
@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_k_bits_cannot_hold_is_not_merged(kind, value, untouched):
    """8-bit codes are taken from the weight in fp16, whose range ends at 65504."""
    layer = lora(kind)
    layer.lora_B["default"].weight.data[3, 1] = value
    if value == 1e6 and not kind.endswith("int8"):
        layer.merge(safe_merge=True)
        assert base_matrix(layer).abs().max() > 65504
        return
    with untouched(layer), pytest.raises(ValueError, match="the adapter is broken; nothing was merged"):
        layer.merge()


@pytest.mark.parametrize("training", [True, False])
def test_an_8bit_layer_beside_bitsandbytes_own_forward(training):
    """The same in training mode. In eval mode bitsandbytes rounds the activations to 8 bits, and ours does not: it
    stays with the exact product, from which bitsandbytes is about one hundredth of an output's size away."""
    layer = lora("bitsandbytes-int8").train(training)
    layer.enable_adapters(False)
    x = torch.randn(64, K)
    exact = nn.functional.linear(x, base_matrix(layer), layer.bias)
    torch.testing.assert_close(layer(x), exact)
    theirs = layer.base_layer(x)
    difference = ((theirs - exact).norm() / exact.norm()).item()
    assert difference < 1e-6 if training else 1e-3 < difference < 2e-2


def test_a_layer_that_keeps_its_16_bits_is_called_and_merged_into():
    """Linear8bitLt with has_fp16_weights quantises in every forward; in eval mode it reuses the codes of the last."""
    layer, x = lora("bitsandbytes-fp16").eval(), torch.randn(8, K)
    assert matmul_weight(layer.base_layer) is None
    assert layer.lora_A["default"].weight.dtype == torch.float32
    before = layer(x)
    exact = expected(layer, x)
    assert 1e-4 < (before - exact).norm() / exact.norm() < 2e-2
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight, base_matrix(layer))
    assert (layer(x) - exact).norm() / exact.norm() < 2e-2
    layer.unmerge()
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)
