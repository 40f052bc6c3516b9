"""layer_replication: layers that are there several times, in one weight, with adapters of their own."""

import json

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

import peft_fast

LIBRARIES = (peft, peft_fast)
RANGES = [[0, 3], [1, 4]]
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "pad_token_id": 0}


def options(**more) -> dict:
    return {"r": 4, "target_modules": ["q_proj", "down_proj"], "layer_replication": RANGES, **more}


def bert():
    return BertForSequenceClassification(BertConfig(**SIZES, num_attention_heads=2))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=2, n_positions=32))


def qwen2():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2(Qwen2Config(**SIZES, **heads, use_sliding_window=True, sliding_window=4, max_window_layers=2))


def test_outputs_gradients_and_files_are_pefts(llama, tokens, trained, tmp_path):
    models, losses = [], []
    for library in LIBRARIES:
        torch.manual_seed(0)
        model = library.get_peft_model(llama(num_hidden_layers=4), library.LoraConfig(**options()))
        models.append(trained(model))
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        assert model.config.num_hidden_layers == 6
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)
    for (name, one), (other, parameter) in zip(*(model.named_parameters() for model in models)):
        assert name == other
        torch.testing.assert_close(parameter.detach(), one.detach())
        if one.grad is not None:
            torch.testing.assert_close(parameter.grad, one.grad, atol=1e-6, rtol=1e-4)
    layers = models[1].base_model.model.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(6))
    assert layers[1].mlp.up_proj.weight is layers[3].mlp.up_proj.weight
    assert layers[1].mlp.down_proj.lora_A["default"] is not layers[3].mlp.down_proj.lora_A["default"]
    for library, other in (LIBRARIES, LIBRARIES[::-1]):
        model = models[LIBRARIES.index(library)].eval()
        model.save_pretrained(tmp_path / library.__name__)
        loaded = other.PeftModel.from_pretrained(llama(num_hidden_layers=4), tmp_path / library.__name__)
        found = loaded(input_ids=tokens).logits
        torch.testing.assert_close(found, model(input_ids=tokens).logits, atol=1e-6, rtol=1e-5)
    generated = [model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False) for model in models]
    assert torch.equal(*generated)


@pytest.mark.parametrize("bits", [4, 8])
def test_k_bit_layers_share_their_bytes(bits, llama, tokens):
    base = peft_fast.quantize_linear_layers(llama(num_hidden_layers=4), bits)
    own = [tensor.data_ptr() for tensor in base.model.layers[1].mlp.down_proj.quantized_weight.tensors()]
    model = peft_fast.get_peft_model(base, peft_fast.LoraConfig(**options()))
    for index in (1, 3):
        layer = model.base_model.model.model.layers[index].mlp.down_proj
        assert [tensor.data_ptr() for tensor in layer.base_layer.quantized_weight.tensors()] == own
    assert model(input_ids=tokens).logits.isfinite().all()


@pytest.mark.parametrize(("build", "targets"), [(bert, ["query"]), (gpt2, ["c_attn"]), (qwen2, ["q_proj"])])
def test_other_models(build, targets, tokens):
    results = []
    for library in LIBRARIES:
        if build is gpt2 and library is peft:
            continue  # it looks for GPT-2's layers in the wrong module
        torch.manual_seed(0)
        base = build().eval()
        config = library.LoraConfig(**options(target_modules=targets, init_lora_weights=False))
        if build is qwen2 and library is peft:
            config.layer_replication, base.config.layer_types = RANGES, base.config.layer_types[:3] * 2
            base.config.layer_types = [base.config.layer_types[0]] * 2 + ["sliding_attention"] * 4
        model = library.get_peft_model(base, config)
        results.append(model(input_ids=tokens).logits)
        assert model.config.num_hidden_layers == 6
    assert results[-1].isfinite().all()
    if build is bert:
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    if build is qwen2:
        assert (
            model.config.layer_types
            == ["full_attention"] * 2 + ["sliding_attention", "full_attention"] + ["sliding_attention"] * 2
        )


def test_unloading_gives_the_model_back(llama, tokens, untouched):
    base = llama(num_hidden_layers=4)
    expected = base(input_ids=tokens).logits
    with untouched(base):
        model = peft_fast.get_peft_model(base, peft_fast.LoraConfig(**options()))
        assert model.unload() is base
        base.requires_grad_(True)
    assert base.config.num_hidden_layers == 4
    assert torch.equal(base(input_ids=tokens).logits, expected)


def test_further_adapters(llama, tokens, untouched):
    model = peft_fast.get_peft_model(llama(num_hidden_layers=4), peft_fast.LoraConfig(**options()))
    model.add_adapter("same", peft_fast.LoraConfig(**options()))
    model.add_adapter("none", peft_fast.LoraConfig(target_modules=["v_proj"]))
    assert len(model.base_model.model.model.layers) == 6
    with untouched(model), pytest.raises(ValueError, match=r"must be the first adapter's, .* got \[\[0, 2\]\]"):
        model.add_adapter("other", peft_fast.LoraConfig(**options(layer_replication=[[0, 2]])))
    plain = peft_fast.get_peft_model(llama(num_hidden_layers=4), peft_fast.LoraConfig(target_modules=["v_proj"]))
    with untouched(plain), pytest.raises(ValueError, match="must be the first adapter's, None, got"):
        plain.add_adapter("other", peft_fast.LoraConfig(**options()))


def test_merging_is_refused(llama, untouched):
    model = peft_fast.get_peft_model(llama(num_hidden_layers=4), peft_fast.LoraConfig(**options()))
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.merge_to_16bit):
        with untouched(model), pytest.raises(ValueError, match="cannot be merged into replicated layers"):
            merge()


def test_errors_leave_the_model(llama, untouched):
    base = llama(num_hidden_layers=4)
    with untouched(base):
        with pytest.raises(ValueError, match=r"\[2, 5\] goes beyond the 4 layers of LlamaForCausalLM"):
            peft_fast.get_peft_model(base, peft_fast.LoraConfig(**options(layer_replication=[[0, 4], [2, 5]])))
        with pytest.raises(ValueError, match="not found"):
            peft_fast.get_peft_model(base, peft_fast.LoraConfig(**options(target_modules=["zzz"])))
    assert base.config.num_hidden_layers == 4
    with pytest.raises(ValueError, match="needs a model with its layers in a ModuleList called layers"):
        peft_fast.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft_fast.LoraConfig(**options(target_modules=["0"])))


@pytest.mark.parametrize("ranges", [[[0]], [[2, 2]], [[-1, 2]], [["a", 2]], "02", [3]])
def test_bad_ranges(ranges):
    with pytest.raises(ValueError, match="layer_replication must be a list of"):
        peft_fast.LoraConfig(layer_replication=ranges)


def test_starts_that_change_shared_weights_are_refused():
    with pytest.raises(ValueError, match="changes the base weights, which replicated layers share"):
        peft_fast.LoraConfig(layer_replication=RANGES, init_lora_weights="pissa")


def test_a_file_cannot_ask_for_endless_layers(llama, untouched, tmp_path):
    model = peft_fast.get_peft_model(llama(num_hidden_layers=4), peft_fast.LoraConfig(**options()))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_replication": [[0, 4]] * 10**5}))
    with untouched(base := llama(num_hidden_layers=4)), pytest.raises(ValueError, match="wants 400000 layers"):
        peft_fast.PeftModel.from_pretrained(base, tmp_path)
