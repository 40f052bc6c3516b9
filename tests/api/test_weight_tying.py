"""LoraConfig(ensure_weight_tying=True), beside peft 0.21.2: where the output layer shares the embedding's weight."""

import copy
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import peft_fast
from peft_fast.tuners.lora.tied import TiedLinear

V, E = 40, 16
IDS = torch.randint(0, V, (3, 9), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": V, "hidden_size": E, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "untied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=V, n_embd=E, n_layer=1, n_head=2)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=V, d_model=E, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ),
}
CASES = {
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "both": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "regex": ("llama", {"target_modules": r".*(q_proj|lm_head)"}),
    "dora": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "no-init": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False}),
    "gaussian": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "gaussian"}),
    "scaled": ("gemma2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "gpt2-head": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}),
    "t5-head": ("t5", {"target_modules": ["q", "lm_head"]}),
    "whole-embedding": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "whole-head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "whole-both": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "whole-and-target": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    "whole-gpt2": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "untied": ("untied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "neither": ("llama", {"target_modules": ["q_proj"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}),
}
every_case = pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES.keys())


def base(kind, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return MODELS[kind]().eval().to(dtype)


def adapted(library, kind, shake=True, dtype=torch.float32, **options):
    model = base(kind, dtype)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = library.LoraConfig(**{"r": 4, "ensure_weight_tying": True, **options})
        model = library.get_peft_model(model, config).eval()
    return shaken(model) if shake else model


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if any(mark in name for mark in ("lora_", "modules_to_save", "tokens_delta")):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def logits(model, kind):
    return model(**(PAIR if kind == "t5" else TEXT)).logits


def close(a, b, **tolerances):
    torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


@every_case
def test_names_values_outputs_and_gradients_are_pefts(kind, options):
    fresh = [adapted(library, kind, shake=False, **options) for library in (peft_fast, peft)]
    named = [dict(model.named_parameters(remove_duplicate=False)) for model in fresh]
    assert list(named[0]) == list(named[1])
    assert fresh[0].get_nb_trainable_parameters() == fresh[1].get_nb_trainable_parameters()
    for name, mine in named[0].items():
        assert torch.equal(mine, named[1][name]), name
        assert mine.requires_grad == named[1][name].requires_grad, name
    configs = [model.peft_config["default"] for model in fresh]
    for option in ("target_modules", "modules_to_save"):
        mine, other = (getattr(config, option) for config in configs)
        if kind in ("gpt2", "t5"):  # see test_adapters_of_an_embedding_of_another_name_are_lost_by_peft_alone
            mine = type(mine)(name for name in mine if name != "lm_head") if mine else mine
        assert mine == other
    ours, theirs = (adapted(library, kind, **options) for library in (peft_fast, peft))
    outputs = [logits(model, kind) for model in (ours, theirs)]
    close(*outputs)
    assert (outputs[0] - logits(base(kind), kind)).abs().max() > 1e-3
    for out in outputs:
        out.square().mean().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            close(mine.grad, other.grad, msg=name)


@pytest.mark.parametrize("case", ["gpt2-head", "t5-head"])
def test_adapters_of_an_embedding_of_another_name_are_lost_by_peft_alone(case, tmp_path):
    """Its config then names none that it knows for tied; ours keeps lm_head in it, and both libraries load it."""
    kind, options = CASES[case]
    written = adapted(peft, kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written.save_pretrained(tmp_path)
        read = peft.PeftModel.from_pretrained(base(kind), tmp_path).eval()
    assert (logits(read, kind) - logits(written, kind)).abs().max() > 0.1
    with pytest.raises(ValueError, match="weights for layers that this model or its config does not adapt"):
        peft_fast.PeftModel.from_pretrained(base(kind), tmp_path)


@every_case
def test_files_have_pefts_keys_and_load_both_ways(kind, options, tmp_path):
    keys = []
    of_another_name = kind in ("gpt2", "t5") and "modules_to_save" not in options
    for writer, reader in ((peft_fast, peft), (peft_fast if of_another_name else peft, peft_fast)):
        written = adapted(writer, kind, **options)
        folder = tmp_path / writer.__name__
        for low in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                written.save_pretrained(folder)
                read = reader.PeftModel.from_pretrained(base(kind), folder, low_cpu_mem_usage=low).eval()
            close(logits(read, kind), logits(written, kind))
        keys.append(set(load_file(folder / "adapter_model.safetensors")))
        if reader is peft_fast and kind == "llama":
            _check_tied(read)
    assert keys[0] == keys[1]


def _check_tied(model):
    """What is written to the one is in the other."""
    for layer in model.modules():
        if isinstance(layer, TiedLinear):
            embedding = model.get_input_embeddings()
            for name in layer.lora_A:
                assert layer.lora_A[name].weight.data_ptr() == embedding.lora_embedding_B[name].data_ptr()
                assert layer.lora_B[name].weight.data_ptr() == embedding.lora_embedding_A[name].data_ptr()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name in getattr(head, "modules_to_save", {}):
        assert head.modules_to_save[name].weight is embedding.modules_to_save[name].weight


@pytest.mark.parametrize("case", ["embedding", "dora", "whole-head", "gpt2-head"])
def test_training_is_pefts_and_keeps_them_tied(case):
    kind, options = CASES[case]
    models = [adapted(library, kind, shake=False, **options).train() for library in (peft_fast, peft)]
    for module in [m for model in models for m in model.modules() if isinstance(m, torch.nn.Dropout)]:
        module.p = 0.0
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        for _ in range(4):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), other in zip(models[0].named_parameters(), models[1].parameters()):
        close(mine, other, atol=1e-4, msg=name)
    _check_tied(models[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_whole_modules_keeps_the_model_tied_as_in_peft(kind):
    names = {"llama": ["q_proj"], "gpt2": ["c_attn"]}
    for tie in (True, False):
        models = [
            adapted(library, kind, target_modules=names[kind], modules_to_save=["lm_head"], ensure_weight_tying=tie)
            for library in (peft_fast, peft)
        ]
        expected = logits(models[0], kind)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            merged = [model.merge_and_unload() for model in models]
        close(logits(merged[0], kind), expected)
        assert merged[0].config.tie_word_embeddings == merged[1].config.tie_word_embeddings == tie
        ends = merged[0].get_input_embeddings(), merged[0].get_output_embeddings()
        assert (ends[0].weight is ends[1].weight) == tie
        assert any("tie_word_embeddings is set to False" in str(warning.message) for warning in seen) != tie


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_merged_is_unmerged(kind, tmp_path):
    """One weight, one change; peft adds it twice. The merged model is still tied."""
    targets = ["c_attn", "lm_head"] if kind == "gpt2" else ["q_proj", "embed_tokens"]
    model = adapted(peft_fast, kind, target_modules=targets)
    head, expected = model.base_model.model.lm_head, logits(model, kind)
    assert isinstance(head, TiedLinear)
    model.add_adapter("other", peft_fast.LoraConfig(r=2, target_modules=targets[:1]))
    for safe in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.merge_adapter(safe_merge=safe)
        close(logits(model, kind), expected, atol=1e-4)
        assert head.merged_adapters == ["default"]
        model.unmerge_adapter()
        assert not head.merged
        close(logits(model, kind), expected, atol=1e-4)
    model.merge_adapter()
    with model.disable_adapter():
        close(logits(model, kind), logits(base(kind), kind), atol=1e-4)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    close(logits(merged, kind), expected, atol=1e-4)
    merged.save_pretrained(tmp_path)
    close(logits(type(merged).from_pretrained(tmp_path), kind), expected, atol=1e-4)


def test_what_is_not_the_same_change_is_merged_by_each_with_a_warning():
    for change in ("scale", "dora"):
        model = adapted(peft_fast, "llama", target_modules=["embed_tokens"], use_dora=change == "dora")
        head = model.base_model.model.lm_head
        if change == "scale":
            head.set_scale("default", 0.5)
        before, delta = head.weight.detach().clone(), head.get_delta_weight("default")
        with pytest.warns(UserWarning, match="merging changes both"):
            model.merge_adapter()
        if change == "scale":
            close(head.weight, before + 3 * delta, atol=1e-5)


def test_in_16_bits_they_stay_tied_where_pefts_come_apart():
    def shares(model):
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        return embedding.lora_embedding_A["default"].data_ptr() == head.lora_B["default"].weight.data_ptr()

    models = [
        adapted(library, "llama", dtype=torch.bfloat16, shake=False, target_modules=["lm_head", "q_proj"])
        for library in (peft_fast, peft)
    ]
    assert [shares(model) for model in models] == [True, False]
    for (name, mine), other in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(mine, other), name
        assert mine.dtype == other.dtype, name
    assert shares(adapted(peft_fast, "llama", target_modules=["lm_head"]).to(torch.float64))
    assert not shares(adapted(peft, "llama", target_modules=["lm_head"]).to(torch.float64))


def test_embeddings_that_peft_makes_linear_layers_of_work_here():
    """T5's encoder and decoder have the shared embedding too: peft puts an nn.Linear in their place."""
    options = {"target_modules": ["q"], "modules_to_save": ["lm_head"]}
    with pytest.raises(RuntimeError):
        logits(adapted(peft, "t5", **options), "t5")
    model = adapted(peft_fast, "t5", shake=False, **options)
    close(logits(model, "t5"), logits(base("t5"), "t5"))
    copies = {id(p) for n, p in model.named_parameters() if "modules_to_save" in n}
    assert len(copies) == 1
    assert model.get_nb_trainable_parameters() == adapted(peft, "t5", **options).get_nb_trainable_parameters()


@pytest.mark.parametrize("case", ["untied", "neither"])
def test_where_it_has_no_effect_both_warn(case):
    kind, options = CASES[case]
    for library in (peft_fast, peft):
        config = library.LoraConfig(r=4, ensure_weight_tying=True, **options)
        with pytest.warns(UserWarning, match="ensure_weight_tying"):
            library.get_peft_model(base(kind), config)


def test_a_second_adapter_is_tied_too_and_one_that_is_not_is_refused(untouched):
    model = adapted(peft_fast, "llama", target_modules=["lm_head", "q_proj"])
    config = peft_fast.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("other", config)
    _check_tied(model)
    plain = peft_fast.get_peft_model(base("untied"), peft_fast.LoraConfig(r=2, target_modules=["lm_head"]))
    plain.get_base_model().config.tie_word_embeddings = True
    plain.get_base_model().lm_head.base_layer.weight = plain.get_base_model().model.embed_tokens.weight
    before = copy.deepcopy(vars(config))
    with untouched(plain), pytest.raises(ValueError, match="lm_head has an adapter already that is not tied"):
        plain.add_adapter("other", config)
    assert vars(config) == before


def test_what_is_trained_whole_because_it_is_tied_is_no_target():
    """As what modules_to_save itself names; peft puts LoRA on it first, and then cannot copy it."""
    options = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}
    with pytest.raises(TypeError, match="cannot be applied to modules of type"):
        adapted(peft, "llama", **options)
    model = adapted(peft_fast, "llama", **options)
    assert not any("lora" in name for name, _ in model.named_parameters() if "lm_head" in name)
    _check_tied(model)
    assert "default" in model.get_output_embeddings().modules_to_save


def test_deleting_the_tied_adapter_and_unloading():
    plain = base("llama")
    config = peft_fast.LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True)
    model = shaken(peft_fast.get_peft_model(plain, config))
    model.add_adapter("other", peft_fast.LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True))
    model.set_adapter("other")
    model.delete_adapter("default")
    close(logits(model, "llama"), logits(base("llama"), "llama"))
    assert model.unload() is plain
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
