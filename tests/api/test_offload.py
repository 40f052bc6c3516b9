"""Base models that accelerate has offloaded, to the memory of the host or to disk.

peft 0.21.2 puts the adapters of offloaded layers on the meta device: outputs are arbitrary, training and saving fail.
Loading onto a model that was dispatched with a device_map works there: it dispatches the model anew. So it is compared
where it works, and elsewhere with the same model in memory.
"""

import copy
import warnings

import accelerate
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fast
from peft_fast.tuners.offload import trainable_copy

V, E = 40, 16
IDS = torch.randint(0, 10, (3, 9), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": V, "hidden_size": E, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PLACES = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
CASES = {
    "linear": {"target_modules": ["q_proj", "up_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole-attention": {"target_modules": ["up_proj"], "modules_to_save": ["self_attn"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
    "lora-bias": {"target_modules": ["q_proj"], "lora_bias": True},
}
KINDS = ["cpu_offload", "disk_offload", "some-on-disk", "all-on-disk"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())


def base(tied=False):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=tied)).eval()


def offloaded(kind, folder, tied=False):
    model, cpu = base(tied), torch.device("cpu")
    if kind == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=cpu)
    if kind == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device=cpu)
    places = dict.fromkeys(PLACES, "disk") if kind == "all-on-disk" else {**dict.fromkeys(PLACES, "cpu")}
    places["model.layers.0"] = places["lm_head"] = "disk"
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def adapted(model, library=peft_fast, **options):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(model, library.LoraConfig(r=4, **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if any(mark in name for mark in ("lora_", "modules_to_save", "tokens_delta")):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model):
    return model(input_ids=IDS).logits


def close(a, b, **tolerances):
    torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


@every_kind
@every_case
def test_training_is_that_of_the_model_in_memory(kind, options, tmp_path):
    ours, plain = adapted(offloaded(kind, tmp_path), **options), adapted(base(), **options)
    away = {name for name, parameter in ours.named_parameters() if parameter.is_meta}
    assert away
    assert not any(mark in name for name in away for mark in ("lora_", "modules_to_save", "tokens_delta"))
    for model in (ours, plain):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    close(logits(ours), logits(plain))
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            close(parameter, expected[name], msg=name)
    assert {name for name, parameter in ours.named_parameters() if parameter.is_meta} == away
    with ours.disable_adapter():
        close(logits(ours), logits(base()))


@every_kind
@every_case
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_saving_and_loading(kind, options, low, tmp_path):
    written = adapted(offloaded(kind, tmp_path / "a"), **options)
    written.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted(base(), **options))
    loaded = peft_fast.PeftModel.from_pretrained(
        offloaded(kind, tmp_path / "b"), tmp_path / "adapter", low_cpu_mem_usage=low
    )
    close(logits(loaded), expected)
    loaded.load_adapter(tmp_path / "adapter", "other", low_cpu_mem_usage=low)
    loaded.set_adapter("other")
    close(logits(loaded), expected)
    close(logits(peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")), expected)


@every_kind
@every_case
def test_merging(kind, options, tmp_path):
    model = adapted(offloaded(kind, tmp_path), **options)
    expected = logits(adapted(base(), **options))
    model.merge_adapter(safe_merge=True)
    close(logits(model), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        close(logits(model), logits(base()))
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    close(logits(merged), expected)


@pytest.mark.parametrize("kind", ["some-on-disk", "all-on-disk"])
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_adapters_load_onto_dispatched_models_as_in_peft(kind, low, tmp_path):
    adapted(base(), peft, target_modules=["q_proj", "up_proj"]).save_pretrained(tmp_path / "adapter")
    outputs = []
    for library in (peft_fast, peft):
        folder = tmp_path / library.__name__
        arguments = {"low_cpu_mem_usage": low, "offload_folder": folder}
        model = library.PeftModel.from_pretrained(offloaded(kind, folder), tmp_path / "adapter", **arguments)
        outputs.append(logits(model))
        model.load_adapter(tmp_path / "adapter", "other", **arguments)
        model.set_adapter("other")
        outputs.append(logits(model))
    for out in outputs[1:]:
        close(out, outputs[0])


def test_pefts_own_adapters_of_offloaded_layers_hold_nothing(tmp_path):
    model = peft.get_peft_model(offloaded("cpu_offload", tmp_path), peft.LoraConfig(target_modules=["q_proj"]))
    assert {parameter.device.type for parameter in model.parameters() if parameter.requires_grad} == {"meta"}
    with pytest.raises(RuntimeError):  # NotImplementedError is one
        model.save_pretrained(tmp_path / "adapter")


def test_embeddings_are_saved_from_where_they_are_and_loaded_to_there(tmp_path):
    written = adapted(offloaded("all-on-disk", tmp_path / "a"), target_modules=["q_proj"])
    written.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tensors = peft_fast.load_peft_weights(tmp_path / "adapter")
    key = "base_model.model.model.embed_tokens.weight"
    assert torch.equal(tensors[key], base().model.embed_tokens.weight)
    changed = peft_fast.get_peft_model(offloaded("all-on-disk", tmp_path / "b"), written.peft_config["default"])
    tensors[key] = 2 * tensors[key]
    peft_fast.set_peft_model_state_dict(changed, tensors)
    assert changed.get_input_embeddings().weight.is_meta
    plain = adapted(base(), target_modules=["q_proj"])
    plain.get_input_embeddings().weight.data *= 2
    close(logits(changed), logits(plain))


def test_tied_layers_are_known_to_be_so(tmp_path):
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}
    model = adapted(offloaded("cpu_offload", tmp_path, tied=True), **options)
    close(logits(model), logits(adapted(base(tied=True), **options)))


def test_a_trained_copy_has_its_weights_and_a_hook_for_its_inputs_alone(tmp_path):
    head = offloaded("all-on-disk", tmp_path).lm_head
    twin = trainable_copy(head)
    assert head.weight.is_meta
    assert torch.equal(twin.weight, base().lm_head.weight)
    assert twin._hf_hook is not head._hf_hook
    assert (twin._hf_hook.offload, twin._hf_hook.weights_map) == (False, None)
    assert twin._hf_hook.execution_device == head._hf_hook.execution_device
    accelerate.hooks.remove_hook_from_module(twin)
    assert twin.forward.__func__ is torch.nn.Linear.forward


def test_dora_is_refused_where_there_are_no_norms(tmp_path, untouched):
    model = offloaded("cpu_offload", tmp_path)
    config = peft_fast.LoraConfig(target_modules=["q_proj"], use_dora=True)
    before = copy.deepcopy(vars(config))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="offloaded layers cannot have it"):
        peft_fast.get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names
    assert vars(config) == before
    close(logits(model), logits(base()))


def test_ephemeral_gpu_offload_is_an_option_of_the_run(tmp_path):
    adapted(base(), target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    outputs = []
    for offload in (False, True):
        model = peft_fast.PeftModel.from_pretrained(base(), tmp_path, ephemeral_gpu_offload=offload)
        assert model.peft_config["default"].runtime_config.ephemeral_gpu_offload is offload
        model.load_adapter(tmp_path, "other", ephemeral_gpu_offload=offload)
        assert model.peft_config["other"].runtime_config.ephemeral_gpu_offload is offload
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.ephemeral_gpu_offload is offload
        outputs.append(logits(model))
    assert torch.equal(*outputs)
    config = peft_fast.LoraConfig(runtime_config=peft_fast.tuners.lora.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    config.save_pretrained(tmp_path / "config")
    assert "runtime_config" not in (tmp_path / "config" / "adapter_config.json").read_text()
    with pytest.raises(TypeError, match="runtime_config must be a LoraRuntimeConfig"):
        peft_fast.LoraConfig(runtime_config={"ephemeral_gpu_offload": True})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_norms_of_weights_on_the_cpu_are_computed_on_the_gpu():
    runtime = peft_fast.tuners.lora.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    magnitudes = []
    for options in ({}, {"runtime_config": runtime}):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        config = peft_fast.LoraConfig(target_modules=["q_proj"], use_dora=True, **options)
        model = peft_fast.get_peft_model(base(), config)
        magnitudes.append(next(p for n, p in model.named_parameters() if "magnitude" in n))
        assert (torch.cuda.max_memory_allocated() > before) == bool(options)
    assert magnitudes[1].device.type == "cpu"
    close(*magnitudes)
