"""Experts with adapters in models that accelerate has offloaded: the hook that brings their parameters is on the module
inside of our wrappers. peft 0.21.2 raises there, so the same model in memory is what they are compared with."""

import warnings

import accelerate
import peft
import pytest
import torch
import transformers as tf

import peft_fast
from peft_fast.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

E = 32
IDS = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": 64, "hidden_size": E, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, num_local_experts=4, sliding_window=4)),
}
PLACES = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATH = "base_model.model.model.layers.0.mlp.experts"
CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "dispatched"])
every_model = pytest.mark.parametrize("model", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
every_implementation = pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])


def base(model="qwen3_moe", implementation="grouped_mm"):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = MODELS[model]().eval()
    for parameter in made.parameters():
        parameter.data.mul_(3)  # so that the experts matter
    made.set_experts_implementation(implementation)
    return made


def offloaded(kind, folder, model):
    if kind == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=CPU)
    if kind == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device=CPU)
    places = {**dict.fromkeys(PLACES, "cpu"), "model.layers.0": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def adapted(model, library=peft_fast, **options):
    torch.manual_seed(5)
    config = library.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "target_parameters": BOTH, "init_lora_weights": False, **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(model, config).eval()


def logits(model):
    return model(input_ids=IDS).logits


def close(a, b, **more):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4, **more)


@every_kind
@every_model
@every_implementation
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_training_is_that_of_the_model_in_memory(kind, model, implementation, checkpointing, tmp_path):
    ours = adapted(offloaded(kind, tmp_path, base(model, implementation)))
    plain = adapted(base(model, implementation))
    away = {name for name, parameter in ours.named_parameters() if parameter.is_meta}
    assert any("experts" in name for name in away)
    assert not any("lora_" in name for name in away)
    for either in (ours, plain):
        either.train()
        if checkpointing:
            either.gradient_checkpointing_enable()
            either.enable_input_require_grads()
        optimizer = torch.optim.SGD([p for p in either.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            either(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            close(parameter, expected[name], msg=name)
    close(logits(ours), logits(plain))
    assert {name for name, parameter in ours.named_parameters() if parameter.is_meta} == away
    with ours.disable_adapter():
        close(logits(ours), logits(base(model, implementation)))


@every_kind
@every_model
def test_saved_loaded_and_merged(kind, model, tmp_path):
    expected = logits(adapted(base(model)))
    written = adapted(offloaded(kind, tmp_path / "a", base(model)))
    written.save_pretrained(tmp_path / "adapter")
    close(logits(peft.PeftModel.from_pretrained(base(model), tmp_path / "adapter")), expected)
    loaded = peft_fast.PeftModel.from_pretrained(offloaded(kind, tmp_path / "b", base(model)), tmp_path / "adapter")
    close(logits(loaded), expected)
    loaded.merge_adapter(safe_merge=True)
    close(logits(loaded), expected)
    loaded.unmerge_adapter()
    close(logits(loaded), expected)
    close(logits(loaded.merge_and_unload()), expected)


@every_implementation
def test_offloaded_with_its_adapters(implementation, tmp_path):
    """Hooks are on A and B, too."""
    model = adapted(base("qwen3_moe", implementation))
    with torch.no_grad():
        expected = logits(model)
        accelerate.cpu_offload(model, execution_device=CPU)
        assert all(parameter.is_meta for parameter in model.parameters())
        close(logits(model), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_experts_run_at_once_where_the_hook_only_brings_them(tmp_path):
    def row(model):
        return next(row for row in peft_fast.explain(model, show=False).rows if row.name == PATH)

    model = adapted(offloaded("cpu_offload", tmp_path, base()))
    assert row(model).route == "reference"
    inner = model.get_submodule(PATH).get_base_layer()
    handle = inner.register_forward_hook(lambda *_: None)
    assert "has hooks or a forward of its own" in row(model).because
    close(logits(model), logits(adapted(base())))
    handle.remove()
    old = inner.forward
    inner.forward = lambda *args: 2 * old(*args)
    assert "has hooks or a forward of its own" in row(model).because
    assert not torch.allclose(logits(model), logits(adapted(base())), atol=1e-2)


def test_a_forward_that_fails_leaves_the_weights_away(tmp_path):
    model = adapted(offloaded("cpu_offload", tmp_path, base()))
    expected = logits(model)
    wrapper = model.get_submodule(PATH)
    inner = wrapper.get_base_layer()
    hook = inner._hf_hook
    with pytest.raises(TypeError):
        wrapper("no tensor", 1, 2, 3, 4, 5)
    assert inner._hf_hook is hook
    assert all(parameter.is_meta for parameter in inner.parameters())
    assert torch.equal(logits(model), expected)


@every_kind
def test_hotswap(kind, tmp_path):
    adapted(base(), r=6, lora_alpha=3).save_pretrained(tmp_path / "other")
    model = adapted(offloaded(kind, tmp_path / "away", base()))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    close(logits(model), logits(adapted(base())))
    hotswap_adapter(model, tmp_path / "other", "default")
    close(logits(model), logits(adapted(base(), r=6, lora_alpha=3)))


def test_in_peft_it_raises(tmp_path):
    with pytest.raises((RuntimeError, NotImplementedError)):
        logits(adapted(offloaded("cpu_offload", tmp_path, base()), peft))
