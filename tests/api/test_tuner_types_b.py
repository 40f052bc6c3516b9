"""Every method of a list beside peft's from the same seed: a method is a row of tuner_cases_b.py.

Layers of each kind that it adapts, models in training, merging, files both ways, several adapters, k-bit bases.
"""

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import peft_fast

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tuner_cases_b import IDS_IN, METHODS, adapted, every, shaken

LIBRARIES = (peft_fast, peft)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out"),
]


IDS = [method.name for method in METHODS]
EVERY = pytest.mark.parametrize("method", METHODS, ids=IDS)
EVERY_VARIANT = pytest.mark.parametrize(
    ("method", "variant"), [pytest.param(m, v, id=f"{m.name}-{k}") for m in METHODS for k, v in m.variants.items()]
)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(ours, theirs, precision, where=""):
    assert ours.keys() == theirs.keys() != set(), where
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= precision * gradient.norm() + 1e-7, (where, name)


@EVERY_VARIANT
def test_every_layer(method, variant):
    results = []
    for library in LIBRARIES:
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(every(), method.config(library, target_modules=method.layers, **variant))
        start = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
        start["after"] = torch.rand(1)
        y = shaken(model, method.prefix)(IDS_IN)
        y.square().sum().backward()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        results.append((start, y, gradients(model), weights))
    (start, y, ours, weights), (their_start, their_y, theirs, their_weights) = results
    assert list(start) == list(their_start)
    torch.testing.assert_close(start, their_start, rtol=0, atol=0)
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    close(ours, theirs, method.precise)
    torch.testing.assert_close(weights, their_weights, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(y, every()(IDS_IN), atol=1e-3)


@EVERY
def test_the_base_model_at_first(method):
    if method.like_the_base is None:
        pytest.skip("starts with random weights")
    model = peft_fast.get_peft_model(
        every(), method.config(peft_fast, target_modules=method.layers, **method.like_the_base)
    )
    torch.testing.assert_close(model(IDS_IN), every()(IDS_IN))


@EVERY_VARIANT
def test_merged_is_unmerged(method, variant):
    base = every()
    modules = dict(base.named_modules())
    model = adapted(peft_fast, method, base, target_modules=method.layers, **variant).eval()
    expected = model(IDS_IN)
    model.merge_adapter()
    layer = model.base_model.model.linear
    assert layer.merged
    torch.testing.assert_close(layer.base_layer(torch.ones(8)), layer(torch.ones(8)))
    torch.testing.assert_close(model(IDS_IN), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS_IN), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS_IN), every()(IDS_IN), rtol=1e-4, atol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert [type(module) for module in merged.modules()] == [type(module) for module in every().modules()]
    torch.testing.assert_close(merged(IDS_IN), expected, rtol=1e-4, atol=1e-5)
    theirs = adapted(peft, method, every(), target_modules=method.layers, **variant).eval().merge_and_unload()
    torch.testing.assert_close(theirs(IDS_IN), expected, rtol=1e-4, atol=1e-5)
    assert dict(model.unload().named_modules()) == modules
    torch.testing.assert_close(base(IDS_IN), every()(IDS_IN), rtol=1e-4, atol=1e-5)


@EVERY
def test_merging_several(method):
    """Together, one after the other, and out again: what is merged is what was computed."""
    model = two_adapters(peft_fast, method).eval()
    for names in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        expected = model(IDS_IN)
        model.merge_adapter()
        torch.testing.assert_close(model(IDS_IN), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(IDS_IN), expected, rtol=1e-4, atol=1e-5)
        for name in names:
            model.merge_adapter([name])
        torch.testing.assert_close(model(IDS_IN), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(IDS_IN), expected, rtol=1e-4, atol=1e-5)


@EVERY
def test_a_broken_one_is_not_merged(method, untouched):
    model = adapted(peft_fast, method, every(), target_modules=method.layers)
    weight = next(p for n, p in model.named_parameters() if method.prefix in n)
    weight.data.fill_(float("nan"))
    with untouched(model), pytest.raises(ValueError, match="inf or NaN"):
        model.merge_adapter(safe_merge=True)


@EVERY_VARIANT
def test_files_both_ways(method, variant, tmp_path):
    options = {"target_modules": method.layers, "modules_to_save": ["bare"], **variant}
    models = {library: adapted(library, method, every(), **options).eval() for library in LIBRARIES}
    for library, model in models.items():
        model.base_model.model.bare.modules_to_save["default"].weight.data += 0.1
        model.save_pretrained(tmp_path / library.__name__)
    files = [load_file(tmp_path / library.__name__ / "adapter_model.safetensors") for library in LIBRARIES]
    torch.testing.assert_close(*files, rtol=0, atol=0)
    assert any(method.prefix in key for key in files[0])
    expected = models[peft](IDS_IN)
    for saved in LIBRARIES:
        for loading in LIBRARIES:
            for low in (False, True):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = loading.PeftModel.from_pretrained(
                        every(), tmp_path / saved.__name__, low_cpu_mem_usage=low
                    ).eval()
                torch.testing.assert_close(model(IDS_IN), expected, rtol=1e-5, atol=1e-5)
    configs = [peft_fast.PeftConfig.from_pretrained(tmp_path / library.__name__) for library in LIBRARIES]
    assert configs[0] == configs[1]


def two_adapters(library, method):
    model = adapted(library, method, every(), target_modules=method.layers)
    torch.manual_seed(5)
    model.add_adapter("other", method.config(library, target_modules=[*method.layers, "bare"]))
    return shaken(model, method.prefix, "other", 4)


@EVERY
def test_several_adapters(method):
    results = []
    for library in LIBRARIES:
        model = two_adapters(library, method).eval()
        outputs = []
        for names in (["default"], ["other"], ["default", "other"], ["other", "default"]):
            model.base_model.set_adapter(names)
            outputs.append(model(IDS_IN))
            outputs.append([name for name, p in model.named_parameters() if p.requires_grad])
            rows = [vars(row) for row in model.get_layer_status()]
            for row in rows:  # peft counts what a layer has of adapters that it has not
                row["devices"] = {n: d for n, d in row["devices"].items() if n in row["available_adapters"]}
            outputs.append(rows)
        model.set_adapter("other")
        model.delete_adapter("default")
        outputs.append(model(IDS_IN))
        results.append(outputs)
    for ours, theirs in zip(*results):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        else:
            assert ours == theirs
    assert len({float(y.sum()) for y in results[0] if isinstance(y, torch.Tensor)}) >= 3


@EVERY
@pytest.mark.parametrize("how", ["fp32", "autocast", "bf16", "all in bf16", "checkpointing"])
def test_a_model_in_training(method, how, llama, tokens):
    """In bf16 the adapters are in fp32, unless autocast_adapter_dtype is switched off."""
    dtype, cast = torch.bfloat16 if "bf16" in how else torch.float32, how != "all in bf16"
    results = []
    for library in LIBRARIES:
        torch.manual_seed(2)
        config = method.config(library, task_type="CAUSAL_LM")
        model = library.get_peft_model(llama(dtype), config, autocast_adapter_dtype=cast).train()
        shaken(model, method.prefix, std=0.05)
        kinds = {p.dtype for n, p in model.named_parameters() if method.prefix in n}
        assert kinds == {torch.float32 if cast else dtype}
        if how == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        results.append((loss, gradients(model), model.eval()(tokens).logits.float()))
    precise = how in ("fp32", "checkpointing")
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5 if precise else 5e-3, atol=0)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-4 if precise else 0.05)
    close(results[0][1], results[1][1], method.precise if precise else 0.1, how)


@EVERY
def test_what_is_said_of_the_layers(method):
    model = adapted(peft_fast, method, every(), target_modules=method.layers)
    rows = {row.name.rpartition(".")[2]: row for row in peft_fast.explain(model, show=False).rows}
    assert list(rows) == [name for name in dict(every().named_children()) if name in method.layers]
    assert {row.route for row in rows.values()} == {"added"}
    with model.disable_adapter():
        assert {row.route for row in peft_fast.explain(model, show=False).rows} == {"base"}


@EVERY
def test_layers_that_are_refused(method, untouched):
    for name in [*method.refused, "out_proj"]:
        base = every()
        with untouched(base), pytest.raises(ValueError, match=f"{method.name} cannot adapt"):
            peft_fast.get_peft_model(base, method.config(peft_fast, target_modules=[name]))


def kbit_model(bits):
    """`bare` and `linear` in 4 or 8 bits, with rows that the blocks of 64 divide."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64, bias=False))
        for index in (0, 2):
            old = model[index]
            sizes = (old.in_features, old.out_features, old.bias is not None)
            if bits == 4:
                new: Any = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            else:
                new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            new.load_state_dict(old.state_dict())
            model[index] = new.to("cpu")
    return model


@pytest.mark.parametrize(
    ("method", "bits"), [pytest.param(m, bits, id=f"{m.name}-{bits}") for m in METHODS for bits in m.bits]
)
def test_kbit_bases(method, bits):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    results = []
    for library in LIBRARIES:
        base = kbit_model(bits)
        setattr(base, f"is_loaded_in_{bits}bit", True)  # as transformers leaves it
        model = adapted(library, method, base, target_modules=["0", "2"], std=0.05)
        y = model(x)
        y.square().sum().backward()
        results.append((y, gradients(model)))
    rounded = 2e-2 if bits == 8 else 1e-5  # 8-bit layers round their input
    assert (results[0][0] - results[1][0]).norm() <= rounded * results[1][0].norm()
    close(results[0][1], results[1][1], max(method.precise, rounded))
    model = adapted(peft_fast, method, kbit_model(bits), target_modules=["0", "2"], std=0.05).eval()
    expected, plain = model(x), kbit_model(bits)(x)
    with pytest.warns(UserWarning, match="rounds the sum"):
        model.merge_adapter()
    assert (model(x) - expected).norm() < 0.35 * (expected - plain).norm() + 0.2 * expected.norm()
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    plain = model.base_model.merge_to_16bit(progressbar=False)
    assert {type(module) for module in plain if type(module) is not nn.Tanh} == {nn.Linear}
    assert (plain(x.bfloat16()).float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("method", "options", "error"),
    [pytest.param(m, *bad, id=f"{m.name}-{name}") for m in METHODS for name, bad in m.bad.items()]
    + [
        pytest.param(m, *bad, id=f"{m.name}-{name}")
        for m in METHODS
        for name, bad in {
            "targets": ({"target_modules": "("}, "target_modules must be a regular expression"),
            "names": ({"target_modules": [1]}, "target_modules must be names of modules"),
            "lists": ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
            "layers": ({"layers_to_transform": "h"}, "layers_to_transform must be an index"),
            "saved": ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
            "init": ({"init_weights": "x"}, "init_weights must be True or False"),
        }.items()
    ],
)
def test_options_that_cannot_be(method, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        method.config(peft_fast, **options)


@EVERY
@pytest.mark.filterwarnings("ignore:oft_block_size")
def test_files_that_ask_for_too_much(method, tmp_path, untouched):
    """A size in the config that the file's tensors are not of: refused before memory is taken for it."""
    adapted(peft_fast, method, every(), target_modules=["linear"]).save_pretrained(tmp_path)
    path, large = tmp_path / "adapter_config.json", 10**12
    values = json.loads(path.read_text())
    for option in ("r", "n_frequency", "boft_block_size", "oft_block_size"):
        if values.get(option):
            path.write_text(json.dumps({**values, option: large}))
            model = every()
            with untouched(model), pytest.raises(ValueError, match=r"fit|divide|at most"):
                peft_fast.PeftModel.from_pretrained(model, tmp_path)


@EVERY
def test_config_is_pefts(method, tmp_path):
    for options in ({}, method.options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, theirs = (getattr(l, f"{method.name}Config")(target_modules=["a", "b"], **options) for l in LIBRARIES)
            assert ours.to_dict() == theirs.to_dict()
            ours.save_pretrained(tmp_path)
            assert peft.PeftConfig.from_pretrained(tmp_path) == theirs
            assert peft_fast.PeftConfig.from_pretrained(tmp_path) == ours


@EVERY
def test_biases(method, tmp_path):
    for bias in ("all", f"{method.prefix}only"):
        results = []
        for library in LIBRARIES:
            model = adapted(library, method, every(), target_modules=["linear"], bias=bias)
            results.append({name for name, p in model.named_parameters() if p.requires_grad})
            model.save_pretrained(tmp_path / library.__name__)
        assert results[0] == results[1]
        assert any(name.endswith(".bias") for name in results[0])
        files = [load_file(tmp_path / library.__name__ / "adapter_model.safetensors") for library in LIBRARIES]
        assert files[0].keys() == files[1].keys()


@EVERY
def test_default_targets(method):
    names = {
        "llama": transformers.LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
        "bert": transformers.BertConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
    }
    for config in names.values():
        found = []
        for library in LIBRARIES:
            model = library.get_peft_model(transformers.AutoModel.from_config(config), method.config(library))
            found.append(sorted(model.base_model.targeted_module_names))
        assert found[0] == found[1] != []
