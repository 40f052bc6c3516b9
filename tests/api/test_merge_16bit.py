"""merge_to_16bit: a plain transformers model, every weight the exact sum rounded once."""

import copy
import json
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import peft_fast
from peft_fast import LoraConfig, ops, quantize_linear_layers
from peft_fast.quant import bitsandbytes
from peft_fast.quant.bitsandbytes import read_linear
from peft_fast.tuners import BaseTunerLayer
from peft_fast.tuners.base_weight import quantized_weight

HALF = [torch.bfloat16, torch.float16]
KBIT_WARNING = pytest.mark.filterwarnings("ignore:merging into a k-bit weight")


@pytest.fixture(autouse=True)
def _bitsandbytes_in_eager_mode():
    """bitsandbytes compiles its CPU dequantisation anew for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def adapted(model, **options):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
        return peft_fast.get_peft_model(model, config)


def exact_weights(model):
    """{path of a linear layer in the base model: (weight [N, K], bias) in fp64, adapters included}."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        adapter = module if isinstance(module, BaseTunerLayer) else None
        layer = adapter.base_layer if adapter else module
        quantized = quantized_weight(layer)
        if ".base_layer" in path or not (adapter or quantized):
            continue
        weight = (ops.dequantize(quantized, torch.float32) if quantized else layer.weight).double()
        bias = None if layer.bias is None else layer.bias.double()
        for name in adapter.active_adapters if adapter else ():
            if name in adapter.lora_A:
                A, B = (factor.weight.double() for factor in adapter.factors(name))
                weight = weight + adapter.scaling[name] * B @ A
                if adapter.lora_B[name].bias is not None:
                    bias = bias + adapter.scaling[name] * adapter.lora_B[name].bias.double()
        found[path] = weight, bias
    return found


def assert_rounded_once(model, expected, dtype):
    """Up to one rounding of a value that fp32 and fp64 may see on different sides of a tie."""
    for path, (weight, bias) in expected.items():
        layer = model.get_submodule(path)
        stored = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        assert (stored.dtype, stored.shape) == (dtype, weight.shape), path
        assert (stored != weight.to(dtype)).float().mean() < 1e-3, path
        torch.testing.assert_close(stored.double(), weight, rtol=torch.finfo(dtype).eps / 1.9, atol=1e-7)
        assert (layer.bias is None) == (bias is None)
        if bias is not None:
            assert torch.equal(layer.bias, bias.to(dtype)), path


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_loaded_model_becomes_a_plain_one(load, trained, tokens, tmp_path, kind, bits, dtype):
    model = trained(adapted(load(kind, bits), target_modules=["q_proj", "down_proj", "c_attn"]))
    expected = exact_weights(model)
    assert len(expected) == (8 if kind == "gpt2" else 14)  # layers without an adapter too
    adapter = {name: value.clone() for name, value in peft_fast.get_peft_model_state_dict(model).items()}
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_to_16bit(dtype, progressbar=False)
    assert_rounded_once(merged, expected, dtype)
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert not any(isinstance(m, BaseTunerLayer) or bitsandbytes.is_kbit(m) for m in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged.dtype == dtype
    assert not merged.is_quantized
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto", local_files_only=True)
    assert type(again) is type(merged)
    assert again.dtype == dtype
    for (name, one), other in zip(merged.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(merged.eval()(tokens).logits, again.eval()(tokens).logits)
    assert merged.to(torch.float32)(tokens).logits.dtype == torch.float32  # transformers refuses that for k-bit models
    if kind == "gpt2":
        assert again.lm_head.weight is again.transformer.wte.weight
    written = peft_fast.load_peft_weights(tmp_path / "adapter")
    assert all(torch.equal(written[name], value) for name, value in adapter.items())


@pytest.mark.parametrize("build", ["nf4", "int8", "dense"])
def test_our_own_layers_and_dense_ones(llama, trained, tokens, build):
    base = llama(attention_bias=True)
    if build != "dense":
        quantize_linear_layers(base, bits=4 if build == "nf4" else 8)
    model = trained(adapted(base, target_modules="all-linear", lora_bias=False, modules_to_save=["norm"]))
    expected, logits = exact_weights(model), model(tokens).logits
    norm = model.base_model.model.model.norm.modules_to_save["default"]
    merged = model.base_model.merge_to_16bit(progressbar=False)
    assert merged is base
    assert_rounded_once(merged, expected, torch.bfloat16)
    assert merged.model.norm is norm
    assert all(type(m) is nn.Linear for n, m in merged.named_modules() if n.endswith("_proj"))
    assert (merged(tokens).logits.float() - logits).norm() < 0.02 * logits.norm()


@KBIT_WARNING
def test_it_keeps_what_requantising_loses(llama, trained, tokens):
    """The distance to the unmerged model, beside merge_and_unload's."""
    model = trained(adapted(quantize_linear_layers(llama()), target_modules="all-linear"))
    exact = model(tokens).logits
    distances = []
    for merge in ("merge_to_16bit", "merge_and_unload"):
        merged = getattr(copy.deepcopy(model), merge)()
        distances.append((merged(tokens).logits.float() - exact).norm())
    assert distances[0] < distances[1] / 5


@KBIT_WARNING
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_that_are_merged_already_are_in_it_exactly(llama, trained, bits):
    """From the weight that was kept at the merge, not from the one that was quantised again."""

    def model():
        torch.manual_seed(1)
        made = adapted(quantize_linear_layers(llama(), bits=bits), target_modules=["q_proj", "up_proj"])
        made.add_adapter("other", LoraConfig(r=3, target_modules=["up_proj"]))
        made.base_model.set_adapter(["default", "other"])
        return trained(made)

    merged_first = model()
    merged_first.merge_adapter(["default"])
    results = [model().merge_to_16bit(), merged_first.merge_to_16bit(adapter_names=["other"])]
    for (name, one), other in zip(results[0].named_parameters(), results[1].parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_fails_leaves_everything_as_it_was(llama, llama_4bit, trained, untouched, monkeypatch):
    model = trained(adapted(quantize_linear_layers(llama()), target_modules="all-linear", modules_to_save=["norm"]))
    broken = model.base_model.model.model.layers[1].mlp.up_proj
    weight = broken.lora_B["default"].weight
    before = weight.data[2, 1].clone()
    for value, dtype in ((float("nan"), torch.bfloat16), (1e7, torch.float16)):
        weight.data[2, 1] = value
        with untouched(model), pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: .* has inf or NaN in torch"):
            model.merge_to_16bit(dtype)
    weight.data[2, 1] = before
    for dtype in (torch.float32, torch.float8_e4m3fn, None):
        with untouched(model), pytest.raises(ValueError, match=r"must be torch\.bfloat16 or torch\.float16, got"):
            model.merge_to_16bit(dtype)
    with untouched(model), pytest.raises(ValueError, match="'nobody' does not exist"):
        model.merge_to_16bit(adapter_names=["nobody"])
    with untouched(model), pytest.raises(TypeError, match="must be a list of names"):
        model.merge_to_16bit(adapter_names="default")

    calls = []

    def fail_at_the_sixth(weight, dtype=None):
        calls.append(weight)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dequantize(weight, dtype)

    dequantize = ops.dequantize
    monkeypatch.setattr(ops, "dequantize", fail_at_the_sixth)
    with untouched(model), pytest.raises(torch.OutOfMemoryError):
        model.merge_to_16bit()
    monkeypatch.undo()
    model.merge_to_16bit()


def test_models_it_is_not_for(llama, untouched):
    tied = adapted(llama(tie_word_embeddings=True), target_modules=["lm_head"])
    with untouched(tied), pytest.raises(ValueError, match=r"lm_head is also model\.embed_tokens's"):
        tied.merge_to_16bit()
    other = adapted(llama())
    other.base_model.model.quantization_method = "gptq"
    with untouched(other), pytest.raises(ValueError, match="not those of gptq"):
        other.merge_to_16bit()
    offloaded = adapted(llama())
    offloaded.base_model.model.model.layers[0].to("meta")
    with pytest.raises(ValueError, match="on the meta device or offloaded"):
        offloaded.merge_to_16bit()


def test_tied_and_shared_layers_stay_so(llama, trained):
    merged = trained(adapted(quantize_linear_layers(llama(tie_word_embeddings=True)))).merge_to_16bit()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.lm_head.weight.dtype == torch.bfloat16
    shared = nn.Linear(64, 64)
    base = quantize_linear_layers(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(64, 64)}))
    merged = adapted(base, target_modules=["a", "b"], task_type=None).merge_to_16bit()
    assert merged["a"] is merged["b"]
    assert type(merged["a"]) is type(merged["c"]) is nn.Linear


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_transformers_keeps_in_fp32_stays_so(dtype):
    """T5's wo, which is loaded in fp32 where fp16 is asked for."""
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = adapted(quantize_linear_layers(T5ForConditionalGeneration(config)), target_modules=["q"], task_type=None)
    merged = model.merge_to_16bit(dtype)
    wo = {n: p.dtype for n, p in merged.named_parameters() if ".wo." in n}
    assert set(wo.values()) == {torch.float32 if dtype == torch.float16 else dtype}
    assert {p.dtype for n, p in merged.named_parameters() if n not in wo} == {dtype}


def test_the_layers_hooks(llama, trained, tokens):
    """accelerate's go with the layer; others cannot know the new one, and a warning says so."""
    base = quantize_linear_layers(llama())
    layer = base.model.layers[0].mlp.up_proj
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    model = trained(adapted(base, target_modules=["q_proj", "up_proj"]))
    logits = model(tokens).logits
    base.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match=r"hooks of model\.layers\.0\.mlp\.down_proj stay"):
        merged = model.merge_to_16bit()
    assert merged.model.layers[0].mlp.up_proj._hf_hook is layer._hf_hook
    assert (merged(tokens).logits.float() - logits).norm() < 0.02 * logits.norm()


def test_a_layer_of_bitsandbytes_that_kept_its_16_bits_becomes_plain():
    import bitsandbytes as bnb

    base = nn.ModuleDict({"a": bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True).requires_grad_(False)})
    weight = base["a"].weight.data.clone()
    assert read_linear(base["a"]) is None
    merged = adapted(base, target_modules=["a"], task_type=None).merge_to_16bit()
    assert type(merged["a"]) is nn.Linear
    assert torch.equal(merged["a"].weight, weight.bfloat16())


def test_a_bias_with_nowhere_to_go(llama, untouched):
    model = adapted(quantize_linear_layers(llama()), target_modules=["q_proj"], lora_bias=True)
    with untouched(model), pytest.raises(ValueError, match="has a bias and the layer has none to merge it into"):
        model.merge_to_16bit()


def test_repacking_is_allowed_again(llama_4bit, capsys):
    model = adapted(llama_4bit(), target_modules=["q_proj"])
    kept = list(model.base_model._kept_unpacked)
    model.merge_to_16bit(progressbar=False)
    assert capsys.readouterr().err == ""
    assert model.base_model._kept_unpacked == []
    assert all(getattr(layer, bitsandbytes.REPACKS) for layer in kept)
