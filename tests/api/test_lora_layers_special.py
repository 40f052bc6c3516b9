"""LoRA around what is no nn.Linear: what is special about each kind, what is refused, and layers of one's own."""

import pytest
import torch
from torch import nn
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import peft_fast
from peft_fast import explain
from peft_fast.tuners.lora import LinearLike, LoraLayer

from .lora_layer_models import IMAGES, ROWS, Model, adapted, build, named, relative, shaken


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"], ["linear1", "linear2", "self_attn"]], ids=str)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_transformer_encoders_fast_path_has_the_adapters(targets, use_dora, monkeypatch):
    """It reads the weights of its layers and calls none: in peft the adapters of linear1 are not there in eval mode."""
    if use_dora:
        targets = [target for target in targets if target != "self_attn"] or ["linear2"]
    fast, original = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: fast.append(1) or original(*args))
    torch.manual_seed(0)
    base = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True))
    config = peft_fast.LoraConfig(target_modules=targets, r=2, use_dora=use_dora)
    model = shaken(peft_fast.get_peft_model(base, config))
    slow = model.train()(ROWS)
    model.eval()
    assert not fast
    torch.testing.assert_close(model(ROWS), slow)  # a gradient is wanted: the layers are called
    assert not fast
    with torch.no_grad():
        torch.testing.assert_close(model(ROWS), slow)
        assert len(fast) == 1
        with model.disable_adapter():
            assert relative(model(ROWS), slow) > 1e-3
        model.merge_adapter()
        torch.testing.assert_close(model(ROWS), slow)
        assert len(fast) == 3
    assert repr(model.unload()) == repr(nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)))


def test_a_bias_of_b_is_not_for_the_fast_path(untouched):
    base = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True))
    with untouched(base), pytest.raises(ValueError, match="lora_bias is not for linear1 and linear2"):
        peft_fast.get_peft_model(base, peft_fast.LoraConfig(target_modules=["linear1"], lora_bias=True))


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
