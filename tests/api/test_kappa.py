"""Targets by condition number (helpers.find_kappa_target_modules), beside peft's."""

import peft.helpers
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import peft_fast
from peft_fast.helpers import KappaTuneSelector, disable_input_dtype_casting, find_kappa_target_modules
from peft_fast.kappa import condition_number

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(intermediate_size=48, **SIZES))


def mixture():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, **SIZES))


def quantised(tmp_path, bits):
    llama().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    return LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map={"": "cpu"})


@pytest.mark.parametrize("made", [llama, mixture])
@pytest.mark.parametrize("top_p", [0.01, 0.2, 1.0])
def test_the_same_targets_as_peft(made, top_p):
    model = made()
    theirs = peft.helpers.find_kappa_target_modules(model, top_p=top_p, show_progress=False)
    assert find_kappa_target_modules(model, top_p, show_progress=False) == theirs
    if made is mixture and top_p == 1.0:
        assert len(theirs["target_parameters"]) == 4


def test_the_same_targets_on_a_4_bit_base(tmp_path):
    model = quantised(tmp_path, 4)
    ours = find_kappa_target_modules(model, 0.5, show_progress=False)
    assert ours == peft.helpers.find_kappa_target_modules(model, 0.5, show_progress=False)


def test_8_bit_weights_are_dequantised(tmp_path):
    names = find_kappa_target_modules(quantised(tmp_path, 8), 1.0, show_progress=False)["target_modules"]
    assert sorted(names) == sorted(find_kappa_target_modules(llama(), 1.0, show_progress=False)["target_modules"])


def test_a_known_condition_number():
    assert condition_number(torch.diag(torch.tensor([8.0, 4.0, 2.0]))) == pytest.approx(4.0)
    assert condition_number(torch.eye(3, dtype=torch.bfloat16)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "asked", [{"num_modules": 3}, {"num_modules": 99}, {"threshold": 50.0}, {"threshold": 0.0}, {"top_p": 0.5}, {}]
)
@pytest.mark.parametrize("method", ["get_best_targets", "get_best_target_parameters"])
def test_every_way_to_choose(asked, method):
    model = mixture()
    ours, theirs = (
        getattr(kind(model, show_progress=False), method)(**asked)
        for kind in (KappaTuneSelector, peft.helpers.KappaTuneSelector)
    )
    assert ours == theirs


def test_large_matrices_are_left_out_and_suffixes_can_be_named():
    ours, theirs = (
        kind(mixture(), max_dim_size_to_analyze=32, moe_param_suffixes=(".down_proj",), show_progress=False)
        for kind in (KappaTuneSelector, peft.helpers.KappaTuneSelector)
    )
    assert ours.get_best_targets() == theirs.get_best_targets()
    assert not any("lm_head" in name for name in ours.get_best_targets())
    assert ours.get_best_target_parameters() == theirs.get_best_target_parameters()
    assert len(ours.get_best_target_parameters()) == 2


def test_a_bar_is_shown_unless_switched_off(capsys):
    find_kappa_target_modules(llama())
    assert "condition numbers of linear layers: 100%" in capsys.readouterr().err
    find_kappa_target_modules(llama(), show_progress=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("asked", [{"top_p": 1.5}, {"top_p": -0.1}, {"num_modules": -1}])
def test_impossible_numbers_are_refused(asked):
    with pytest.raises(ValueError, match="got"):
        KappaTuneSelector(llama(), show_progress=False).get_best_targets(**asked)


def test_what_is_found_can_be_adapted():
    model = mixture()
    found = find_kappa_target_modules(model, show_progress=False)
    adapted = peft_fast.get_peft_model(model, peft_fast.LoraConfig(r=2, **found))
    assert set(adapted.peft_config["default"].target_modules) == set(found["target_modules"])


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return self.conv(x)


def test_inputs_are_not_cast_within_the_block():
    model = peft_fast.get_peft_model(Convolution().bfloat16(), peft_fast.LoraConfig(r=2, target_modules=["conv"]))
    x = torch.randn(2, 4, 8, dtype=torch.bfloat16)  # the adapter is fp32
    y = model(x)
    with disable_input_dtype_casting(model):
        with pytest.raises(RuntimeError, match="dtype|type"):
            model(x)
        with disable_input_dtype_casting(model, active=False), pytest.raises(RuntimeError, match="dtype|type"):
            model(x)
    assert torch.equal(model(x), y)
    with pytest.raises(KeyError), disable_input_dtype_casting(model):
        raise KeyError
    assert torch.equal(model(x), y)
