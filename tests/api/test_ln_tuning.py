"""What is particular to LayerNorm tuning: copies of modules, of which one counts."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_fast

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tuner_cases import BY_NAME, adapted, config, shaken

LN = BY_NAME["LNTuning"]


def two(llama):
    model = adapted(peft_fast, llama(), LN).eval()
    model.add_adapter("b", config(peft_fast, LN, target_modules=["norm"]))
    return shaken(model, LN.prefix, "b")


def test_one_after_the_other(llama, tokens):
    """Merging the second takes the first out; layers that the second does not have are the base model's."""
    model = two(llama)
    outputs = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        outputs[name] = model(tokens).logits
    plain = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.base_model.merge_adapter(["default"])
    torch.testing.assert_close(model(tokens).logits, outputs["default"])
    with pytest.warns(UserWarning, match="unmerged first"):
        model.base_model.merge_adapter(["b"])
    norm = model.base_model.model.model.norm
    assert norm.merged_adapters == ["b"]
    torch.testing.assert_close(norm.base_layer.weight.data, norm.ln_tuning_layers["b"].weight.data)
    model.unmerge_adapter()
    own = {name: p.data for name, p in model.named_parameters() if "base_layer" in name}
    torch.testing.assert_close(own, plain, rtol=0, atol=0)
    torch.testing.assert_close(model(tokens).logits, outputs["b"])


def test_a_merged_adapter_is_saved_and_new_ones_begin_as_the_base(llama, tmp_path, tokens):
    """peft exchanges the modules, and saves the base model's for the adapter's."""
    model = adapted(peft_fast, llama(), LN).eval()
    expected = model(tokens).logits
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    model.add_adapter("b", config(peft_fast, LN))
    model.unmerge_adapter()
    model.set_adapter("b")
    torch.testing.assert_close(model(tokens).logits, llama()(tokens).logits)
    loaded = peft_fast.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(tokens).logits, expected)


def test_two_have_no_sum(llama, untouched):
    model = two(llama)
    with untouched(model), pytest.raises(ValueError, match="outputs of whole modules cannot be summed"):
        model.base_model.set_adapter(["default", "b"])
    with untouched(model), pytest.raises(ValueError, match="outputs of whole modules cannot be summed"):
        model.base_model.merge_adapter(["default", "b"])


def test_modules_with_more_than_a_weight(llama, tokens):
    """Whole blocks, batch norms with their running means."""
    model = adapted(peft_fast, llama(), LN, target_modules=["layers.0.mlp"]).eval()
    expected = model(tokens).logits
    assert not torch.allclose(expected, llama()(tokens).logits, atol=1e-3)
    with pytest.raises(ValueError, match="merge_to_16bit knows no LlamaMLP"):
        model.base_model.merge_to_16bit(progressbar=False)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, expected)
    x = torch.randn(8, 3) + 2
    batch = peft_fast.get_peft_model(nn.Sequential(nn.BatchNorm1d(3)), config(peft_fast, LN, target_modules=["0"]))
    batch.train()(x)
    mean = batch.base_model.model[0].ln_tuning_layers["default"].running_mean
    assert mean.abs().sum() > 0.1
    assert batch.base_model.model[0].base_layer.running_mean.abs().sum() == 0
    merged = batch.merge_and_unload()
    torch.testing.assert_close(merged[0].running_mean, mean)


@pytest.mark.parametrize(
    ("base", "targets", "error"),
    [
        (lambda: nn.Sequential(nn.ReLU()), ["0"], "a ReLU has no weights"),
        (lambda: nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), ["0"], "cannot hold 0: a ModuleList"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 2))), ["0", "0.0"], "cannot hold both 0 and 0.0"),
    ],
)
def test_what_cannot_be_copied(base, targets, error, untouched):
    model = base()
    with untouched(model), pytest.raises(ValueError, match=error):
        peft_fast.get_peft_model(model, config(peft_fast, LN, target_modules=targets))


def test_few_bits_cannot_be_trained(llama_4bit, untouched):
    model = llama_4bit()
    with untouched(model), pytest.raises(ValueError, match="q_proj: its k-bit weight cannot be trained"):
        peft_fast.get_peft_model(model, config(peft_fast, LN, target_modules=["q_proj"]))
