"""DoRA: what is kept and when it is computed anew, hooks, autocast, torch.compile, gated MLPs, what is refused."""

import copy
import pickle

import accelerate
import peft
import pytest
import torch
from torch import nn

import peft_fast
from peft_fast import explain, quantize_linear_layers
from peft_fast.helpers import DoraCaching
from peft_fast.tuners.lora import LinearLike

from .dora_models import LAYERS, K, N, X, adapted, build, named, relative

every_layer = pytest.mark.parametrize("kind", LAYERS)


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
def test_an_adapter_that_is_deleted_and_added_again(kind):
    """By the same name, with tensors that were written to as often."""
    model, layer, x = adapted(peft_fast, kind)
    config = copy.copy(model.peft_config["default"])
    config.init_lora_weights = False
    model.eval()
    with DoraCaching(), torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            model.add_adapter("other", config)
            model.set_adapter("other")
            y = layer(x)
            with DoraCaching(enabled=False):
                torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
            model.set_adapter("default")
            model.delete_adapter("other")


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
        others = {name: value + 1 for name, value in layer.state_dict().items() if "lora_" in name}
        layer.load_state_dict(others, strict=False, assign=True)  # new tensors, of which nothing is counted yet
        check(times=1)
        layer.load_state_dict({name: value * 2 for name, value in others.items()}, strict=False, assign=True)
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


@pytest.mark.parametrize(
    "kind", ["linear", *(pytest.param(k, marks=pytest.mark.slow) for k in ("embedding", "conv2d"))]
)
def test_torch_compile_makes_one_graph(kind):
    _, layer, x = adapted(peft_fast, kind)
    expected = layer(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


def test_a_base_weight_that_changes_under_torch_compile():
    """A graph cannot see that it did, so it takes no norms that a forward before it has kept."""
    _, layer, x = adapted(peft_fast, "linear")
    layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x)
    with torch.no_grad():
        layer.base_layer.weight.mul_(3).add_(0.2)
    torch.testing.assert_close(compiled(x), layer(x))


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
    assert rows["mlp"].route == "layers"
    assert rows["mlp"].because == "gate_proj has an adapter with DoRA; silu and the product are one op"
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
