"""adapter_names: batches whose samples go through different adapters, beside HF PEFT and beside each adapter alone; and
training them together, which peft refuses."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import peft_fast
from peft_fast import LoraConfig, get_peft_model
from peft_fast.tuners.mixed_batch import MixedBatch, TokenAdapters

NAMES = ["b", "__base__", "a", "b"]


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


def with_adapters(library, base: nn.Module, *configs: dict, seed: int = 1) -> nn.Module:
    """Adapters "a", "b", ... that change the outputs, of the same weights in both libraries."""
    torch.manual_seed(seed)
    model = None
    for name, config in zip("abc", configs):
        made = library.LoraConfig(**{"init_lora_weights": False, "task_type": "CAUSAL_LM", **config})
        if model is None:
            model = library.get_peft_model(base, made, name)
        else:
            model.add_adapter(name, made)
    return model.eval()


def ids(batch: int = 4, length: int = 6) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randint(1, 64, (batch, length))


MODELS = {
    "linear": ({"r": 4, **TARGETS}, {"r": 8, "lora_alpha": 3, **TARGETS}),
    "different layers": ({"r": 4, "target_modules": ["q_proj"]}, {"r": 2, "target_modules": ["q_proj", "up_proj"]}),
    "all layers of an MLP": ({"r": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]},) * 2,
    "embedding": ({"r": 4, "target_modules": ["embed_tokens", "v_proj"]},) * 2,
    "lora_bias": ({"r": 4, "lora_bias": True, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": ["q_proj"]}),
    "rslora": ({"r": 4, "use_rslora": True, **TARGETS}, {"r": 8, **TARGETS}),
    "modules_to_save": ({"r": 4, "modules_to_save": ["lm_head"], **TARGETS},) * 2,
    "trained tokens": ({"r": 4, "trainable_token_indices": [1, 5, 7], **TARGETS},) * 2,
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_pefts(name):
    theirs, ours = (with_adapters(library, llama(), *MODELS[name]) for library in (peft, peft_fast))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        if name in ("modules_to_save", "trained tokens"):  # copies that differ from the base model's
            for model in (theirs, ours):
                torch.manual_seed(3)
                for key, parameter in sorted(model.named_parameters()):
                    if "modules_to_save" in key or "trainable_tokens_delta" in key:
                        parameter += torch.randn_like(parameter)
        expected = theirs(ids(), adapter_names=NAMES).logits
        torch.testing.assert_close(ours(ids(), adapter_names=NAMES).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1])


def test_each_sample_is_as_alone():
    model = with_adapters(peft_fast, llama(), *MODELS["linear"])
    with torch.no_grad():
        mixed = model(ids(), adapter_names=NAMES).logits
        for sample, name in enumerate(NAMES):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(ids()[sample : sample + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(ids()[sample : sample + 1]).logits
            torch.testing.assert_close(mixed[sample : sample + 1], alone, rtol=1e-5, atol=1e-5)


def test_nothing_stays_behind():
    """Neither after a call nor after one that fails."""
    model = with_adapters(peft_fast, llama(), *MODELS["all layers of an MLP"])
    before = model(ids()).logits
    model(ids(), adapter_names=NAMES)
    with pytest.raises(ValueError, match="one name a sample: got 3 for an input of 4"):
        model(ids(), adapter_names=NAMES[:3])
    assert torch.equal(model(ids()).logits, before)
    assert all(getattr(module, "mixed_batch", None) is None for module in model.modules())


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=str,
)
def test_generate(settings):
    model = with_adapters(peft_fast, llama(), *MODELS["linear"])
    common = dict(max_new_tokens=5, return_dict_in_generate=True, output_logits=True, **settings)
    if settings.get("do_sample"):
        found = model.generate(ids(), adapter_names=NAMES, **common)
        assert found.sequences.shape == (8, 11)
        return
    mixed = model.generate(ids(), adapter_names=NAMES, **common).sequences
    times = settings.get("num_return_sequences", 1)
    for sample, name in enumerate(NAMES):
        own = {"adapter_names": [name]}
        alone = model.generate(ids()[sample : sample + 1], **own, **common).sequences
        assert mixed[times * sample : times * (sample + 1)].tolist() == alone.tolist(), name


def test_beams_are_pefts_in_an_encoder_decoder():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(config)
    options = {"task_type": "SEQ_2_SEQ_LM", "r": 4, "target_modules": ["q", "v", "wo"]}
    theirs, ours = (with_adapters(lib, copy.deepcopy(base), options, options) for lib in (peft, peft_fast))
    for settings in ({}, {"num_beams": 3}):
        common = dict(max_new_tokens=6, adapter_names=NAMES, **settings)
        assert ours.generate(input_ids=ids(), **common).tolist() == theirs.generate(input_ids=ids(), **common).tolist()


def test_a_classifier_of_each_adapter():
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3
    )
    torch.manual_seed(0)
    base = BertForSequenceClassification(config)
    options = {"task_type": "SEQ_CLS", "r": 4}
    theirs, ours = (with_adapters(lib, copy.deepcopy(base), options, options) for lib in (peft, peft_fast))
    for model in (theirs, ours):
        torch.manual_seed(3)
        with torch.no_grad():
            for _, parameter in sorted((n, p) for n, p in model.named_parameters() if "modules_to_save" in n):
                parameter += torch.randn_like(parameter)
    with torch.no_grad():
        got, expected = (model(ids(), adapter_names=NAMES).logits for model in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_names_by_token():
    """As the tokens' own samples, where tokens do not look at each other."""
    model = with_adapters(
        peft_fast, llama(), {"r": 4, "target_modules": ["down_proj", "embed_tokens"]}, MODELS["linear"][1]
    )
    by_token = [["a"] * 2 + ["b"] * 3 + ["__base__"], ["b"] * 6]
    with torch.no_grad():
        got = model(ids(2), adapter_names=by_token).logits
        first = model(ids(2)[:1, :2], adapter_names=["a"]).logits
        last = model(ids(2)[1:], adapter_names=["b"]).logits
    torch.testing.assert_close(got[:1, :2], first, rtol=1e-5, atol=1e-5)  # causal: of the first tokens alone
    torch.testing.assert_close(got[1:], last, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="a name for each token"):
        model(ids(2), adapter_names=[["a"] * 5, ["b"] * 5])


def test_numbers_of_tokens_are_names_of_tokens():
    """In eval and in training, dropout included, sorted or not, generated beams too; -1 is the base model."""
    by_name = [["b"] * 2 + ["a"] * 3 + ["__base__"], ["b"] * 6]
    numbers = torch.tensor([[1, 1, 0, 0, 0, -1], [1] * 6])
    model = with_adapters(peft_fast, llama(), {**MODELS["embedding"][0], "lora_dropout": 0.3}, MODELS["linear"][1])
    for names, own in ((by_name, numbers), ([["a"] * 6, ["b"] * 6], torch.tensor([[0] * 6, [1] * 6]))):
        with torch.no_grad():
            expected = model.eval()(ids(2), adapter_names=names).logits
            got = model(ids(2), adapter_names=TokenAdapters(["a", "b"], own)).logits
        torch.testing.assert_close(got, expected)
        losses = []
        for given in (names, TokenAdapters(["a", "b"], own.int())):
            model.enable_mixed_batch_training(seeds={"a": 5, "b": 6})
            losses.append(model.train()(ids(2), labels=ids(2), adapter_names=given).loss)
        torch.testing.assert_close(*losses)
        assert not torch.isclose(losses[0], model.eval()(ids(2), labels=ids(2)).loss)
    batch = MixedBatch(TokenAdapters(["a", "b"], numbers), repeats=2)
    x = torch.empty(4, 6, 3)
    assert batch.of_rows(x) == [1, 1, 0, 0, 0, -1] * 2 + [1] * 12
    segments = batch.segments(x)
    assert (segments.lengths, segments.order.tolist()[:6]) == ((6, 16), [2, 3, 4, 8, 9, 10])


@pytest.mark.parametrize(
    ("adapters", "numbers", "error", "message"),
    [
        (["a", "a"], torch.zeros(2, 6, dtype=torch.int64), ValueError, "a list of different names"),
        (["a", "__base__"], torch.zeros(2, 6, dtype=torch.int64), ValueError, "a list of different names"),
        ("ab", torch.zeros(2, 6, dtype=torch.int64), ValueError, "a list of different names"),
        (["a"], torch.zeros(2, 6), TypeError, r"int32 or int64 \[samples, tokens\], got torch.float32 \(2, 6\)"),
        (["a"], torch.zeros(6, dtype=torch.int64), TypeError, r"int32 or int64 \[samples, tokens\]"),
        (["a"], [[0]], TypeError, r"got \[\[0\]\]"),
        (["a"], torch.ones(2, 6, dtype=torch.int64), ValueError, "numbers must be from -1 to 0, got 1 to 1"),
        (["a", "z"], torch.zeros(2, 6, dtype=torch.int64), ValueError, "do not exist: z"),
        (["a"], torch.zeros(2, 5, dtype=torch.int64), ValueError, "a name for each token"),
        (["a"], torch.zeros(3, 6, dtype=torch.int64), ValueError, "got 3 for an input of 2"),
    ],
)
def test_numbers_that_make_no_sense(adapters, numbers, error, message):
    model = with_adapters(peft_fast, llama(), *MODELS["linear"])
    with pytest.raises(error, match=message):
        model(ids(2), adapter_names=TokenAdapters(adapters, numbers))


def test_layers_that_run_one_by_one_drop_out_for_each_adapter_as_alone():
    """DoRA beside plain LoRA, in one layer: neither's masks depend on the other's being there."""
    one = {"r": 4, "lora_dropout": 0.4, "target_modules": ["q_proj", "up_proj"]}
    model = with_adapters(peft_fast, llama(), {**one, "use_dora": True}, one).train()
    together = gradients(model, ids(5), ["b", "a", "b", "a", "a"])
    torch.manual_seed(77)
    alone = gradients(model, ids(5)[[1, 3, 4]], ["a"] * 3) | gradients(model, ids(5)[[0, 2]], ["b"] * 2)
    alone = {key: gradient for key, gradient in alone.items() if gradient.abs().sum()}
    assert set(together) == set(alone)
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, alone[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def jobs_model(p: float = 0.1, **options) -> peft_fast.PeftModel:
    one = {"r": 4, "lora_dropout": p, "target_modules": "all-linear"}
    return with_adapters(peft_fast, llama(**options), one, {**one, "r": 8, "lora_alpha": 3}).train()


def gradients(model: nn.Module, batch: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Of the sum over adapters of the mean loss of their samples, from the same random numbers each time."""
    model.enable_mixed_batch_training(seeds={"a": 5, "b": 6})
    model.zero_grad()
    logits = model(batch, adapter_names=names).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(
        len(batch), -1
    )
    rows = {name: [i for i, own in enumerate(names) if own == name] for name in dict.fromkeys(names)}
    sum(loss[own].mean() for own in rows.values()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "not reentrant"])
def test_gradients_are_those_of_separate_training(checkpointing):
    """Dropout included: an adapter's masks do not depend on who else is in the batch."""
    model = jobs_model()
    together = gradients(model, ids(5), ["b", "a", "b", "a", "a"])
    alone = gradients(model, ids(5)[[1, 3, 4]], ["a"] * 3) | gradients(model, ids(5)[[0, 2]], ["b"] * 2)
    alone = {key: gradient for key, gradient in alone.items() if gradient.abs().sum()}
    assert set(together) == set(alone)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        together = gradients(model, ids(5), ["b", "a", "b", "a", "a"])
    assert set(together) == set(alone)
    assert any(".a." in key for key in together)
    assert any(".b." in key for key in together)
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, alone[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_dropout_differs_by_step_layer_and_adapter():
    model = jobs_model(0.5)
    model.enable_mixed_batch_training(seeds={"a": 1, "b": 1})
    state = model._mixed_training
    first, second = (state.keys(["a", "b"], ["x", "y"], torch.device("cpu")) for _ in range(2))
    assert len({tuple(key) for keys in (first, second) for layer in keys.tolist() for key in layer}) == 4  # same seeds
    model.enable_mixed_batch_training(seeds={"a": 1, "b": 2})
    keys = model._mixed_training.keys(["a", "b"], ["x", "y"], torch.device("cpu"))
    assert len({tuple(key) for layer in keys.tolist() for key in layer}) == 4
    assert torch.equal(keys[:, :1], first[:, :1])


def test_without_dropout_gradients_are_pefts():
    one = {"r": 4, "target_modules": "all-linear"}
    theirs = with_adapters(peft, llama(), one, {**one, "r": 8}).train()
    ours = with_adapters(peft_fast, llama(), one, {**one, "r": 8}).train()
    ours.load_state_dict(theirs.state_dict())
    together = gradients(ours, ids(4), ["a", "b", "b", "a"])
    for name, rows in (("a", [0, 3]), ("b", [1, 2])):
        theirs.set_adapter(name)
        theirs.zero_grad()
        theirs(ids(4)[rows], labels=ids(4)[rows]).loss.backward()
        for key, parameter in theirs.named_parameters():
            if f".{name}." in key:
                torch.testing.assert_close(together[key], parameter.grad, rtol=1e-4, atol=1e-6)


def test_enable_and_disable():
    model = jobs_model()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="training mode.*enable_mixed_batch_training"):
        model(ids(), adapter_names=NAMES)
    model.enable_mixed_batch_training(["b"])
    with pytest.raises(ValueError, match="'a' is not among"):
        model(ids(), adapter_names=["a", "b", "b", "b"])
    model.enable_mixed_batch_training()
    assert model(ids(), adapter_names=NAMES).logits.requires_grad
    model = copy.deepcopy(model)
    model.disable_mixed_batch_training()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    with pytest.raises(ValueError, match="training mode"):
        model(ids(), adapter_names=NAMES)


def trains(model) -> set[str]:
    """Adapters that a batch of both gives gradients."""
    model.zero_grad()
    model(ids(), labels=ids(), adapter_names=["a", "b"] * (len(ids()) // 2)).loss.backward()
    return {name for name in "ab" for key, p in model.named_parameters() if f".{name}." in key and p.grad is not None}


def test_those_trained_together_stay_trainable_whichever_is_active():
    model = jobs_model()
    model.enable_mixed_batch_training(["a", "b", "a"])
    model.set_adapter("b")
    assert trains(model) == {"a", "b"}
    config = copy.deepcopy(model.peft_config["a"])
    model.delete_adapter("a")
    model.add_adapter("a", config)
    with pytest.raises(ValueError, match="'a' is not among"):
        trains(model)
    model.enable_mixed_batch_training()
    assert trains(model) == {"a", "b"}
    with pytest.raises(TypeError, match="must be a list of the adapters to train, got 'ab'"):
        model.enable_mixed_batch_training("ab")


def test_kbit_layers():

    base = llama().to(torch.bfloat16)
    peft_fast.quantize_linear_layers(base)
    model = with_adapters(peft_fast, base, *MODELS["linear"])
    with torch.no_grad():
        mixed = model(ids(), adapter_names=NAMES).logits
        model.set_adapter("b")
        alone = model(ids()).logits
    torch.testing.assert_close(mixed[0], alone[0], rtol=0.05, atol=0.05)
    assert not torch.allclose(mixed[2], alone[2], rtol=0.05, atol=0.05)


def test_dora_and_convolutions_one_adapter_after_the_other():
    base = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.Flatten(1), nn.Linear(48, 5)).eval()
    options = {"task_type": None, "r": 2, "target_modules": ["0", "2"], "use_dora": True}
    model = with_adapters(peft_fast, base, options, {**options, "use_dora": False})
    x = torch.randn(4, 3, 6)
    with torch.no_grad():
        mixed = model(x, adapter_names=NAMES)
        for name in "ab":
            model.set_adapter(name)
            rows = [i for i, own in enumerate(NAMES) if own == name]
            torch.testing.assert_close(mixed[rows], model(x[rows]))
        with model.disable_adapter():
            torch.testing.assert_close(mixed[1:2], model(x[1:2]))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "x", "b", "z"], ValueError, "do not exist: x, z; there are 'a', 'b', '__base__'"),
        ("aabb", TypeError, "must be a list"),
        (["a", None, "b", "a"], TypeError, "got None; for the base model alone it is '__base__'"),
        (["a", ["b", 7], "b", "a"], TypeError, "got 7"),
        (["a"], ValueError, "got 1 for an input of 4"),
        ([], ValueError, "got 0 for an input of 4"),
    ],
)
def test_refuses(names, error, message):
    model = with_adapters(peft_fast, llama(), *MODELS["linear"])
    with pytest.raises(error, match=message):
        model(ids(), adapter_names=names)


def test_refuses_what_is_merged_and_what_is_no_lora():
    model = with_adapters(peft_fast, llama(), *MODELS["linear"])
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="while adapters are merged"):
        model(ids(), adapter_names=NAMES)
    prompt = get_peft_model(llama(), peft_fast.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="only LoRA"):
        prompt(ids(), adapter_names=["default"] * 4)
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    model = get_peft_model(attention, LoraConfig(target_modules=["0"], r=2)).eval()
    with pytest.raises(TypeError, match="cannot have a batch of several adapters"):
        model(torch.zeros(1, 1, 8), adapter_names=["default"])
