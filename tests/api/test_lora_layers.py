"""LoRA around what is no nn.Linear: embeddings, convolutions, transformers' Conv1D, attention; beside peft itself."""

import copy
import dataclasses
import pickle
import warnings

import peft
import pytest
import torch

import peft_fast
from peft_fast import explain

from .lora_layer_models import LAYERS, UNMERGEABLE, WITH_BIAS, adapted, build, named, relative, shaken

every_layer = pytest.mark.parametrize("kind", [*LAYERS, *UNMERGEABLE])
mergeable = pytest.mark.parametrize("kind", LAYERS)


@every_layer
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_names_printed_form_and_initial_values_are_pefts(kind, init):
    ours, theirs = (
        adapted(library, kind, shake=False, init_lora_weights=init)[0] for library in (peft_fast, peft)
    )  # fmt: skip
    assert named(ours).keys() == named(theirs).keys()
    for name, mine in named(ours).items():
        other = named(theirs)[name]
        assert torch.equal(mine, other), name
        assert (mine.dtype, mine.requires_grad) == (other.dtype, other.requires_grad), name
    assert repr(ours.base_model.model) == repr(theirs.base_model.model)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.peft_config["default"].fan_in_fan_out == theirs.peft_config["default"].fan_in_fan_out


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, options) for kind in [*LAYERS, *UNMERGEABLE] for options in ({}, {"use_rslora": True})),
        *((kind, {"lora_bias": True}) for kind in (*WITH_BIAS, *UNMERGEABLE)),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_pefts(kind, options):
    found = []
    for library in (peft_fast, peft):
        model, x = adapted(library, kind, **options)
        y = model(x)
        y.square().sum().backward()
        found.append((y, {name: p.grad for name, p in named(model).items()}))
    assert relative(found[0][0], found[1][0]) <= 1e-6
    compared = 0
    for name, mine in found[0][1].items():
        other = found[1][1][name]
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert relative(mine, other) <= 1e-5, name
            compared += 1
    assert compared >= 2


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models_are_as_near_to_fp32_as_peft(kind, dtype):
    errors = []
    for library in (peft_fast, peft):
        model, x = adapted(library, kind, dtype=dtype)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
        if kind.startswith("conv"):  # peft's convolutions want x in the adapter's dtype, and get it
            assert model.base_model.model.layer(x).dtype == dtype
        reference = copy.deepcopy(model).float()
        y = model(x)
        assert y.dtype == dtype
        errors.append(relative(y, reference(x.float() if x.is_floating_point() else x)))
    assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps


@every_layer
def test_files_load_both_ways_with_equal_outputs(kind, tmp_path):
    keys = []
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        written, x = adapted(writer, kind)
        folder = tmp_path / writer.__name__
        written.save_pretrained(folder)
        read = reader.PeftModel.from_pretrained(build(kind)[0], folder)
        assert relative(read(x), written(x)) <= 1e-6
        keys.append(writer.get_peft_model_state_dict(written).keys())
        assert keys[-1] == peft_fast.load_peft_weights(folder).keys()
    assert set(keys[0]) == set(keys[1])


@mergeable
def test_merging_unmerging_and_unloading(kind):
    (ours, x), (theirs, _) = (adapted(library, kind) for library in (peft_fast, peft))
    base, _ = build(kind)
    before, weights = ours(x), {n: p.detach().clone() for n, p in named(ours).items()}
    modules = dict(ours.named_modules())
    ours.merge_adapter(safe_merge=True)
    assert relative(ours(x), before) <= 1e-5
    with pytest.warns(UserWarning, match=r"unload\(\) gives the base model as it was"):
        torch.testing.assert_close(copy.deepcopy(ours).unload()(x), base(x))
    ours.unmerge_adapter()
    for name, parameter in named(ours).items():
        torch.testing.assert_close(parameter, weights[name], atol=1e-5, rtol=1e-5)
    assert dict(ours.named_modules()) == modules
    plain = copy.deepcopy(ours).unload()
    assert repr(plain) == repr(base)
    torch.testing.assert_close(plain(x), base(x))
    merged, pefts = ours.merge_and_unload(), theirs.merge_and_unload()
    assert repr(merged) == repr(base)
    for name, parameter in named(merged).items():
        torch.testing.assert_close(parameter, named(pefts)[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "attention"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_to_16_bits(kind, use_dora):
    model, _ = adapted(peft_fast, kind, use_dora=use_dora)
    expected = copy.deepcopy(model).merge_and_unload()
    merged = model.base_model.merge_to_16bit(torch.bfloat16, progressbar=False)
    for name, parameter in named(merged).items():
        assert torch.equal(parameter, named(expected)[name].bfloat16()), name


def test_attention_is_not_merged_to_16_bits(untouched):
    model, _ = adapted(peft_fast, "attention")
    with untouched(model), pytest.raises(ValueError, match="knows no Attention, which is at layer"):
        model.base_model.merge_to_16bit(torch.bfloat16)


@pytest.mark.parametrize("kind", ["embedding", "embedding-scaled", "conv2d", "hf-conv1d", "attention"])
def test_torch_compile_makes_one_graph_with_its_gradients(kind):
    model, x = adapted(peft_fast, kind)
    layer = model.base_model.model.layer
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (layer, compiled):
        model.zero_grad()
        y = function(x)
        y = y[0] if isinstance(y, tuple) else y
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for eager, graph in zip(*results):
        torch.testing.assert_close(eager, graph)


def test_a_base_weight_that_is_trained_gets_its_gradient():
    for kind in ("hf-conv1d", "embedding-padding", "conv2d", "attention"):
        grads = []
        for library in (peft_fast, peft):
            model, x = adapted(library, kind)
            layer = model.base_model.model.layer.get_base_layer()
            weight = layer.in_proj_weight if kind == "attention" else layer.weight
            weight.requires_grad_(True)
            model(x).square().sum().backward()
            grads.append(weight.grad)
        if kind == "attention":  # peft cuts it off
            assert (grads[0].abs().sum() > 0, grads[1]) == (True, None)
        else:
            assert relative(*grads) <= 1e-6


@mergeable
def test_a_broken_adapter_is_not_merged(kind, untouched):
    model, _ = adapted(peft_fast, kind)
    parameter = [p for name, p in model.named_parameters() if "lora_" in name][-1]
    parameter.data.view(-1)[0] = torch.inf
    layer = model.base_model.model.layer
    with untouched(model), pytest.raises(ValueError, match="inf or NaN"):
        model.merge_adapter(safe_merge=True)
    with untouched(model), pytest.raises(ValueError, match="inf or NaN"):
        layer.merge(safe_merge=True)


@every_layer
def test_several_adapters_switching_and_scaling(kind):
    outputs = []
    for library in (peft_fast, peft):
        model, x = adapted(library, kind)
        model.add_adapter("other", library.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"]))
        found = [shaken(model, 2)(x)]
        for names in (["default", "other"], ["other"]):
            model.base_model.set_adapter(names)
            found.append(model(x))
        with model.disable_adapter():
            found.append(model(x))
        model.base_model.set_adapter(["default", "other"])
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("other", 0.5)
        found.append(model(x))
        model.delete_adapter("default")
        model.set_adapter("other")
        outputs.append([*found, model(x)])
    for ours, theirs in zip(*outputs):
        assert relative(ours, theirs) <= 1e-6
    assert all(relative(a, b) > 1e-3 for a, b in zip(outputs[0], outputs[0][1:]))


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "embedding"])
def test_dropout_is_pefts_mask_for_mask(kind):
    outputs = []
    for library in (peft_fast, peft):
        model, x = adapted(library, kind, lora_dropout=0.5)
        torch.manual_seed(9)
        outputs += [model.train()(x), model.eval()(x)]
    assert relative(outputs[0], outputs[2]) <= 1e-6
    assert relative(outputs[1], outputs[3]) <= 1e-6
    assert (relative(outputs[0], outputs[1]) > 1e-2) == (kind != "embedding")  # which drops nothing in peft either


def test_dropout_of_conv1d_layers_is_in_training_only():
    model, x = adapted(peft_fast, "hf-conv1d", lora_dropout=0.5)
    assert relative(model.train()(x), model.eval()(x)) > 1e-2
    assert torch.equal(model(x), model(x))


@every_layer
def test_status_is_pefts(kind):
    found = []
    for library in (peft_fast, peft):
        model, _ = adapted(library, kind)
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["layer"]))
        model.base_model.set_adapter(["default", "other"])
        found.append([dataclasses.asdict(layer) for layer in library.get_layer_status(model)])
    for ours, theirs in zip(*found, strict=True):
        assert {**ours, "quantization_backend": None} == {**theirs, "quantization_backend": None}


@every_layer
def test_copies_and_pickles(kind):
    model, x = adapted(peft_fast, kind)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(x), model(x))


@every_layer
def test_low_cpu_mem_usage(kind, tmp_path):
    model, x = adapted(peft_fast, kind)
    model.save_pretrained(tmp_path)
    loaded = peft_fast.PeftModel.from_pretrained(build(kind)[0], tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    torch.testing.assert_close(loaded(x), model(x))


@every_layer
def test_injected_by_the_keys_of_a_file(kind):
    model, x = adapted(peft_fast, kind)
    tensors = peft_fast.get_peft_model_state_dict(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|of 2 groups)")
        config = peft_fast.LoraConfig(r=4, lora_alpha=6)
        other = peft_fast.inject_adapter_in_model(config, build(kind)[0], state_dict=tensors)
    bare = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    assert not any(peft_fast.set_peft_model_state_dict(other, bare))
    torch.testing.assert_close(other(x), model(x))


@every_layer
def test_explain_has_a_row(kind):
    model, _ = adapted(peft_fast, kind)
    row = next(row for row in explain(model, show=False).rows if row.name.endswith(".layer"))
    assert row.route == ("reference" if kind in ("embedding", "embedding-padding", "hf-conv1d") else "added")
    with model.disable_adapter():
        row = next(row for row in explain(model, show=False).rows if row.name.endswith(".layer"))
        assert (row.route, "switched off" in row.because) == ("base", True)
