"""Adaption prompts beside peft's: Llama, Mistral and GPT-2, training, generating, files, several adapters."""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import peft_fast

LIBRARIES = (peft_fast, peft)
KINDS = ["llama", "mistral", "gpt2"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def base(kind, dtype=torch.float32, **options):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if kind == "gpt2":
            drop = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
            config = transformers.GPT2Config(**{**SIZES, **SPECIAL, **drop, "n_positions": 32, **options})
            return transformers.GPT2LMHeadModel(config).to(dtype)
        config_class = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[kind]
        sizes = {"intermediate_size": 48, "num_key_value_heads": 2, **options}
        return transformers.AutoModelForCausalLM.from_config(config_class(**SIZES, **SPECIAL, **sizes)).to(dtype)


def config(library, **options):
    return library.AdaptionPromptConfig(**{"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM", **options})


def opened(model, name="default", by=1.0):
    """With gates that let something through."""
    for path, parameter in model.named_parameters():
        if "adaption_gate" in path and (path.endswith(f".{name}") or path.endswith("adaption_gate")):
            parameter.data += by
    return model


def adapted(library, model, seed=2, **options):
    torch.manual_seed(seed)
    return opened(library.get_peft_model(model, config(library, **options)))


def by_file_key(model):
    """Gradients by the names that a file has: in the model peft's have no adapter's name."""
    names = [(name.removesuffix(".default"), p) for name, p in model.named_parameters()]
    return {name: p.grad.float() for name, p in names if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["fp32", "autocast", "bf16", "checkpointing"])
def test_training(kind, how, tokens):
    results = []
    for library in LIBRARIES:
        model = adapted(library, base(kind, torch.bfloat16 if how == "bf16" else torch.float32)).train()
        kinds = {p.dtype for n, p in model.named_parameters() if "adaption_" in n}
        assert kinds == {torch.bfloat16 if how == "bf16" else torch.float32}
        if how == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            output = model(tokens, labels=tokens)
        output.loss.backward()
        results.append((output.logits.float(), by_file_key(model), model.get_nb_trainable_parameters()))
    precise = how in ("fp32", "checkpointing")
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6 if precise else 1e-2)
    assert results[0][1].keys() == results[1][1].keys()
    assert len(results[0][1]) == 4
    for name, gradient in results[1][1].items():
        assert (results[0][1][name] - gradient).norm() <= (1e-4 if precise else 0.05) * gradient.norm(), name
    assert results[0][2] == results[1][2]
    assert not torch.allclose(results[0][0], base(kind)(tokens).logits, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_shut_gates(kind, tokens):
    model = peft_fast.get_peft_model(base(kind), config(peft_fast))
    torch.testing.assert_close(model(tokens).logits, base(kind)(tokens).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_generating(kind, tokens):
    prompts = tokens[:, :4]
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        outputs = []
        for library in LIBRARIES:
            model = adapted(library, base(kind)).eval()
            outputs.append(model.generate(prompts, max_new_tokens=5, do_sample=False, **options))
        assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], base(kind).generate(prompts, max_new_tokens=5, do_sample=False))


def test_heads_that_are_wider_than_the_model(tokens):
    """Where the number of heads that share keys is not hidden_size / size of the keys, peft's shapes do not fit."""
    options = {"head_dim": 16}
    model = adapted(peft_fast, base("llama", **options))
    assert not torch.allclose(model(tokens).logits, base("llama", **options)(tokens).logits, atol=1e-3)
    with pytest.raises(RuntimeError):
        adapted(peft, base("llama", **options))(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_files_both_ways(kind, tokens, tmp_path):
    models = {library: adapted(library, base(kind)).eval() for library in LIBRARIES}
    for library, model in models.items():
        model.save_pretrained(tmp_path / library.__name__)
    files = [load_file(tmp_path / library.__name__ / "adapter_model.safetensors") for library in LIBRARIES]
    torch.testing.assert_close(*files, rtol=0, atol=0)
    expected = models[peft](tokens).logits
    for saved in LIBRARIES:
        for loading in LIBRARIES:
            model = loading.PeftModel.from_pretrained(base(kind), tmp_path / saved.__name__).eval()
            torch.testing.assert_close(model(tokens).logits, expected)
    low = peft_fast.PeftModel.from_pretrained(base(kind), tmp_path / "peft", low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(low(tokens).logits, expected)
    configs = [peft_fast.PeftConfig.from_pretrained(tmp_path / library.__name__) for library in LIBRARIES]
    assert configs[0] == configs[1]
    assert configs[0].is_adaption_prompt
    injected = peft_fast.inject_adapter_in_model(config(peft_fast), base(kind), state_dict=files[0])
    assert sum(type(m).__name__.startswith("AdaptedAttention") for m in injected.modules()) == 2


def test_several_adapters(tokens):
    results = []
    for library in LIBRARIES:
        model = adapted(library, base("llama"))
        torch.manual_seed(5)
        model.add_adapter("other", config(library, adapter_len=3, adapter_layers=3))
        outputs = [model(tokens).logits]
        model.set_adapter("other")
        opened(model, "other", 0.7)
        outputs.append(model(tokens).logits)
        with model.disable_adapter():
            outputs.append(model(tokens).logits)
        model.set_adapter("default")
        outputs.append(model(tokens).logits)
        model.delete_adapter("default")
        outputs.append(model(tokens).logits)
        results.append(outputs)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][2], base("llama")(tokens).logits)
    assert not torch.allclose(results[0][0], results[0][1], atol=1e-3)


def test_4_bits(llama_4bit, tokens):
    results = []
    for library in LIBRARIES:
        model = adapted(library, llama_4bit())
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        results.append((loss, by_file_key(model)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_what_is_said(tokens):
    model = adapted(peft_fast, base("llama"))
    rows = peft_fast.explain(model, show=False).rows
    assert [(row.name, row.base, row.route) for row in rows] == [
        (f"base_model.model.model.layers.{index}.self_attn", "float32", "added") for index in (1, 2)
    ]
    assert {row.module_type for row in model.get_layer_status()} == {"adaption_prompt.AdaptedAttention"}
    with model.disable_adapter():
        assert {row.route for row in peft_fast.explain(model, show=False).rows} == {"base"}


def test_unloading(tokens):
    model = base("gpt2")
    modules = dict(model.named_modules())
    assert dict(adapted(peft_fast, model).unload().named_modules()) == modules


class TestRefusals:
    @pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
    def test_merging(self, call, untouched):
        model = adapted(peft_fast, base("llama"))
        with untouched(model), pytest.raises(ValueError, match="cannot be merged"):
            getattr(model, call)()

    def test_models(self, untouched):
        model = transformers.OPTForCausalLM(
            transformers.OPTConfig(vocab_size=20, hidden_size=8, num_attention_heads=2, ffn_dim=8, num_hidden_layers=1)
        )
        with untouched(model), pytest.raises(ValueError, match="types llama, mistral, gpt2, got 'opt'"):
            peft_fast.get_peft_model(model, config(peft_fast))

    def test_layers(self, untouched):
        model = base("llama")
        for options, error in (
            ({"adapter_layers": 4}, "adapter_layers is 4, and the model has 3 modules"),
            ({"target_modules": "zzz"}, "has 0 modules called 'zzz'"),
            ({"target_modules": "mlp"}, "LlamaMLP, which has no q_proj"),
            ({"adapter_len": 0}, "adapter_len must be a positive integer"),
            ({"adapter_layers": None}, "adapter_layers must be a positive integer"),
        ):
            made = config(peft_fast, **options)
            with untouched(model), pytest.raises(ValueError, match=error):
                peft_fast.get_peft_model(model, made)
            assert made == config(peft_fast, **options)
        with pytest.raises(TypeError, match="target_modules must be one name"):
            config(peft_fast, target_modules=["self_attn"])

    def test_files_that_ask_for_too_much(self, tmp_path, untouched):
        adapted(peft_fast, base("llama")).save_pretrained(tmp_path)
        path, model = tmp_path / "adapter_config.json", base("llama")
        path.write_text(path.read_text().replace('"adapter_len": 4', '"adapter_len": 1000000000000'))
        with untouched(model), pytest.raises(ValueError, match="the config says adapter_len=1000000000000, and"):
            peft_fast.PeftModel.from_pretrained(model, tmp_path)

    def test_two_at_a_time(self, untouched):
        model = adapted(peft_fast, base("llama"))
        model.add_adapter("other", config(peft_fast))
        with untouched(model), pytest.raises(ValueError, match="one adaption prompt can be active"):
            model.base_model.set_adapter(["default", "other"])
