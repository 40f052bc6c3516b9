"""DoRA beside peft's: names, files, outputs, gradients and merging, on every kind of layer that has it."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import peft_fast
from peft_fast.tuners.lora import dora

from .dora_models import DENSE, LAYERS, adapted, both, build, named, relative, shaken

every_layer = pytest.mark.parametrize("kind", LAYERS)
dense_layers = pytest.mark.parametrize("kind", DENSE)


@every_layer
def test_names_and_initial_values_are_pefts_and_change_nothing(kind):
    ours, theirs = both(kind, lambda model, *_: model, shake=False)
    assert named(ours).keys() == named(theirs).keys()
    for name, mine in named(ours).items():
        other = named(theirs)[name]
        assert torch.equal(mine, other), name
        assert (mine.dtype, mine.requires_grad) == (other.dtype, other.requires_grad), name
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    (_, layer, x), (base, _) = adapted(peft_fast, kind, shake=False), build(kind)
    torch.testing.assert_close(layer(x), base["layer"](x), rtol=1e-4, atol=1e-5)


@every_layer
def test_random_starts_are_pefts(kind):
    ours, theirs = both(kind, lambda model, *_: named(model), shake=False, init_lora_weights=False)
    for name, mine in ours.items():
        torch.testing.assert_close(mine, theirs[name], rtol=1e-5, atol=1e-6)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_magnitudes_of_16_bit_layers_start_as_pefts(kind, dtype):
    ours, theirs = both(kind, lambda model, *_: named(model), dtype=dtype, shake=False)
    for name, mine in ours.items():
        assert mine.dtype == theirs[name].dtype, name
        torch.testing.assert_close(mine, theirs[name], rtol=torch.finfo(dtype).eps, atol=0)


@dense_layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_new_adapter_multiplies_16_bit_layers_by_1(kind, dtype, autocast_adapter_dtype):
    """With magnitudes in fp32 and in 16 bits, whose rounding must not scale a row by up to half an ulp."""
    base, x = build(kind)
    plain = copy.deepcopy(base.to(dtype))
    config = peft_fast.LoraConfig(target_modules=["layer"], use_dora=True)
    model = peft_fast.get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.base_model.model["layer"]
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.dtype == (torch.float32 if autocast_adapter_dtype else dtype)
    factor = dora.factor(layer, "default")
    assert (factor - 1).abs().max() <= (1e-6 if autocast_adapter_dtype else 0)
    x = x.to(dtype) if x.is_floating_point() else x
    torch.testing.assert_close(layer(x), plain["layer"](x), rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


@every_layer
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_pefts(kind, dropout, training):
    def use(model, layer, x):
        model.train(training)
        x = x.clone().requires_grad_(x.is_floating_point())
        torch.manual_seed(9)  # the masks are torch's own: W x is dropped out too
        y = layer(x)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in named(model).items()}
        return y, {**grads, "x": x.grad}

    (y, ours), (pefts_y, theirs) = both(kind, use, lora_dropout=dropout)
    assert relative(y, pefts_y) <= 1e-5
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        assert (mine is None) == (theirs[name] is None), name
        assert mine is None or relative(mine, theirs[name]) <= 2e-5, name
    assert sum(grad is not None for name, grad in ours.items() if "lora_" in name) == 3


@dense_layers  # the 4-bit layer here computes in fp32
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_outputs_are_as_accurate_as_pefts(kind, dtype):
    errors = []
    for library in (peft_fast, peft):
        model, layer, x = adapted(library, kind, dtype=dtype)
        exact = copy.deepcopy(model).float().base_model.model["layer"]
        y = layer(x)
        assert y.dtype == dtype
        errors.append(relative(y, exact(x.float() if x.is_floating_point() else x)))
    assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps / 4


@every_layer
def test_files_load_both_ways(kind, tmp_path):
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        model, layer, x = adapted(writer, kind)
        folder = tmp_path / writer.__name__
        model.save_pretrained(folder)
        read = reader.PeftModel.from_pretrained(build(kind)[0], folder, is_trainable=True)
        assert relative(read.base_model.model["layer"](x), layer(x)) <= 1e-5
        keys = peft_fast.load_peft_weights(folder).keys()
        assert any(key.endswith("layer.lora_magnitude_vector") for key in keys)
        assert set(keys) == set(writer.get_peft_model_state_dict(model))


@dense_layers
def test_merging_and_unmerging(kind):
    model, layer, x = adapted(peft_fast, kind)
    before, weights = layer(x), {name: p.detach().clone() for name, p in named(model).items()}
    model.merge_adapter(safe_merge=True)
    assert relative(layer(x), before) <= 1e-5
    model.unmerge_adapter()
    for name, parameter in named(model).items():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-4, atol=1e-5)
    assert relative(layer(x), before) <= 1e-5
    theirs = adapted(peft, kind)[0].merge_and_unload()
    for (name, mine), other in zip(named(model.merge_and_unload()).items(), named(theirs).values()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


def test_a_4bit_weight_is_merged_and_given_back():
    model, layer, x = adapted(peft_fast, "4bit")
    before, packed = layer(x), layer.base_layer.weight.detach().clone()
    weight = layer.shifted_base(["default"])[0]
    torch.testing.assert_close(nn.functional.linear(x, weight, layer.bias), before, rtol=1e-4, atol=1e-4)
    plain = copy.deepcopy(model).base_model.merge_to_16bit(torch.bfloat16, progressbar=False)["layer"]
    torch.testing.assert_close(plain.weight, weight.bfloat16())
    with pytest.warns(UserWarning, match="k-bit weight rounds"):
        model.merge_adapter()
    assert relative(layer(x), before) < 0.2
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, packed)
    torch.testing.assert_close(layer(x), before)


def test_merging_several_one_after_another():
    def use(model, layer, x):
        library = peft_fast if isinstance(model, peft_fast.PeftModel) else peft
        model.add_adapter("plain", library.LoraConfig(r=2, target_modules=["layer"]))
        model.add_adapter("dora", library.LoraConfig(r=3, target_modules=["layer"], use_dora=True))
        shaken(model, 2)
        found = []
        for name in ("default", "plain", "dora"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.merge_adapter([name])
            found.append(layer.get_base_layer().weight.detach().clone())
        model.unmerge_adapter()
        return [*found, layer.get_base_layer().weight]

    for kind in ("linear", "hf-conv1d", "conv2d", "embedding"):
        for mine, other in zip(*both(kind, use)):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@every_layer
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_several_active_adapters_in_any_order(kind, dropout):
    def use(model, layer, x):
        library = peft_fast if isinstance(model, peft_fast.PeftModel) else peft
        model.add_adapter("plain", library.LoraConfig(r=2, target_modules=["layer"]))
        other = library.LoraConfig(r=3, target_modules=["layer"], use_dora=True, lora_dropout=dropout)
        model.add_adapter("other", other)
        shaken(model, 2).train()
        found = []
        for names in (["default", "plain"], ["plain", "other"], ["default", "other"], ["other", "plain", "default"]):
            model.base_model.set_adapter(names)
            torch.manual_seed(9)
            found.append(layer(x))
        with model.disable_adapter():
            found.append(layer(x))
        layer.set_scale("default", 0.5)
        model.set_adapter("default")
        return [*found, layer(x)]

    for mine, other in zip(*both(kind, use)):
        assert relative(mine, other) <= 1e-5
