"""What is particular to (IA)^3: vectors of zeros, feedforward layers, sums of adapters."""

import sys
from pathlib import Path

import peft
import pytest
import torch

import peft_fast
from peft_fast.tuners.slow_patterns import _patterns

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tuner_cases import BY_NAME, adapted, config, image, kinds, shaken

LIBRARIES = (peft_fast, peft)
IA3 = BY_NAME["IA3"]


@pytest.mark.parametrize("feedforward", [[], ["conv2", "grouped", "linear", "gpt"]])
def test_a_zero_can_be_taken_out_again(feedforward):
    """peft divides by it, and the weights are gone."""
    x, targets = image(), ["conv2", "grouped", "linear", "gpt"]
    model = adapted(peft_fast, kinds(), IA3, target_modules=targets, feedforward_modules=feedforward).eval()
    model.add_adapter("other", config(peft_fast, IA3, target_modules=targets, feedforward_modules=feedforward))
    shaken(model, "ia3_", "other")
    layers = [layer for _, layer in model.base_model.layers()]
    for layer in layers:
        layer.ia3_l["other"].data.view(-1)[1] = 0
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.base_model.set_adapter(["default", "other"])
    expected = model(x)
    model.base_model.merge_adapter(["default"])
    model.base_model.merge_adapter(["other"])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    for name, value in before.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].data, value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_unmerging_warns():
    model = adapted(peft_fast, kinds(), IA3, target_modules=["linear"])
    model.merge_adapter()
    with pytest.warns(UserWarning, match="divided by the vectors"):
        model.unmerge_adapter()


def test_one_layer_scales_one_side(untouched):
    model = adapted(peft_fast, kinds(), IA3, target_modules=["linear"])
    with untouched(model), pytest.raises(ValueError, match="all adapters of a layer must scale the same: its output"):
        model.add_adapter("b", config(peft_fast, IA3, target_modules=["linear"], feedforward_modules=["linear"]))


def test_expressions(llama):
    """feedforward_modules as an expression, and names by the letters at the end, as in peft."""
    for options in (
        {"target_modules": r".*\.(q_proj|down_proj)", "feedforward_modules": r".*mlp\.down_proj"},
        {"target_modules": ["q_proj", "proj", "down_proj"], "feedforward_modules": ["proj"]},
    ):
        names = []
        for library in LIBRARIES:
            model = library.get_peft_model(llama(), library.IA3Config(**options))
            names.append({name: tuple(p.shape) for name, p in model.named_parameters()})
        assert names[0] == names[1]
        assert any("down_proj.ia3_l" in name for name in names[0])


def test_weighted_sums(llama, tokens):
    outputs = []
    for library in LIBRARIES:
        model = adapted(library, llama(), IA3, **IA3.llama)
        more = {"target_modules": ["q_proj", "k_proj"], "feedforward_modules": []}
        model.add_adapter("b", config(library, IA3, **more))
        shaken(model, "ia3_", "b").eval()
        model.base_model.add_weighted_adapter(["default", "b"], [0.7, 0.5], "c")
        assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".c"))
        model.set_adapter("c")
        outputs.append(model(tokens).logits)
        assert model.peft_config["c"].target_modules == {"q_proj", "v_proj", "down_proj", "k_proj"}
        assert model.peft_config["c"].feedforward_modules == {"down_proj"}
        model.base_model.add_weighted_adapter(["b"], [2.0], "c")  # there already: nothing
        torch.testing.assert_close(model(tokens).logits, outputs[-1], rtol=0, atol=0)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_sums_that_cannot_be(llama, untouched):
    model = adapted(peft_fast, llama(), IA3, **IA3.llama, modules_to_save=["norm"])
    model.add_adapter("b", config(peft_fast, IA3, **IA3.llama, modules_to_save=["norm"]))
    model.add_adapter("text", config(peft_fast, IA3, target_modules=".*q_proj"))
    add = model.base_model.add_weighted_adapter
    for names, weights, error in (
        (["default", "b"], [1.0, 1.0], "copies of the same module"),
        (["default", "text"], [1.0, 1.0], "must be names in all configs"),
        (["zzz"], [1.0], "'zzz' does not exist"),
        (["default"], [1.0, 2.0], "one weight is needed for each"),
    ):
        with untouched(model), pytest.raises(ValueError, match=error):
            add(names, weights, "c")


def test_expressions_are_tried_before_they_are_used():
    """As target_modules are: a file's could take for ever."""
    given = config(peft_fast, IA3, target_modules=["q_proj"], feedforward_modules="(a*)*b")
    assert ("feedforward_modules", "(a*)*b") in _patterns(given)
