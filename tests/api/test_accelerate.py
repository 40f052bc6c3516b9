"""accelerate(): a model that real peft made, on our ops, computes, trains, saves, merges and switches as it did."""

import copy
import io
import pickle
import sys
import warnings

import peft
import pytest
import torch
from torch import nn

import peft_fast
from peft_fast.integrations.peft_layers import Accelerated, AcceleratedEmbedding, AcceleratedLinear, accelerated_class

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "linear": {},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lora-bias": {"lora_bias": True, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {"use_rslora": True},
    "modules-to-save": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]},
}


@pytest.fixture
def make(trained):
    def made(model: nn.Module, **options):
        torch.manual_seed(5)
        config = peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trained(peft.get_peft_model(model, config))

    return made


def of_model(model, tokens, **autocast):
    """(logits, {name: gradient})"""
    model.zero_grad()
    with torch.autocast("cpu", **{"enabled": False, **autocast}):
        out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, before, tokens, tolerance=1e-5, **autocast):
    (y, grads), (y_before, grads_before) = of_model(model, tokens, **autocast), before
    assert relative(y, y_before) < tolerance
    assert grads.keys() == grads_before.keys()
    for name, grad in grads.items():
        assert relative(grad, grads_before[name]) < 5 * tolerance, name


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def accelerated(model):
    return [name for name, module in model.named_modules() if isinstance(module, Accelerated)]


def photograph(model):
    """Every module's class, attributes and hooks."""
    return [
        (name, type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_outputs_and_gradients_stay_and_restore_leaves_nothing(llama, make, tokens, options):
    model = make(llama(), **options)
    before, shape, keys = of_model(model, tokens), photograph(model), list(model.state_dict())
    tensors = {name: id(p) for name, p in model.named_parameters()}
    assert isinstance(peft_fast.accelerate(model), peft_fast.explain.__globals__["Explanation"])
    assert accelerated(model)
    assert_same(model, before, tokens)
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    peft_fast.restore(model)
    assert photograph(model) == shape
    y, grads = of_model(model, tokens)
    assert torch.equal(y, before[0])
    assert all(torch.equal(grad, before[1][name]) for name, grad in grads.items())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_k_bit_layers(load, make, tokens, bits, dtype):
    model = make(load("llama", bits, dtype)).train()  # from_pretrained leaves it in eval mode
    before, shape = of_model(model, tokens), photograph(model)
    rows = {row.name: row for row in peft_fast.accelerate(model).rows}
    row = rows["base_model.model.model.layers.0.self_attn.q_proj"]
    assert row.route == ("reference" if bits == 4 else "added")
    assert ("base_model.model.model.layers.0.mlp" in rows) == (bits == 4)
    assert_same(model, before, tokens, 1e-5 if dtype == torch.float32 else 3e-2)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=tokens)  # where bitsandbytes rewrites 4-bit weights on some CPUs, and loses gradients
    model.train()
    assert_same(model, before, tokens, 1e-5 if dtype == torch.float32 else 3e-2)
    peft_fast.restore(model)
    assert photograph(model) == shape
    assert all(
        m.support_avx512bf16_for_cpu == torch.cpu._is_avx512_bf16_supported()
        for m in model.modules()
        if type(m).__name__ == "Linear4bit" and hasattr(m, "support_avx512bf16_for_cpu")
    )


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_under_autocast_the_difference_is_of_bf16s_rounding(load, make, tokens, bits):
    exact, model = (make(load("llama", bits, torch.float32)).train() for _ in range(2))
    truth = of_model(exact, tokens)[0]
    autocast = {"enabled": True, "dtype": torch.bfloat16}
    theirs = relative(of_model(model, tokens, **autocast)[0], truth)
    peft_fast.accelerate(model)
    ours = relative(of_model(model, tokens, **autocast)[0], truth)
    assert 0 < theirs < 0.05
    assert ours < 1.5 * theirs


def test_conv1d_and_a_head_of_another_dtype(load, make, tokens):
    model = make(load("gpt2", None), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    before = of_model(model, tokens)
    assert {row.route for row in peft_fast.accelerate(model).rows} == {"reference"}
    assert_same(model, before, tokens)


def test_adapters_are_switched_added_scaled_disabled_and_deleted_as_in_peft(llama, make, trained, tokens):
    models = [make(llama()) for _ in range(2)]
    peft_fast.accelerate(models[1])
    results = []
    for model in models:
        found = []
        torch.manual_seed(1)
        model.add_adapter("second", peft.LoraConfig(r=8, target_modules=["q_proj", "up_proj"]))
        trained(model, seed=2)
        model.set_adapter("second")
        found.append(model(input_ids=tokens).logits)
        model.base_model.set_adapter(["default", "second"])
        found.append(model(input_ids=tokens).logits)
        with model.disable_adapter():
            found.append(model(input_ids=tokens).logits)
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_scale("default", 3.0)
        found.append(model(input_ids=tokens).logits)
        names = ["default", "second", "__base__"]
        model.eval()
        found.append(model(input_ids=tokens, adapter_names=names).logits)  # peft's mixed batch, through its pre-hooks
        model.train()
        model.delete_adapter("default")
        model.set_adapter("second")
        found.append(model(input_ids=tokens).logits)
        results.append(found)
    theirs, ours = results
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert relative(a, b) < 1e-5, i
    assert relative(theirs[0], theirs[1]) > 1e-3  # the steps do something
    assert {row.route for row in peft_fast.explain(models[1], show=False).rows} >= {"reference"}


@pytest.mark.parametrize("kind", ["llama", "llama_4bit"])
def test_merging_unmerging_and_unloading_are_pefts(request, make, tokens, kind):
    build = request.getfixturevalue(kind)
    model, twin = (make(build()) for _ in range(2))
    peft_fast.accelerate(model)
    for one in (model, twin):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one.merge_adapter()
    assert relative(model(input_ids=tokens).logits, twin(input_ids=tokens).logits) < 1e-5
    assert "peft" not in {row.route for row in peft_fast.explain(model, show=False).rows}
    model.unmerge_adapter()
    twin.unmerge_adapter()
    assert relative(model(input_ids=tokens).logits, twin(input_ids=tokens).logits) < 1e-5
    plain, plain_twin = model.merge_and_unload(), twin.merge_and_unload()
    assert not accelerated(plain)
    assert relative(plain(input_ids=tokens).logits, plain_twin(input_ids=tokens).logits) < 1e-5
    peft_fast.restore(plain)
    assert photograph(plain) == photograph(plain_twin)


def test_files_are_pefts_and_load_into_an_accelerated_model(llama, make, tokens, tmp_path):
    model, twin = make(llama()), make(llama())
    peft_fast.accelerate(model)
    model.save_pretrained(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    model.load_adapter(tmp_path / "theirs", "again")
    model.set_adapter("again")
    assert relative(model(input_ids=tokens).logits, twin(input_ids=tokens).logits) < 1e-5


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_too(llama, make, tokens, way):
    model = make(llama(), target_modules=[*TARGETS, "embed_tokens"])
    peft_fast.accelerate(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert accelerated(other) == accelerated(model)
    assert repr(other) == repr(model)
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    peft_fast.restore(other)
    assert not accelerated(other)
    assert accelerated(model)
    restored = pickle.loads(pickle.dumps(other))
    assert relative(restored(input_ids=tokens).logits, model(input_ids=tokens).logits) < 1e-5


def test_what_is_not_covered_is_pefts_own_with_the_reason(llama, make, tokens):
    model = make(llama(), use_dora=True, target_modules=["q_proj", "v_proj"])
    first = next(m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A"))
    rows = peft_fast.accelerate(model).rows
    assert {row.route for row in rows if row.base} == {"peft"}
    assert all("no plain LoRA: DoraLinearVariant" in row.because for row in rows if row.base)
    assert isinstance(first, AcceleratedLinear)
    hooked = make(llama(), target_modules=["q_proj"])
    peft_fast.accelerate(hooked)
    seen = []
    layer = hooked.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    assert "has hooks" in layer.route(8).because
    hooked(input_ids=tokens)
    assert seen == [1]


def test_other_tuners_of_peft_stay_as_they_are(llama, tokens):
    model = peft.get_peft_model(llama(), peft.LoHaConfig(r=4, target_modules=["q_proj"]))
    shape = photograph(model)
    rows = peft_fast.accelerate(model).rows
    assert [row.route for row in rows] == ["peft", "peft"]
    assert "does not cover peft's Linear" in rows[0].because
    assert photograph(model) == shape


def test_layers_that_come_later_need_another_call(llama, make):
    model = make(llama(), target_modules=["q_proj"])
    peft_fast.accelerate(model)
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["v_proj"]))
    routes = {row.name.rpartition(".")[2]: row for row in peft_fast.explain(model, show=False).rows}
    assert routes["v_proj"].route == "peft"
    assert "peft_fast.accelerate(model)" in routes["v_proj"].because
    peft_fast.accelerate(model)
    count = len(accelerated(model))
    peft_fast.accelerate(model)
    assert len(accelerated(model)) == count == 4


def test_dropout_drops_as_many_and_no_more(llama, make):
    model = make(llama(), target_modules=["q_proj"], lora_dropout=0.5)
    peft_fast.accelerate(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(400, 64)
    plain = layer.base_layer(x)
    torch.manual_seed(0)
    mean = sum(layer(x) - plain for _ in range(100)) / 100
    layer.eval()
    assert relative(mean, layer(x) - plain) < 0.3
    assert torch.equal(layer(x), layer(x))


def test_it_compiles_in_one_graph(llama, make, tokens):
    model = make(llama(), target_modules=["q_proj", "down_proj"])
    peft_fast.accelerate(model)
    expected = model(input_ids=tokens).logits
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), layer(x)) < 1e-6
    assert relative(model(input_ids=tokens).logits, expected) < 1e-6


def test_names_of_ours_hide_none_of_pefts():
    for original in (peft.tuners.lora.Linear, peft.tuners.lora.Embedding, peft.tuners.lora.Linear4bit):
        cls = accelerated_class(original)
        front = AcceleratedEmbedding if original is peft.tuners.lora.Embedding else AcceleratedLinear
        own = {name for kind in (front, Accelerated) for name in vars(kind) if not name.startswith("__")}
        assert {name for name in own if hasattr(original, name)} <= {"forward"}
        assert (cls.__name__, cls.__qualname__) == (original.__name__, original.__qualname__)


def test_what_cannot_be_accelerated_is_refused(llama, untouched, monkeypatch):
    with pytest.raises(TypeError, match="got a dict"):
        peft_fast.accelerate({})
    with pytest.raises(TypeError, match="got a dict"):
        peft_fast.restore({})
    plain = llama()
    with untouched(plain), pytest.raises(ValueError, match="no adapter layers of peft's"):
        peft_fast.accelerate(plain)
    ours = peft_fast.get_peft_model(llama(), peft_fast.LoraConfig(target_modules=["q_proj"]))
    with untouched(ours):
        with pytest.raises(ValueError, match="peft_fast's own already"):
            peft_fast.accelerate(ours)
        with pytest.raises(ValueError, match=r"model.unload\(\) removes them"):
            peft_fast.restore(ours)
    monkeypatch.delitem(sys.modules, "peft.tuners.tuners_utils")
    with pytest.raises(ValueError, match="no adapter layers of peft's"):
        peft_fast.accelerate(plain)


def test_a_hooked_4bit_layer_of_ours_under_autocast(llama_4bit, tokens):
    """It is called, and gives fp32 where the adapter gives bf16: so do bitsandbytes' 8-bit layers."""
    model = peft_fast.get_peft_model(llama_4bit(), peft_fast.LoraConfig(r=4, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        layer.base_layer.register_forward_hook(lambda *_: None)
        assert relative(layer(x), expected) < 1e-2
