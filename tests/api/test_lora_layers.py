"""LoRA around what is no nn.Linear: embeddings, convolutions, transformers' Conv1D, attention; beside peft itself."""

import copy
import dataclasses
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

import peft_fast
from peft_fast import explain
from peft_fast.tuners.lora import LinearLike, LoraLayer

IDS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [2, 2, 3, 3, 0, 9, 10, 1]])
ROWS = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2))
VOLUMES = torch.randn(2, 2, 3, 4, 6, generator=torch.Generator().manual_seed(3))
LAYERS = {
    "embedding": (lambda: nn.Embedding(11, 6), IDS),
    "embedding-padding": (lambda: nn.Embedding(11, 6, padding_idx=2), IDS),
    "embedding-by-frequency": (lambda: nn.Embedding(11, 6, scale_grad_by_freq=True), IDS),
    "embedding-scaled": (lambda: Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=6**0.5), IDS),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, stride=2, padding=1), ROWS),
    "conv1d-same": (lambda: nn.Conv1d(8, 6, 3, padding="same", bias=False), ROWS),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), IMAGES),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1), IMAGES),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, padding=1), VOLUMES),
    "hf-conv1d": (lambda: Conv1D(6, 6), ROWS),
    "attention": (lambda: Attention(6, 2, batch_first=True), ROWS),
}
UNMERGEABLE = {"conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGES)}
WITH_BIAS = ["conv1d", "conv2d", "conv3d", "hf-conv1d"]


class Attention(nn.MultiheadAttention):
    """With one input, and one output."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, x, x, *args, **kwargs)


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.last = layer, nn.Linear(6, 2)

    def forward(self, x):
        y = self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.last(y.transpose(1, -1) if y.shape[-1] != 6 else y)


def build(kind):
    make, x = {**LAYERS, **UNMERGEABLE}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Model(make())
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model, x


def adapted(library, kind, seed=5, dtype=torch.float32, shake=True, **options):
    model, x = build(kind)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both set fan_in_fan_out
        config = library.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["layer"], **options})
        model = library.get_peft_model(model.to(dtype), config)
    return (shaken(model) if shake else model), x.to(dtype) if x.is_floating_point() else x


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
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
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


def test_a_transformer_encoders_fast_path_has_the_adapters():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    model = peft_fast.get_peft_model(nn.Sequential(layer), peft_fast.LoraConfig(target_modules=["self_attn"], r=2))
    shaken(model)
    slow = model.train(False)(ROWS)  # a gradient is wanted: torch calls the attention
    assert slow.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model(ROWS), slow)
        with model.disable_adapter():
            assert relative(model(ROWS), slow) > 1e-3


def test_attention_leaves_its_weights_bit_for_bit():
    """peft adds and subtracts in every forward, and the weight drifts."""
    model, x = adapted(peft_fast, "attention", dtype=torch.bfloat16)
    before = {name: (id(p), p.detach().clone()) for name, p in named(model).items()}
    for _ in range(3):
        model(x).sum().backward()
    with pytest.raises(AssertionError, match="expecting embedding dimension"):
        model(x[..., :3])
    for name, parameter in named(model).items():
        assert (id(parameter), True) == (before[name][0], torch.equal(parameter, before[name][1]))


def test_a_hook_on_an_embedding_is_called():
    model, x = adapted(peft_fast, "embedding")
    plain = model(x)
    calls = []
    model.base_model.model.layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x), plain)
    assert calls == [1]


def test_ids_out_of_range_are_errors_as_in_torch():
    model, _ = adapted(peft_fast, "embedding")
    for wrong in (11, -1):
        with pytest.raises(IndexError, match="index out of range in self"):
            model(torch.tensor([[1, wrong]]))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Conv2d(4, 6, 3, groups=2), {"r": 3}, "rank must be divisible by the 2 groups of a Conv2d, got 3"),
        (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), {}, "padding='same' and dilation"),
        (lambda: nn.Embedding(4, 6), {"lora_bias": True}, "lora_bias is not for embeddings"),
        (lambda: nn.MultiheadAttention(6, 2), {"lora_bias": True}, "lora_bias is not for torch.nn.MultiheadAttention"),
        (lambda: nn.MultiheadAttention(6, 2, kdim=3), {}, "only where kdim and vdim are embed_dim"),
        (lambda: OPTLearnedPositionalEmbedding(4, 6), {}, "it has a forward of its own"),
        (lambda: nn.LSTM(6, 6), {}, "cannot adapt layer, a LSTM: it adapts torch.nn.Linear, Embedding"),
        (lambda: nn.ConvTranspose2d(4, 6, 3), {}, "cannot adapt layer, a ConvTranspose2d"),
    ],
)
def test_what_cannot_be_adapted(untouched, make, options, message):
    base = Model(make())
    with untouched(base), pytest.raises(ValueError, match=message):
        peft_fast.get_peft_model(base, peft_fast.LoraConfig(target_modules=["layer", "last"], **options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv2d(4, 6, 3, groups=2), "a convolution of 2 groups"),
        (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "padding_mode 'circular'"),
    ],
)
def test_convolutions_that_cannot_be_merged_into(untouched, make, message):
    model = Model(make())
    model = peft_fast.get_peft_model(model, peft_fast.LoraConfig(target_modules=["layer", "last"]))
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.model.layer.merge):
        with untouched(model), pytest.raises(NotImplementedError, match=message):
            merge()
    repr(model.unload())


def test_a_dilated_convolution_merges():
    torch.manual_seed(0)
    model = Model(nn.Conv2d(4, 6, 3, padding=2, dilation=2))
    model = shaken(peft_fast.get_peft_model(model, peft_fast.LoraConfig(target_modules=["layer"], r=2)))
    before = model(IMAGES)
    torch.testing.assert_close(model.merge_and_unload()(IMAGES), before)


@pytest.mark.parametrize(("kind", "what"), [("attention", "torch.nn.MultiheadAttention"), ("embedding", "embeddings")])
def test_layers_that_drop_nothing_say_so(kind, what):
    with pytest.warns(UserWarning, match=f"lora_dropout has no effect on {what}"):
        adapted_with_warnings(kind, lora_dropout=0.1)


def test_fan_in_fan_out_is_set_by_the_layer_with_a_warning():
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        adapted_with_warnings("hf-conv1d")


def adapted_with_warnings(kind, **options):
    config = peft_fast.LoraConfig(target_modules=["layer"], **options)
    return peft_fast.get_peft_model(build(kind)[0], config)


class Scale(nn.Module):
    """A layer that nobody knows."""

    def __init__(self, features=6):
        super().__init__()
        self.features, self.weight = features, nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x * self.weight


class LoraScale(LoraLayer):
    def __init__(self, base_layer, adapter_name, *, config, r, lora_alpha):
        super().__init__(base_layer)
        self.update_layer(adapter_name, r, lora_alpha, config)

    def make_factors(self, adapter_name, r, config):
        self.lora_A[adapter_name] = nn.Linear(1, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.get_base_layer().features, bias=False)

    def get_delta_weight(self, adapter_name):
        A, B = self.factors(adapter_name)
        return self.scaling[adapter_name] * (B.weight @ A.weight).view(-1).detach()

    def forward(self, x):
        y = self.base_layer(x)
        for name in self.adapters_in_effect():
            A, B = self.factors(name)
            y = y + self.scaling[name] * x * B(A(x.new_ones(1)))
        return y


def test_a_custom_layer_is_trained_saved_loaded_and_merged(tmp_path):
    config = peft_fast.LoraConfig(target_modules=["layer", "last"], r=2)
    config._register_custom_module({Scale: LoraScale})
    model = shaken(peft_fast.get_peft_model(Model(Scale()), config))
    model.add_adapter("other", peft_fast.LoraConfig(target_modules=["layer"], r=3))
    before = model(ROWS)
    before.sum().backward()
    assert model.base_model.model.layer.lora_A["default"].weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    base = Model(Scale())
    base.last.load_state_dict(model.base_model.model.last.base_layer.state_dict())
    config = peft_fast.LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot adapt layer, a Scale"):
        peft_fast.PeftModel.from_pretrained(base, tmp_path)
    config._register_custom_module({Scale: LoraScale})
    loaded = peft_fast.PeftModel.from_pretrained(base, tmp_path, config=config)
    torch.testing.assert_close(loaded(ROWS), before)
    torch.testing.assert_close(loaded.merge_and_unload()(ROWS), before)


def test_custom_modules_are_classes_of_lora_layers(untouched):
    config = peft_fast.LoraConfig(target_modules=["layer"])
    with pytest.raises(TypeError, match="from classes to classes"):
        config._register_custom_module({"layer": LoraScale})
    config._register_custom_module({Scale: Model})
    base = Model(Scale())
    config._register_custom_module({Scale: lambda_class()})
    with untouched(base), pytest.raises(TypeError, match=r"subclass of peft_fast\.tuners\.lora\.LoraLayer, got Other"):
        peft_fast.get_peft_model(base, config)


def lambda_class():
    class Other(nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()

    return Other


class Int8Linear(nn.Module):
    """A k-bit format of another library."""

    def __init__(self, linear):
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        scale = linear.weight.abs().max() / 127
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.detach())

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scale.to(x.dtype)).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_layers_in_formats_that_are_not_known(tmp_path, dtype):
    torch.manual_seed(0)
    base = Model(Int8Linear(nn.Linear(6, 6))).to(dtype)
    config = peft_fast.LoraConfig(target_modules=["layer"], r=2, lora_dropout=0.5)
    config._register_custom_module({Int8Linear: LinearLike})
    model = shaken(peft_fast.get_peft_model(base, config)).eval()
    layer, x = model.base_model.model.layer, ROWS.to(dtype)
    A, B = layer.factors("default")
    expected = layer.base_layer(x).float() + 4 * (x.float() @ A.weight.t() @ B.weight.t())
    torch.testing.assert_close(layer(x).float(), expected, **({"atol": 2e-2, "rtol": 2e-2} if x.itemsize == 2 else {}))
    model(x).sum().backward()
    assert A.weight.grad.abs().sum() > 0
    assert not torch.equal(model.train()(x), model(x))
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.merge_to_16bit):
        with pytest.raises((NotImplementedError, ValueError), match=r"Int8Linear|parameter"):
            merge()
    assert next(row.route for row in explain(model, show=False).rows) == "added"
    assert repr(layer).startswith("lora.Linear(")
    assert isinstance(model.unload().layer, Int8Linear)
