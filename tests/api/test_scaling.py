"""Scales of LoRA adapters and the helpers around them, beside peft 0.21.2."""

import inspect

import peft
import peft.helpers
import pytest
import torch
from torch import nn

import peft_fast
import peft_fast.helpers
from peft_fast import LoraConfig, get_peft_model
from peft_fast.tuners.lora import LoraLayer

LIBRARIES = [peft_fast, peft]


def make(library, model, **options):
    torch.manual_seed(5)
    config = library.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **options})
    found = library.get_peft_model(model, config)
    found.add_adapter("other", library.LoraConfig(r=2, lora_alpha=3, target_modules=["up_proj"]))
    return found


def layers(library, model):
    return [module for module in model.modules() if isinstance(module, library.tuners.lora.LoraLayer)]


def scales(library, model):
    return [dict(layer.scaling) for layer in layers(library, model)]


CALLS = {
    "scale": [("scale_layer", 3)],
    "scale by 1": [("scale_layer", 1)],
    "scale by 0": [("scale_layer", 0)],
    "and back": [("scale_layer", 3), ("unscale_layer", 3)],
    "half back": [("scale_layer", 3), ("unscale_layer", 1.5)],
    "reset": [("scale_layer", 0), ("scale_layer", 2), ("unscale_layer", None)],
    "set": [("scale_layer", 7), ("set_scale", "default", 0.5)],
    "set one that is not everywhere": [("set_scale", "other", 2)],
    "set nobody's": [("set_scale", "nobody", 2)],
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("active", ["default", ["default", "other"], "other"], ids=str)
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS.keys())
def test_scales_are_pefts(llama, tokens, trained, calls, active, rslora):
    models = [trained(make(library, llama(), use_rslora=rslora)) for library in LIBRARIES]
    for library, model in zip(LIBRARIES, models):
        model.base_model.set_adapter(active)
        for layer in layers(library, model):
            for name, *arguments in calls:
                getattr(layer, name)(*arguments)
    assert scales(peft_fast, models[0]) == scales(peft, models[1])
    torch.testing.assert_close(models[0](tokens).logits, models[1](tokens).logits)


@pytest.mark.parametrize("value", ["2", None, True, float("nan"), float("inf")], ids=str)
def test_scales_must_be_numbers(llama, value):
    model = make(peft_fast, llama())
    layer, before = layers(peft_fast, model)[0], scales(peft_fast, model)
    error = ValueError if isinstance(value, float) else TypeError
    calls = [lambda: layer.set_scale("default", value), lambda: layer.scale_layer(value)]
    if value is not None:
        calls.append(lambda: layer.unscale_layer(value))
    for call in calls:
        with pytest.raises(error, match="scale must be"):
            call()
    with pytest.raises(error, match="multiplier must be"), peft_fast.helpers.rescale_adapter_scale(model, value):
        pass
    with pytest.raises(ValueError, match="scale must not be 0"):
        layer.unscale_layer(0)
    assert scales(peft_fast, model) == before


def test_the_scale_of_a_merged_adapter_stays(llama, tokens, trained):
    """peft changes it, and unmerge_adapter then takes another delta out of the weight than was put in."""
    model = trained(make(peft_fast, llama())).eval()
    before, expected = scales(peft_fast, model), model(tokens).logits
    model.merge_adapter()
    layer = layers(peft_fast, model)[0]
    for call in (lambda: layer.scale_layer(2), lambda: layer.set_scale("default", 2)):
        with pytest.raises(ValueError, match="'default'.* are merged.*unmerge_adapter"):
            call()
    with pytest.raises(ValueError, match="unmerge_adapter"), peft_fast.helpers.rescale_adapter_scale(model, 2):
        pass
    model.unmerge_adapter()
    assert scales(peft_fast, model) == before
    torch.testing.assert_close(model(tokens).logits, expected)


@pytest.mark.parametrize("multiplier", [0, 0.5, 2])
def test_rescaling_for_a_while(llama, tokens, trained, multiplier):
    models = [trained(make(library, llama())) for library in LIBRARIES]
    before, expected = scales(peft_fast, models[0]), models[0](tokens).logits
    outputs = []
    for library, model in zip(LIBRARIES, models):
        with library.helpers.rescale_adapter_scale(model, multiplier):
            outputs.append(model(tokens).logits)
    torch.testing.assert_close(*outputs)
    assert not torch.equal(outputs[0], expected)
    assert scales(peft_fast, models[0]) == before

    def fail():
        with peft_fast.helpers.rescale_adapter_scale(models[0], 3):
            models[0].base_model.delete_adapter("other")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(models[0](tokens).logits, expected)
    assert scales(peft_fast, models[0]) == [{"default": 1.5} for _ in before]
    assert isinstance(layers(peft_fast, models[0])[0], LoraLayer)


@pytest.mark.parametrize("library", LIBRARIES, ids=["ours", "pefts"])
def test_rescaling_needs_lora(library):
    with (
        pytest.raises(ValueError, match="with .?.?Lo[Rr][aA]"),
        library.helpers.rescale_adapter_scale(nn.Linear(2, 2), 2),
    ):
        pass


@pytest.mark.parametrize("library", LIBRARIES, ids=["ours", "pefts"])
def test_signatures_of_the_base_model(library, llama, tokens):
    base = type(llama())
    model = library.get_peft_model(llama(), library.LoraConfig())
    expected = model(tokens).logits
    library.helpers.update_signature(model, "forward")
    assert inspect.signature(model.forward) != inspect.signature(type(model).forward) or library is peft
    assert model.forward.__doc__ == base.forward.__doc__
    assert torch.equal(model(tokens).logits, expected)
    library.helpers.update_signature(model, "generate")
    assert model.generate.__doc__ == base.generate.__doc__
    mask = torch.ones_like(tokens)
    assert model.generate(tokens, attention_mask=mask, min_new_tokens=1, max_new_tokens=1).shape == (3, 11)
    with pytest.raises(ValueError, match="method"):
        library.helpers.update_signature(model, "all of them")
    causal = library.get_peft_model(llama(), library.LoraConfig(task_type="CAUSAL_LM"))
    library.helpers.update_forward_signature(causal)
    assert causal.forward.__func__ is type(causal).forward  # it has one of its own
    library.helpers.update_generate_signature(causal)


def test_what_is_an_adapter(llama, tmp_path):
    get_peft_model(llama(), LoraConfig()).save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "model")
    for library in LIBRARIES:
        assert library.helpers.check_if_peft_model(tmp_path / "adapter")
        assert not library.helpers.check_if_peft_model(tmp_path / "model")
        assert not library.helpers.check_if_peft_model(tmp_path / "nothing")
