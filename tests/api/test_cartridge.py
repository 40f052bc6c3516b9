"""What is particular to cartridges: frozen tokens, starts from a text, several made one. The rest: test_prompts.py."""

import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedTokenizerFast

import peft_fast

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from prompt_models import N, base, config_of, inputs_of, prompted

LIBRARIES = (peft_fast, peft)
TEXT = "a b c d e f g h i j"
TEMPLATE = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"


def tokenizer(**options):
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *TEXT.split()], start=3)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **options)


def cartridge(library, kind="llama", **options):
    return prompted(library, "cartridge", kind, "CAUSAL_LM", **options)


@pytest.mark.parametrize("frozen", [0, 2, N])
def test_frozen_tokens(frozen, tmp_path):
    results = []
    for library in LIBRARIES:
        model = cartridge(library, num_frozen_tokens=frozen)
        encoder = model.prompt_encoder["default"]
        assert (encoder.frozen_embedding is None) == (frozen == 0)
        trained = {name: p.requires_grad for name, p in model.prompt_encoder.named_parameters()}
        if frozen < N:
            model(**inputs_of("CAUSAL_LM")).loss.backward()
        gradients = {name: p.grad for name, p in model.prompt_encoder.named_parameters()}
        results.append((trained, gradients, encoder.weight.detach(), model.get_nb_trainable_parameters()))
        model.save_pretrained(tmp_path / library.__name__)
    assert results[0][0] == results[1][0]
    assert results[0][3] == results[1][3]
    torch.testing.assert_close(results[0][1:3], results[1][1:3], rtol=1e-4, atol=1e-6)
    files = [load_file(tmp_path / library.__name__ / "adapter_model.safetensors") for library in LIBRARIES]
    assert files[0].keys() == files[1].keys() == {"prompt_embeddings"}
    for folder in ("peft", "peft_fast"):
        model = peft_fast.PeftModel.from_pretrained(base("llama", "CAUSAL_LM"), tmp_path / folder)
        assert not any(p.requires_grad for p in model.prompt_encoder.parameters())
        torch.testing.assert_close(model.prompt_encoder["default"].weight, results[0][2])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["plain", "template", "cut", "cut template"])
def test_starting_from_a_text(kind, how):
    template = {"chat_template": TEMPLATE} if "template" in how else {}
    results = []
    for library in LIBRARIES:
        model = cartridge(library, kind)
        options = {"max_length": 6} if "cut" in how else {}
        returned = library.initialize_kv_prefix_from_text(model, tokenizer(**template), text=TEXT, **options)
        assert torch.equal(returned, model.prompt_encoder["default"].weight)
        results.append((returned, model.eval()(**inputs_of("CAUSAL_LM")).logits))
        with pytest.raises(ValueError, match="at least"):
            library.initialize_kv_prefix_from_text(model, tokenizer(**template), text=TEXT, max_length=3)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_prefix_of_a_text_stands_for_it():
    """The model goes on after it as after the text itself."""
    model = cartridge(peft_fast, num_frozen_tokens=1).eval()
    ids = tokenizer()(TEXT, return_tensors="pt")["input_ids"][:, : N + 3]
    peft_fast.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT)
    with torch.no_grad():
        expected = base("llama", "CAUSAL_LM").eval()(input_ids=ids).logits[:, N:]
        torch.testing.assert_close(model(input_ids=ids[:, N:]).logits, expected, rtol=1e-4, atol=1e-5)


def test_prefix_tuning_starts_so_too():
    outputs = []
    for library in LIBRARIES:
        model = prompted(library, "prefix", "llama", "CAUSAL_LM")
        library.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT)
        outputs.append(model.eval()(**inputs_of("CAUSAL_LM")).logits)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def states(layers=2, heads=2, tokens=6, dim=3, batch=1):
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(layers, 2, batch, heads, tokens, dim, generator=generator)
    return [(keys, values) for keys, values in made]


def test_caches():
    expected = peft.prompt_embeddings_from_past_key_values(states(), num_virtual_tokens=4)
    cache = DynamicCache()
    for index, (keys, values) in enumerate(states()):
        cache.update(keys, values, index)
    for given in (states(), tuple(states()), cache, EncoderDecoderCache(cache, DynamicCache())):
        made = peft_fast.prompt_embeddings_from_past_key_values(given, num_virtual_tokens=4)
        assert torch.equal(made, expected)


def uneven(part, shape):
    cache = states()
    pair = list(cache[1])
    pair[part] = torch.randn(shape)
    return [cache[0], tuple(pair)]


@pytest.mark.parametrize(
    ("cache", "error"),
    [
        ([], "got one without layers"),
        (states(batch=2), "must be of one sample"),
        (states(tokens=3), "at least num_virtual_tokens=4 tokens, got 3"),
        (uneven(0, (1, 3, 6, 3)), "2 heads of 3, got .* in layer 1"),
        (uneven(1, (1, 2, 6, 4)), "2 heads of 3, got .* in layer 1"),
        (uneven(1, (1, 2, 2, 3)), "got 2 in layer 1"),
        (7, "must be a cache of transformers"),
    ],
)
def test_caches_that_do_not_fit(cache, error):
    with pytest.raises((ValueError, TypeError), match=error):
        peft_fast.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4)


def test_adapters_that_cannot_start_so(untouched):
    for method, error in (("mlp", "what CARTRIDGE and PREFIX_TUNING"), ("projected", "prefix_projection=True")):
        model = prompted(peft_fast, method, "llama", "CAUSAL_LM")
        with untouched(model), pytest.raises(ValueError, match=error):
            peft_fast.initialize_kv_prefix_from_past_key_values(model, past_key_values=states())
    with pytest.raises(ValueError, match="an MLP makes the keys"):
        model.prompt_encoder["default"].load_prompt_embeddings(torch.zeros(2, 2))
    model = cartridge(peft_fast)
    with untouched(model), pytest.raises(ValueError, match="must be a tensor"):
        peft_fast.initialize_kv_prefix_from_past_key_values(model, past_key_values=states(dim=5))
    with untouched(model), pytest.raises(ValueError, match="'no' does not exist"):
        peft_fast.initialize_kv_prefix_from_past_key_values(model, adapter_name="no", past_key_values=states())


@pytest.mark.parametrize("safe", [True, False])
def test_several_made_one(safe, tmp_path):
    for name, frozen in (("a", 1), ("b", 3)):
        cartridge(peft_fast, num_frozen_tokens=frozen).save_pretrained(tmp_path / name)
    outputs = []
    for library in LIBRARIES:
        output = tmp_path / library.__name__
        library.compose_cartridge_adapters(
            [tmp_path / "a", tmp_path / "b"], output_path=output, safe_serialization=safe
        )
        for loading in LIBRARIES:
            model = loading.PeftModel.from_pretrained(base("llama", "CAUSAL_LM"), output).eval()
            assert model.peft_config["default"].num_virtual_tokens == 2 * N
            assert model.peft_config["default"].num_frozen_tokens == 1
            outputs.append(model(**inputs_of("CAUSAL_LM")).logits)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_made_one(tmp_path):
    cartridge(peft_fast).save_pretrained(tmp_path / "a")
    cartridge(peft_fast, "gpt2").save_pretrained(tmp_path / "b")
    prompted(peft_fast, "prefix", "llama", "CAUSAL_LM").save_pretrained(tmp_path / "c")
    for names, error in ((["a"], "two adapters or more"), (["a", "b"], "have the same"), (["a", "c"], "a CARTRIDGE")):
        with pytest.raises(ValueError, match=error):
            peft_fast.compose_cartridge_adapters([tmp_path / n for n in names], output_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpointing_is_refused():
    for library in LIBRARIES:
        model = base("llama", "CAUSAL_LM")
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="gradient checkpointing"):
            library.get_peft_model(model, config_of(library, "cartridge", "CAUSAL_LM"))


@pytest.mark.parametrize("options", [{"num_frozen_tokens": -1}, {"num_frozen_tokens": N + 1}])
def test_options_that_cannot_be(options):
    for library in LIBRARIES:
        with pytest.raises(ValueError, match="num_frozen_tokens"):
            config_of(library, "cartridge", "CAUSAL_LM", **options)


def test_a_file_of_another_size(tmp_path, untouched):
    cartridge(peft_fast).save_pretrained(tmp_path)
    config = peft_fast.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=N + 1)
    model = peft_fast.get_peft_model(base("llama", "CAUSAL_LM"), config)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    with untouched(model), pytest.raises(ValueError, match="do not fit"):
        peft_fast.set_peft_model_state_dict(model, tensors)
