"""DoRA beside peft's: names, files, outputs, gradients and merging, on every kind of layer that has it."""

import copy
import pickle
import warnings

import accelerate
import bitsandbytes
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_fast
from peft_fast import explain, quantize_linear_layers
from peft_fast.helpers import DoraCaching
from peft_fast.tuners.lora import LinearLike, dora

K, N = 64, 48
IDS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [2, 2, 3, 3, 0, 9, 10, 1]])
X = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(2))
LAYERS = {
    "linear": (lambda: nn.Linear(K, N), X),
    "no-bias": (lambda: nn.Linear(K, N, bias=False), X),
    "hf-conv1d": (lambda: Conv1D(N, K), X),
    "embedding": (lambda: nn.Embedding(11, N, padding_idx=1), IDS),
    "conv1d": (lambda: nn.Conv1d(4, N, 3, padding=1), IMAGES[:, :, 0]),
    "conv2d": (lambda: nn.Conv2d(4, N, (3, 2), stride=2), IMAGES),
    "conv3d": (lambda: nn.Conv3d(4, N, 2), IMAGES[:, :, None].expand(2, 4, 2, 5, 6)),
    "4bit": (lambda: four_bit(nn.Linear(K, N)), X),
}
DENSE = [kind for kind in LAYERS if kind != "4bit"]
every_layer = pytest.mark.parametrize("kind", LAYERS)
dense_layers = pytest.mark.parametrize("kind", DENSE)


def four_bit(linear, dtype=torch.float32):
    layer = bitsandbytes.nn.Linear4bit(K, N, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def build(kind):
    make, x = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.ModuleDict({"layer": make()}), x


def adapted(library, kind, dtype=torch.float32, shake=True, **options):
    model, x = build(kind)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], "use_dora": True, **options}
        model = library.get_peft_model(model.to(dtype), library.LoraConfig(**config))
    x = x.to(dtype) if x.is_floating_point() else x
    return (shaken(model) if shake else model), model.base_model.model["layer"], x


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data += (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item()


def named(model):
    return dict(sorted(model.named_parameters()))


def both(kind, use, **options):
    """[ours, peft's] of what `use` makes of a model with its layer and an input."""
    return [use(*adapted(library, kind, **options)) for library in (peft_fast, peft)]


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
        library = peft if isinstance(model, peft.PeftModel) else peft_fast
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
        library = peft if isinstance(model, peft.PeftModel) else peft_fast
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


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_base_layer_with_hooks_is_called(dropout):
    outputs = []
    for hooked in (False, True):
        _, layer, x = adapted(peft_fast, "linear", lora_dropout=dropout)
        calls = []
        if hooked:
            layer.base_layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(9)
        outputs.append(layer(x))
        assert bool(calls) == hooked
        assert layer.route(4).route == ("added" if hooked else "reference")
    torch.testing.assert_close(*outputs)


def test_a_layer_that_accelerate_offloads_is_refused():
    _, layer, x = adapted(peft_fast, "linear")
    accelerate.hooks.add_hook_to_module(layer.base_layer, accelerate.hooks.AlignDevicesHook("cpu", offload=True))
    with pytest.raises(ValueError, match="DoRA needs the base weight for its norms, and that is on the meta device"):
        layer(x)
    layer.enable_adapters(False)
    assert layer(x).isfinite().all()


def test_the_norm_of_the_base_weight_is_computed_once_and_again_when_it_changes(monkeypatch):
    """In place, in a merge, with other data, in another dtype: always as a fresh layer would compute it."""
    model, layer, x = adapted(peft_fast, "linear")
    computed, original = [], peft_fast.ops.row_squares
    monkeypatch.setattr(peft_fast.ops, "row_squares", lambda weight: computed.append(1) or original(weight))

    def check(times, like=0):
        computed.clear()
        y = layer(x)
        layer(x)
        assert len(computed) == times
        fresh = copy.deepcopy(layer)
        fresh.base_changed()
        assert torch.equal(y, fresh(x))

    weight, other = layer.base_layer.weight, torch.randn(N, K)
    check(times=1)
    check(times=0)
    with torch.no_grad():
        weight.mul_(2)
    check(times=1)
    weight.data = other
    check(times=1)
    layer.base_layer.load_state_dict({"weight": other / 3, "bias": layer.base_layer.bias})
    check(times=1)
    layer.merge()
    layer.unmerge()
    check(times=1)
    layer.base_layer.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
    check(times=1)
    model.double()
    x = x.double()
    check(times=1)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d", "4bit"])
def test_caching_of_norms_in_eval_mode(kind, monkeypatch):
    _, layer, x = adapted(peft_fast, kind)
    other = adapted(peft_fast, kind)[1]
    computed, original = [], peft_fast.ops.merged_norms
    monkeypatch.setattr(peft_fast.ops, "merged_norms", lambda *args: computed.append(1) or original(*args))

    def check(times):
        computed.clear()
        y, again = layer(x), layer(x)
        assert len(computed) == times
        with DoraCaching(enabled=False):
            assert torch.equal(y, layer(x))
        assert torch.equal(y, again)

    with DoraCaching():
        layer.train()
        check(times=2)
        layer.eval()
        check(times=1)
        check(times=0)
        layer(x).sum().backward()  # twice through what is kept
        layer(x).sum().backward()
        with torch.no_grad():
            for parameter in layer.adapter_parameters("default"):
                parameter.mul_(1.5)
        check(times=1)
        layer.set_scale("default", 3.0)
        check(times=1)
        layer.base_changed()
        check(times=1)
        layer.train().eval()
        check(times=1)
        assert not other.kept_norms
    check(times=2)
    DoraCaching()(enabled=True)
    check(times=0)
    DoraCaching()(enabled=False)
    check(times=2)


def test_old_files_with_another_key(tmp_path):
    model, layer, x = adapted(peft_fast, "linear")
    tensors = peft_fast.get_peft_model_state_dict(model)
    old = {f"{key}.weight" if key.endswith("magnitude_vector") else key: value for key, value in tensors.items()}
    for library in (peft_fast, peft):
        fresh, of_fresh, _ = adapted(library, "linear", shake=False)
        library.set_peft_model_state_dict(fresh, old)
        torch.testing.assert_close(of_fresh(x), layer(x))


@every_layer
def test_copies_pickles_and_low_cpu_mem_usage(kind, tmp_path):
    model, layer, x = adapted(peft_fast, kind)
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(copied(x), expected)
    model.save_pretrained(tmp_path)
    loaded = peft_fast.PeftModel.from_pretrained(build(kind)[0], tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(loaded.base_model.model["layer"](x), expected)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 0.3), (torch.bfloat16, 0.15)], ids=str)
def test_bytes_kept_for_the_backward(dtype, allowed):
    """The outputs of the base layer and the adapter, once, and s; peft also keeps what it makes of W, and more."""
    kept = []
    for library in (peft_fast, peft):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 512, dtype=dtype))
        config = library.LoraConfig(target_modules=["0"], r=8, use_dora=True)
        model, x = library.get_peft_model(model, config), torch.randn(256, 512, dtype=dtype, requires_grad=True)
        storages = {}

        def note(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = model(x)
        own = {p.untyped_storage().data_ptr() for p in [x, *model.parameters()]}
        kept.append(sum(size for pointer, size in storages.items() if pointer not in own))
        assert y.requires_grad
    assert 0 < kept[0] <= allowed * kept[1]


def test_autocast():
    outputs, exact = [], adapted(peft_fast, "linear")[1](X)
    for library in (peft_fast, peft):
        model, layer, x = adapted(library, "linear")
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        assert all(p.grad.isfinite().all() for n, p in named(model).items() if "lora_" in n)
        outputs.append((y.dtype, relative(y, exact)))
    assert outputs[0][0] == outputs[1][0] == torch.bfloat16
    assert outputs[0][1] <= 1.5 * outputs[1][1]


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_torch_compile_makes_one_graph(kind):
    _, layer, x = adapted(peft_fast, kind)
    expected = layer(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


def test_a_gated_mlp_runs_layer_by_layer_and_says_why(llama, trained, tokens):
    logits = []
    for library in (peft_fast, peft):
        torch.manual_seed(0)
        config = library.LoraConfig(target_modules=["gate_proj", "up_proj"], use_dora=True, r=4)
        model = trained(library.get_peft_model(llama(), config))
        logits.append(model(tokens).logits)
        if library is peft_fast:
            rows = {row.name.rpartition(".")[2]: row for row in explain(model, show=False).rows}
    assert relative(*logits) <= 1e-5
    assert (rows["mlp"].route, rows["mlp"].because) == ("layers", "gate_proj has an adapter with DoRA")
    assert "DoRA" in rows["gate_proj"].because


def test_our_own_4bit_layer():
    model = nn.Sequential(nn.Linear(K, N)).requires_grad_(False)
    quantize_linear_layers(model)
    plain = copy.deepcopy(model)
    dense = nn.Sequential(nn.Linear(K, N))
    dense[0].weight.data = peft_fast.ops.dequantize(plain[0].quantized_weight, torch.float32)
    dense[0].bias.data = plain[0].bias.data
    outputs = []
    for base in (model, dense):
        torch.manual_seed(1)
        config = peft_fast.LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False)
        outputs.append(peft_fast.get_peft_model(base, config)(X))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


class Unknown(nn.Module):
    in_features = out_features = 8

    def forward(self, x):
        return x


def _unknown():
    config = peft_fast.LoraConfig(target_modules=["layer"], use_dora=True)
    config._register_custom_module({Unknown: LinearLike})
    return config


@pytest.mark.parametrize(
    ("make", "config", "error", "message"),
    [
        (lambda: nn.MultiheadAttention(8, 2), None, ValueError, "use_dora is not for torch.nn.MultiheadAttention"),
        (Unknown, _unknown, ValueError, "use_dora is not for a Unknown"),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), None, NotImplementedError, "use_dora is not for .* of 2 groups"),
        (lambda: nn.Conv2d(4, 8, 3, padding_mode="reflect"), None, NotImplementedError, "padding_mode 'reflect'"),
    ],
)
def test_layers_without_magnitudes(untouched, make, config, error, message):
    base = nn.ModuleDict({"first": nn.Linear(2, 2), "layer": make()})
    config = config() if config else peft_fast.LoraConfig(target_modules=["first", "layer"], use_dora=True)
    with untouched(base), pytest.raises(error, match=message):
        peft_fast.get_peft_model(base, config)


def test_options_that_exclude_it():
    with pytest.raises(ValueError, match="lora_bias is not supported with use_dora"):
        peft_fast.LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(TypeError, match="use_dora must be True or False"):
        peft_fast.LoraConfig(use_dora=1)
    runtime = peft_fast.tuners.lora.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    with pytest.raises(NotImplementedError, match="ephemeral_gpu_offload"):
        peft_fast.LoraConfig(use_dora=True, runtime_config=runtime)
