"""Generating after a learned prompt: tokens and scores beside peft's, and without peft where that fails."""

import sys
from pathlib import Path

import peft
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from prompt_models import N, inputs_of, prompted

import peft_fast

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(P|p)osition ids.*:UserWarning"),
]
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 20},
    "no cache": {"use_cache": False},
}
DECODERS = ("gpt2", "llama", "mistral", "gemma2")
PAIRS = ("t5", "bart")
TASK = {**dict.fromkeys(DECODERS, "CAUSAL_LM"), **dict.fromkeys(PAIRS, "SEQ_2_SEQ_LM")}
CASES = [(kind, method) for kind in ("gpt2", "llama", "t5") for method in ("prefix", "prompt", "lstm", "tasks")]
CASES += [(kind, method) for kind in ("mistral", "gemma2", "bart") for method in ("prefix", "prompt")]
CASES += [("gpt2", "cpt")]


def inputs(kind, method, padded=True):
    """Padding is on the left for decoders."""
    given = inputs_of(TASK[kind], method)
    del given["labels"]
    if not padded:
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    if kind in DECODERS:
        given |= {name: given[name].flip(1) for name in ("input_ids", "attention_mask")}
    return given


def generate(model, given, **options):
    torch.manual_seed(5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "output_scores": True, **options}
    result = model.generate(**given, **options, return_dict_in_generate=True)
    return result.sequences, torch.stack(result.scores).nan_to_num(0, 0, 0)


def same(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_as_in_peft(kind, method, way):
    if way == "no cache" and method == "prefix":
        pytest.skip("peft's fails, or has the prefix in the first step only: see the next tests")
    for padded in (True, False):
        given = inputs(kind, method, padded)
        models = [prompted(library, method, kind, TASK[kind]).eval() for library in (peft_fast, peft)]
        same(*(generate(model, given, **WAYS[way]) for model in models))


@pytest.mark.parametrize("kind", DECODERS + PAIRS)
@pytest.mark.parametrize("method", ["prefix", "prompt", "tasks"])
@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_every_cache_gives_the_same(kind, method, options):
    model = prompted(peft_fast, method, kind, TASK[kind]).eval()
    for padded in (True, False):
        given = inputs(kind, method, padded)
        same(generate(model, given, **options), generate(model, given))
        same(generate(model, given, num_beams=2, **options), generate(model, given, num_beams=2))


@pytest.mark.parametrize("method", ["prefix", "projected", "prompt", "tasks", "cpt"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_the_first_token_is_that_of_a_forward(kind, method):
    model = prompted(peft_fast, method, kind, "CAUSAL_LM").eval()
    given = inputs(kind, method, padded=False)
    _, scores = generate(model, given, max_new_tokens=1, min_new_tokens=0)
    torch.testing.assert_close(scores[0].log_softmax(-1), model(**given).logits[:, -1].log_softmax(-1))


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_the_base_model_stays_as_it_is(kind, method, untouched):
    model = prompted(peft_fast, method, kind, TASK[kind]).eval()
    base, given = model.get_base_model(), inputs(kind, method)
    before = dict(vars(base))
    expected = generate(base, given)
    with untouched(base):
        assert not torch.equal(generate(model, given)[1], expected[1])
        with pytest.raises(ValueError, match="nonsense"):
            model.generate(**given, nonsense=1)
    assert dict(vars(base)) == before
    same(generate(base, given), expected)
    with model.disable_adapter():
        same(generate(model, given), expected)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_bf16_autocast(kind, method):
    results = []
    for library in (peft_fast, peft):
        model = prompted(library, method, kind, TASK[kind]).eval()
        with torch.autocast("cpu", torch.bfloat16):
            results.append(generate(model, inputs(kind, method), num_beams=2))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=2e-2)


def test_tokens_as_a_positional_argument():
    for kind in ("gpt2", "t5"):
        for method in ("prefix", "prompt"):
            model = prompted(peft_fast, method, kind, TASK[kind]).eval()
            given = inputs(kind, method, padded=False)
            expected, _ = generate(model, given)
            for tokens in ((given["input_ids"],), ()):
                named = {} if tokens else {"inputs": given["input_ids"]}
                found = model.generate(
                    *tokens, **named, attention_mask=given["attention_mask"], max_new_tokens=6, min_new_tokens=6
                )
                assert torch.equal(found, expected)


def test_embeddings_in_place_of_tokens():
    """peft leaves those of a decoder out."""
    for kind in ("llama", "t5"):
        for method in ("prefix", "prompt"):
            model = prompted(peft_fast, method, kind, TASK[kind]).eval()
            given = inputs(kind, method)
            expected, scores = generate(model, given)
            given["inputs_embeds"] = model.word_embeddings(given.pop("input_ids"))
            found = generate(model, given)
            torch.testing.assert_close(found[1], scores)
            assert torch.equal(found[0][:, -6:], expected[:, -6:])


def test_what_cannot_go_with_a_prompt():
    model = prompted(peft_fast, "prompt", "t5", "SEQ_2_SEQ_LM").eval()
    given = inputs("t5", "prompt")
    with pytest.raises(ValueError, match="input_ids must be given to generate"):
        model.generate(max_new_tokens=2)
    with pytest.warns(UserWarning, match="encoder_outputs are left out"):
        found = model.generate(**given, encoder_outputs=model.base_model.encoder(given["input_ids"]), max_new_tokens=3)
    assert torch.equal(found, model.generate(**given, max_new_tokens=3))
    for kind in ("t5", "gpt2"):
        with pytest.raises(ValueError, match="task_ids are for MULTITASK_PROMPT_TUNING"):
            prompted(peft_fast, "prompt", kind, TASK[kind]).generate(
                **inputs(kind, "prompt"), task_ids=torch.zeros(2, dtype=torch.long)
            )


def test_one_step_at_a_time():
    """prepare_inputs_for_generation is there for others to call."""
    model = prompted(peft_fast, "prompt", "gpt2", "CAUSAL_LM").eval()
    ids = inputs("gpt2", "prompt")["input_ids"]
    first = model.prepare_inputs_for_generation(ids, is_first_iteration=True, use_cache=True)
    assert first["inputs_embeds"].shape == (2, N + 7, 32)
    outputs = model.base_model(**first)
    then = model.prepare_inputs_for_generation(
        torch.cat([ids, ids[:, :1]], 1), next_sequence_length=1, past_key_values=outputs.past_key_values, use_cache=True
    )
    assert then["input_ids"].shape == (2, 1)
    assert "inputs_embeds" not in then
    lora = peft_fast.get_peft_model(model.get_base_model(), peft_fast.LoraConfig(task_type="CAUSAL_LM"))
    assert lora.prepare_inputs_for_generation(ids)["input_ids"].shape == (2, 7)
