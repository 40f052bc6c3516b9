"""The life of adapters with trainable_token_indices, and bad input: see test_trainable_tokens.py."""

import copy
import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_fast
from peft_fast.tuners.trainable_tokens import TrainableTokensLayer

from .token_models import IDS, E, V, adapted, base, close, logits, shaken


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


@pytest.mark.slow
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


def test_training_after_a_call_in_inference_mode():
    """As Lightning has it, which validates before it trains."""
    model = adapted(peft_fast, "tied", [1, 3])
    with torch.inference_mode():
        model(input_ids=IDS)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


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


def test_injected_models_save_and_load(tmp_path):
    config = peft_fast.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 3])
    model = shaken(peft_fast.inject_adapter_in_model(config, base("tied")))
    state = peft_fast.get_peft_model_state_dict(model)
    twin = peft_fast.inject_adapter_in_model(copy.deepcopy(config), base("tied"), low_cpu_mem_usage=True)
    result = peft_fast.set_peft_model_state_dict(twin, state, low_cpu_mem_usage=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    close(logits(twin, "tied"), logits(model, "tied"))


def test_an_adapter_that_is_made_anew_has_its_own_tokens():
    layer = TrainableTokensLayer(torch.nn.Embedding(V, E), "default", token_indices=[1])
    layer.set_adapter("default")
    layer(IDS)
    layer.update_layer("default", [2], init_weights=False)
    assert torch.equal(layer(torch.tensor([2]))[0], layer.trainable_tokens_delta["default"][0])
    assert torch.equal(layer(torch.tensor([1]))[0], layer.base_layer.weight[1])


DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
DAMAGE = {
    "negative": {"trainable_token_indices": [-1, 3]},
    "beyond": {"trainable_token_indices": [40, 3]},
    "endless": {"trainable_token_indices": [10**30, 3]},
    "more-than-rows": {"trainable_token_indices": [1, 3, 4]},
    "many": {"trainable_token_indices": [1] * 100_000},
    "nested": {"trainable_token_indices": [[1], [3]]},
    "no-layer": {"trainable_token_indices": {}},
    "a-model": {"trainable_token_indices": {"model": [1, 3]}},
    "a-path": {"trainable_token_indices": {"../x": [1, 3]}},
    "fractions": {"trainable_token_indices": [1.5, 3]},
    "text": {"trainable_token_indices": "1,3"},
    "none": {"trainable_token_indices": None},
    "whole-too": {"modules_to_save": ["embed_tokens"]},
    "no-flag": {"ensure_weight_tying": "yes"},
    "rows": {DELTA: torch.zeros(3, 16)},
    "width": {DELTA: torch.zeros(2, 17)},
    "integers": {DELTA: torch.zeros(2, 16, dtype=torch.int64)},
    "foreign": {f"{DELTA}.x": torch.zeros(2, 16)},
}


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_adapters_give_an_error_and_change_nothing(damage, low, tmp_path, untouched):
    adapted(peft_fast, "tied", [1, 3]).save_pretrained(tmp_path)
    tensors = {key: value for key, value in damage.items() if isinstance(value, torch.Tensor)}
    weights, config = (tmp_path / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    save_file({**load_file(weights), **tensors}, weights)
    values = {key: value for key, value in damage.items() if key not in tensors}
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    model = base("tied")
    with untouched(model, tmp_path), pytest.raises((ValueError, TypeError)):
        peft_fast.PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low)


def test_no_memory_is_taken_for_more_tokens_than_the_file_has(tmp_path):
    adapted(peft_fast, "tied", [1, 3]).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "trainable_token_indices": [1] * 1000}))
    with pytest.raises(ValueError, match="names 1000 tokens, and the file has no rows for them"):
        peft_fast.PeftModel.from_pretrained(base("tied"), tmp_path)
