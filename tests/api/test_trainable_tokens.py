"""LoraConfig(trainable_token_indices=...), beside peft 0.21.2: on models whose output layer shares the embedding's
weight and on others."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import peft_fast
from peft_fast.tuners.trainable_tokens import TrainableTokensLayer

V, E = 40, 16
IDS = torch.randint(0, 10, (3, 9), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": V, "hidden_size": E, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
TEXT = {"input_ids": IDS}
BART = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
        (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip


def llama(tied):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, pad_token_id=3, tie_word_embeddings=tied))


def bert():
    model = tf.BertForMaskedLM(tf.BertConfig(**SIZES))
    return model.requires_grad_(True)


MODELS = {
    "tied": (lambda: llama(True), TEXT, ["q_proj"]),
    "untied": (lambda: llama(False), TEXT, ["q_proj"]),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=V, n_embd=E, n_layer=1, n_head=2)), TEXT, ["c_attn"]),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=V, d_model=E, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        ),
        PAIR,
        ["q"],
    ),
    "bart-scaled": (
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=V, d_model=E, scale_embedding=True, **BART)),
        PAIR,
        ["q_proj"],
    ),
    "gemma2-scaled": (
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)),
        TEXT,
        ["q_proj"],
    ),
    "bert": (bert, TEXT, ["query"]),
}
TOKENS = {
    "list": [1, 3, 7],
    "embedding": {"embed_tokens": [5, 1]},
    "head": {"lm_head": [2, 9]},
    "both-alike": {"embed_tokens": [1, 3], "lm_head": [1, 3]},
    "both-different": {"embed_tokens": [1, 3], "lm_head": [1, 2, 4]},
    "twice": [4, 4, 6],
}
by_kind = pytest.mark.parametrize("kind", MODELS)
CASES = [(kind, "list") for kind in MODELS] + [(k, t) for k in ("tied", "untied") for t in TOKENS if t != "list"]
every_case = pytest.mark.parametrize(("kind", "tokens"), CASES, ids=[f"{k}-{t}" for k, t in CASES])


def base(kind, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return MODELS[kind][0]().eval().to(dtype)


def adapted(library, kind, tokens, shake=True, dtype=torch.float32, **options):
    model = base(kind, dtype)
    torch.manual_seed(5)
    config = library.LoraConfig(r=4, target_modules=MODELS[kind][2], trainable_token_indices=tokens, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(model, config).eval()
    return shaken(model) if shake else model


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name or "tokens_delta" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def logits(model, kind):
    return model(**MODELS[kind][1]).logits


def close(a, b, **tolerances):
    torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


def without_bias(model, kind):
    """peft's layer around an output layer with a bias leaves it out, so its BERT is another model: both without one."""
    if kind == "bert":
        model.get_submodule("cls.predictions").bias.data.zero_()
    return model


@every_case
def test_names_values_flags_outputs_and_gradients_are_pefts(kind, tokens):
    fresh = [adapted(library, kind, TOKENS[tokens], shake=False) for library in (peft_fast, peft)]
    named = [dict(model.named_parameters(remove_duplicate=False)) for model in fresh]
    assert list(named[0]) == list(named[1])
    assert fresh[0].state_dict().keys() == fresh[1].state_dict().keys()
    assert {n for n, _ in fresh[0].named_buffers()} == {n for n, _ in fresh[1].named_buffers()}
    assert fresh[0].get_nb_trainable_parameters() == fresh[1].get_nb_trainable_parameters()
    for name, mine in named[0].items():
        assert torch.equal(mine, named[1][name]), name
        assert mine.requires_grad == named[1][name].requires_grad, name
    close(logits(fresh[0], kind), logits(base(kind), kind))  # untrained rows are the base's
    ours, theirs = (adapted(library, kind, TOKENS[tokens]) for library in (peft_fast, peft))
    outputs = [logits(model, kind) for model in (ours, theirs)]
    close(*outputs)
    assert (outputs[0] - logits(fresh[0], kind)).abs().max() > 1e-2
    for out in outputs:
        out.square().mean().backward()
    compared = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            start = 1 if tokens == "twice" and "delta" in name else 0  # the first of two rows for a token has no effect
            close(mine.grad[start:], other.grad[start:], msg=name)
            compared += "tokens_delta" in name and bool(mine.grad.abs().max() > 0)
    assert compared


@every_case
def test_files_have_pefts_keys_and_load_both_ways(kind, tokens, tmp_path):
    keys = []
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        written = adapted(writer, kind, TOKENS[tokens])
        folder = tmp_path / writer.__name__
        written.save_pretrained(folder)
        for low in (False, True):
            read = reader.PeftModel.from_pretrained(base(kind), folder, low_cpu_mem_usage=low).eval()
            close(logits(read, kind), logits(written, kind))
        again = reader.PeftModel.from_pretrained(base(kind), folder, adapter_name="a b", is_trainable=True)
        assert again.get_nb_trainable_parameters()[0] == written.get_nb_trainable_parameters()[0]
        keys.append(set(load_file(folder / "adapter_model.safetensors")))
    assert keys[0] == keys[1]
    assert any(key.endswith("token_adapter.trainable_tokens_delta") for key in keys[0])


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2", "gemma2-scaled"])
def test_merging_and_unloading_give_pefts_weights(kind):
    ours, theirs = (adapted(library, kind, [1, 3, 7]) for library in (peft_fast, peft))
    expected = logits(ours, kind)
    for model in (ours, theirs):
        model.merge_adapter()
    close(logits(ours, kind), expected)
    close(logits(ours, kind), logits(theirs, kind))
    for model in (ours, theirs):
        model.unmerge_adapter()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        close(mine, other, msg=name)
    close(logits(ours, kind), expected)
    merged = [model.merge_and_unload(safe_merge=True) for model in (ours, theirs)]
    assert [n for n, _ in merged[0].named_modules()] == [n for n, _ in merged[1].named_modules()]
    for (name, mine), other in zip(merged[0].named_parameters(), merged[1].named_parameters(), strict=True):
        assert name == other[0]
        close(mine, other[1], msg=name)
    close(logits(merged[0], kind), expected)
    assert merged[0].config.tie_word_embeddings == merged[1].config.tie_word_embeddings == (kind != "untied")


def test_unload_gives_the_base_model_back(untouched):
    plain = base("tied")
    model = shaken(peft_fast.get_peft_model(plain, peft_fast.LoraConfig(trainable_token_indices=[1, 2])))
    model.merge_adapter()
    assert model.unload() is plain
    for (name, mine), other in zip(plain.named_parameters(), base("tied").named_parameters(), strict=True):
        assert name == other[0]
        close(mine, other[1])
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_life_of_several_adapters_is_pefts(kind):
    models = [adapted(library, kind, [1, 3]) for library in (peft_fast, peft)]
    for model, library in zip(models, (peft_fast, peft)):
        torch.manual_seed(9)
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]))
        model.add_adapter("plain", library.LoraConfig(r=2, target_modules=["q_proj"]))
        shaken(model, seed=2)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    outputs = []
    for name in ("other", "plain", "default"):
        for model in models:
            model.set_adapter(name)
        outputs += [logits(model, kind) for model in models]
        close(*outputs[-2:])
        flags = [{n: p.requires_grad for n, p in model.named_parameters()} for model in models]
        assert flags[0] == flags[1]
        assert [s.active_adapters for s in models[0].get_layer_status()] == [
            s.active_adapters for s in models[1].get_layer_status()
        ]
    assert len({round(out.sum().item(), 3) for out in outputs}) == 3
    for model in models:
        with model.disable_adapter():
            close(logits(model, kind), logits(base(kind), kind))
        model.delete_adapter("default") if model is models[1] else _deleted(model)
        model.set_adapter("other")
    close(logits(models[0], kind), outputs[0])
    close(*(logits(model, kind) for model in models))
    assert models[0].get_model_status().num_adapter_layers == models[1].get_model_status().num_adapter_layers
    assert [s.module_type for s in models[0].get_layer_status()] == [
        s.module_type for s in models[1].get_layer_status()
    ]


def _deleted(model):
    with pytest.warns(UserWarning, match="was deleted"):
        model.delete_adapter("default")


def test_adapters_with_rows_for_one_token_exclude_each_other():
    model = adapted(peft_fast, "tied", [1, 3])
    for name, tokens in (("same", [3]), ("apart", [4])):
        model.add_adapter(name, peft_fast.LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens))
    shaken(model)
    with pytest.raises(ValueError, match="both have a row of their own for token 3"):
        model.base_model.set_adapter(["default", "same"])
    with pytest.raises(ValueError, match="token 3"):
        model.merge_adapter(["default", "same"])
    assert not any(layer.merged for _, layer in model.base_model.layers())
    model.base_model.set_adapter(["default", "apart"])
    expected = logits(model, "tied")
    close(logits(model.merge_and_unload(), "tied"), expected)


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_training_moves_the_rows_as_in_peft_and_nothing_else(kind, tmp_path):
    models = [adapted(library, kind, [1, 3, 7]).train() for library in (peft_fast, peft)]
    for module in [m for model in models for m in model.modules() if isinstance(m, torch.nn.Dropout)]:
        module.p = 0.0
    before = [p.detach().clone() for p in models[0].parameters()]
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, mine), other, old in zip(models[0].named_parameters(), models[1].parameters(), before):
        close(mine, other, atol=1e-4, msg=name)
        assert torch.equal(mine, old) != mine.requires_grad, name


def test_a_frozen_padding_row_is_as_in_peft():
    ids = torch.tensor([[3, 1, 3, 2]])  # 3 is the padding token
    gradients = []
    for library in (peft_fast, peft):
        model = adapted(library, "untied", [3, 1])
        model(input_ids=ids).logits.square().mean().backward()
        gradients.append(next(p.grad for n, p in model.named_parameters() if "delta" in n))
    close(*gradients)
    assert not gradients[0][0].any()
    assert gradients[0][1].any()


def test_in_16_bits_the_rows_are_kept_in_fp32_as_in_peft():
    ours, theirs = (adapted(library, "tied", [1, 3], dtype=torch.bfloat16) for library in (peft_fast, peft))
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    close(logits(ours, "tied").float(), logits(theirs, "tied").float(), rtol=2e-2, atol=2e-2)
    out = logits(ours, "tied")
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = (logits(adapted(library, "tied", [1, 3]), "tied") for library in (peft_fast, peft))
    assert mine.dtype == other.dtype
    close(mine.float(), other.float(), rtol=2e-2, atol=2e-2)


def test_no_tensor_of_the_tables_size_is_made():
    """peft copies the table in each forward, and makes a gradient of its size."""
    table, sizes = torch.nn.Embedding(5000, 4), []
    layer = TrainableTokensLayer(table.requires_grad_(False), "default", token_indices=[1, 4000])
    layer.set_adapter("default")

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        layer(IDS).square().sum().backward()
    assert sizes
    assert max(sizes) < 5000


def test_an_output_layer_keeps_its_bias_which_pefts_loses():
    def biased(library):
        model = base("bert")
        model.cls.predictions.bias.data.normal_(generator=torch.Generator().manual_seed(1))
        expected = model(input_ids=IDS).logits
        config = library.LoraConfig(target_modules=["query"], trainable_token_indices=[1])
        return library.get_peft_model(model, config).eval()(input_ids=IDS).logits - expected

    assert biased(peft_fast).abs().max() < 1e-5
    assert biased(peft).abs().max() > 0.1


def test_hooks_of_the_embedding_run():
    model, seen = base("tied"), []
    model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(1))
    model = peft_fast.get_peft_model(model, peft_fast.LoraConfig(trainable_token_indices=[1]))
    model(input_ids=IDS)
    assert seen == [1]


def test_copies_pickles_and_attributes(tmp_path):
    model = adapted(peft_fast, "tied", [1, 3])
    expected = logits(model, "tied")
    wrapper = model.get_input_embeddings()
    assert wrapper.num_embeddings == V
    assert wrapper.weight.shape == (V, E)
    assert not torch.equal(wrapper.weight, wrapper.original_module.weight)
    close(wrapper.weight[1], wrapper.token_adapter.trainable_tokens_delta["default"][0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(logits(twin, "tied"), expected)
        head, embedding = (twin.get_submodule(f"base_model.model.{p}") for p in ("lm_head", "model.embed_tokens"))
        assert (
            head.token_adapter.trainable_tokens_delta["default"]
            is (embedding.token_adapter.trainable_tokens_delta["default"])
        )
    row = next(row for row in peft_fast.explain(model, show=False).rows if "embed_tokens" in row.name)
    assert row.route == "added"
    plain = base("tied").state_dict()
    of_base = peft_fast.get_base_model_state_dict(model)
    assert of_base.keys() == plain.keys()
    assert all(torch.equal(of_base[name], plain[name]) for name in plain)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_embeddings_that_are_saved_with_it_load_both_ways(kind, tmp_path):
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        written = adapted(writer, kind, [1, 3])
        written.get_base_model().get_input_embeddings().original_module.weight.data *= 1.5
        folder = tmp_path / writer.__name__
        written.save_pretrained(folder, save_embedding_layers=True)
        read = reader.PeftModel.from_pretrained(base(kind), folder).eval()
        close(logits(read, kind), logits(written, kind))


def test_new_tokens_are_added_trained_and_merged(tmp_path):
    """What the option is for."""
    model = base("tied")
    model.resize_token_embeddings(V + 3, mean_resizing=False)
    config = peft_fast.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[V, V + 1, V + 2])
    model = shaken(peft_fast.get_peft_model(model, config))
    model.save_pretrained(tmp_path)
    out = model(input_ids=torch.tensor([[1, V + 1]])).logits
    assert out.shape[-1] == V + 3
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        peft_fast.PeftModel.from_pretrained(base("tied"), tmp_path)
    close(model.merge_and_unload()(input_ids=torch.tensor([[1, V + 1]])).logits, out)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_merging_to_16_bits(kind):
    model = adapted(peft_fast, kind, [1, 3])
    expected, merged = logits(model, kind), model.merge_to_16bit(progressbar=False)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in base(kind).named_modules()]
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (kind == "tied")
    close(logits(merged, kind).float(), expected, rtol=2e-2, atol=2e-2)


def test_it_compiles_to_one_graph_and_trains_with_checkpointing():
    model = adapted(peft_fast, "tied", [1, 3])
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=IDS).logits, logits(model, "tied"))
    gradients = []
    for checkpointing in (False, True):
        model = adapted(peft_fast, "tied", [1, 3]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        close(one, other)


BAD = {
    "unknown": ({"nope": [1]}, {}, "'nope' not found"),
    "beyond": ([V], {}, "from 0 to 39"),
    "no-embedding": ({"norm": [1]}, {}, "single tokens cannot be trained in a LlamaRMSNorm"),
    "adapted": ([1], {"target_modules": ["embed_tokens", "q_proj"]}, "leave it out of target_modules"),
    "whole": ({"embed_tokens": [1]}, {"modules_to_save": ["embed_tokens"]}, "trains it whole"),
    "whole-unnamed": ([1], {"modules_to_save": ["embed_tokens"]}, "trains it whole"),
    "untie": ({"embed_tokens": [1], "lm_head": [2]}, {"ensure_weight_tying": True}, "needs the same tokens"),
}


@pytest.mark.parametrize(("tokens", "options", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("how", ["new", "added", "injected"])
def test_what_cannot_be_done_changes_nothing(tokens, options, message, how, untouched):
    model = base("tied")
    if how == "added":
        model = peft_fast.get_peft_model(model, peft_fast.LoraConfig(target_modules=["v_proj"]))
    config = peft_fast.LoraConfig(**{"target_modules": ["q_proj"], **options}, trainable_token_indices=tokens)
    before = copy.deepcopy(vars(config))
    call = {
        "new": lambda: peft_fast.get_peft_model(model, config),
        "added": lambda: model.add_adapter("new", config),
        "injected": lambda: peft_fast.inject_adapter_in_model(config, model),
    }[how]
    with untouched(model), pytest.raises(ValueError, match=message):
        call()
    assert vars(config) == before


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        ([-1], ValueError), ([], ValueError), ({"x": []}, ValueError), (["a"], TypeError), (3, TypeError),
        ([True], TypeError), ((1, 2), TypeError), ({"": [1]}, TypeError), ({1: [1]}, TypeError), ({"x": 1}, TypeError),
        ([1.0], TypeError), ("1", TypeError),
    ],
)  # fmt: skip
def test_malformed_indices_are_refused(tokens, error):
    with pytest.raises(error, match="trainable_token_indices"):
        peft_fast.LoraConfig(trainable_token_indices=tokens)


def test_weights_for_other_tokens_are_not_loaded_over_these(tmp_path, untouched):
    adapted(peft_fast, "tied", [1, 3]).save_pretrained(tmp_path)
    model = adapted(peft_fast, "tied", [1, 4])
    with untouched(model), pytest.raises(ValueError, match="trainable_token_indices"):
        model.load_adapter(tmp_path, "default")


def test_an_adapted_output_layer_follows_inside_of_its_adapter():
    ours, theirs = (_with_head(library) for library in (peft_fast, peft))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    close(logits(ours, "tied"), logits(theirs, "tied"))
    files = [library.get_peft_model_state_dict(m) for library, m in ((peft_fast, ours), (peft, theirs))]
    assert files[0].keys() == files[1].keys()
    with pytest.raises(ValueError, match="computed from others"):
        ours.merge_and_unload()


def _with_head(library):
    config = library.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], trainable_token_indices=[1, 3])
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shaken(library.get_peft_model(base("tied"), config).eval())


def test_injected_models_save_and_load(tmp_path):
    config = peft_fast.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 3])
    model = shaken(peft_fast.inject_adapter_in_model(config, base("tied")))
    state = peft_fast.get_peft_model_state_dict(model)
    twin = peft_fast.inject_adapter_in_model(copy.deepcopy(config), base("tied"), low_cpu_mem_usage=True)
    result = peft_fast.set_peft_model_state_dict(twin, state, low_cpu_mem_usage=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    close(logits(twin, "tied"), logits(model, "tied"))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_options_of_the_embedding_are_kept_as_in_peft(options):
    from peft.tuners.trainable_tokens import TrainableTokensConfig
    from peft.tuners.trainable_tokens import TrainableTokensLayer as Theirs

    torch.manual_seed(0)
    table = torch.nn.Embedding(V, E, **options).requires_grad_(False)
    ours = TrainableTokensLayer(copy.deepcopy(table), "default", token_indices=[1, 3])
    theirs = Theirs(copy.deepcopy(table), "default", None)
    theirs.update_layer("default", TrainableTokensConfig(token_indices=[1, 3]))
    ids = torch.tensor([[1, 1, 3, 7, 7]])
    results = []
    for layer in (ours, theirs):
        layer.set_adapter(["default"])
        layer.trainable_tokens_delta["default"].data += 0.5
        y = layer(ids)
        y.square().sum().backward()
        results.append((y, layer.trainable_tokens_delta["default"].grad))
        assert torch.equal(layer.base_layer.weight, table.weight)
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


def test_an_adapter_that_is_made_anew_has_its_own_tokens():
    layer = TrainableTokensLayer(torch.nn.Embedding(V, E), "default", token_indices=[1])
    layer.set_adapter("default")
    layer(IDS)
    layer.update_layer("default", [2], init_weights=False)
    assert torch.equal(layer(torch.tensor([2]))[0], layer.trainable_tokens_delta["default"][0])
    assert torch.equal(layer(torch.tensor([1]))[0], layer.base_layer.weight[1])
