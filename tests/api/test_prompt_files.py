"""Files of learned prompts: peft's and ours load in each other, and broken ones change nothing."""

import dataclasses
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from prompt_models import METHODS, N, base, config_of, inputs_of, prompted

import peft_fast

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*MultitaskPromptEmbedding.*:UserWarning"),
]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CASES = [("CAUSAL_LM", "llama", method) for method in (*METHODS, "cpt")]
CASES += [("SEQ_CLS", "bert", method) for method in ("projected", "prompt", "tasks")]
CASES += [("SEQ_2_SEQ_LM", "t5", method) for method in ("prefix", "prompt", "mlp", "tasks")]
CASES += [("TOKEN_CLS", "bert", "prefix"), ("QUESTION_ANS", "bert", "lstm"), ("FEATURE_EXTRACTION", "gpt2", "prefix")]


def answer(model, task, method):
    model.eval()
    given = inputs_of(task, method)
    given = {key: value for key, value in given.items() if not key.endswith("positions")}
    if not (task == "SEQ_2_SEQ_LM" and method == "tasks"):
        given.pop("labels", None)
    if task == "SEQ_2_SEQ_LM" and "labels" not in given:
        given["decoder_input_ids"] = inputs_of(task)["labels"]
    with torch.no_grad():
        outputs = model(**given)
    return outputs.get("logits", outputs[0])


def load(library, folder, kind, task, **options):
    return library.PeftModel.from_pretrained(base(kind, task), folder, **options)


@pytest.mark.parametrize(("task", "kind", "method"), CASES)
def test_both_ways(task, kind, method, tmp_path):
    models = {library: prompted(library, method, kind, task) for library in (peft_fast, peft)}
    for library, model in models.items():
        if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.data.mul_(3).add_(0.1)
        model.eval().save_pretrained(tmp_path / library.__name__)
    files = [load_file(tmp_path / library.__name__ / WEIGHTS) for library in models]
    assert files[0].keys() == files[1].keys()
    torch.testing.assert_close(files[0], files[1])
    texts = [json.loads((tmp_path / library.__name__ / CONFIG).read_text()) for library in models]
    for text in texts:
        names = text["modules_to_save"]
        text["modules_to_save"] = names and sorted(set(names))  # peft has the head's twice
    assert texts[0] == texts[1]
    expected = answer(models[peft_fast], task, method)
    for saved in models:
        for loading in models:
            model = load(loading, tmp_path / saved.__name__, kind, task)
            torch.testing.assert_close(answer(model, task, method), expected, msg=f"{saved} in {loading}")


@pytest.mark.parametrize(("task", "kind"), [("CAUSAL_LM", "gpt2"), ("SEQ_CLS", "bert")])
def test_what_is_loaded_is_frozen(task, kind, tmp_path):
    prompted(peft_fast, "projected", kind, task).save_pretrained(tmp_path)
    model = load(peft_fast, tmp_path, kind, task)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model.peft_config["default"].inference_mode
    encoder = model.prompt_encoder["default"]
    assert list(dict(encoder.named_parameters())) == ["embedding.weight"]
    torch.testing.assert_close(encoder.embedding.weight.data, load_file(tmp_path / WEIGHTS)["prompt_embeddings"])


@pytest.mark.parametrize("method", ["lstm", "projected", "cpt", "tasks", "prompt"])
def test_saving_what_was_loaded_gives_the_same_file(method, tmp_path):
    prompted(peft_fast, method, "gpt2", "CAUSAL_LM").save_pretrained(tmp_path / "one")
    load(peft_fast, tmp_path / "one", "gpt2", "CAUSAL_LM").save_pretrained(tmp_path / "two")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_dropout_is_not_in_the_file():
    """peft's file of a model in training has it, another one each time."""
    model = prompted(peft_fast, "lstm", "gpt2", "CAUSAL_LM", encoder_num_layers=2, encoder_dropout=0.5).train()
    found = model.get_prompt_embedding_to_save("default")
    assert torch.equal(found, model.get_prompt_embedding_to_save("default"))
    assert model.prompt_encoder["default"].training
    torch.testing.assert_close(found, model.eval().get_prompt(1)[0].detach())


@pytest.mark.parametrize("library", [peft_fast, peft], ids=["ours", "pefts"])
def test_a_second_adapter(library, tmp_path):
    """Loaded with load_adapter: not active, until it is set; each has a folder."""
    model = prompted(peft_fast, "mlp", "bert", "SEQ_CLS")
    other = prompted(library, "mlp", "bert", "SEQ_CLS", encoder_hidden_size=6)
    other.eval().save_pretrained(tmp_path / "other")
    expected, first = answer(other, "SEQ_CLS", "mlp"), answer(model, "SEQ_CLS", "mlp")
    result = model.load_adapter(tmp_path / "other", "other")
    assert result.missing_keys == result.unexpected_keys == []
    assert model.active_adapters == ["default"]
    torch.testing.assert_close(answer(model, "SEQ_CLS", "mlp"), first)
    model.set_adapter("other")
    torch.testing.assert_close(answer(model, "SEQ_CLS", "mlp"), expected)
    model.save_pretrained(tmp_path / "both")
    for folder, values in ((tmp_path / "both", first), (tmp_path / "both" / "other", expected)):
        torch.testing.assert_close(answer(load(peft_fast, folder, "bert", "SEQ_CLS"), "SEQ_CLS", "mlp"), values)
        torch.testing.assert_close(answer(load(peft, folder, "bert", "SEQ_CLS"), "SEQ_CLS", "mlp"), values)


def test_names_that_a_model_maps_are_for_adapters_in_layers(tmp_path):
    prompted(peft_fast, "prompt", "bert", "SEQ_CLS").save_pretrained(tmp_path)
    for library in (peft_fast, peft):
        model = base("bert", "SEQ_CLS")
        model._checkpoint_conversion_mapping = {"^classifier": "elsewhere"}
        found = library.PeftModel.from_pretrained(model, tmp_path)
        torch.testing.assert_close(
            found.classifier.modules_to_save["default"].weight,
            load_file(tmp_path / WEIGHTS)["base_model.classifier.weight"],
        )


def test_files_of_torch(tmp_path):
    model = prompted(peft_fast, "prompt", "gpt2", "CAUSAL_LM")
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert [path.name for path in tmp_path.glob("adapter_model*")] == ["adapter_model.bin"]
    found = load(peft_fast, tmp_path, "gpt2", "CAUSAL_LM")
    torch.testing.assert_close(answer(found, "CAUSAL_LM", ""), answer(model, "CAUSAL_LM", ""))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_auto_classes(task, tmp_path):
    kind = {"CAUSAL_LM": "gpt2", "SEQ_CLS": "bert", "SEQ_2_SEQ_LM": "t5"}[task]
    model = base(kind, task)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    model = peft_fast.get_peft_model(model, config_of(peft_fast, "prefix", task))
    model.save_pretrained(tmp_path / "adapter")
    name = type(model).__name__.replace("PeftModel", "AutoPeftModel")
    found = getattr(peft_fast, name).from_pretrained(tmp_path / "adapter")
    assert type(found) is type(model)
    torch.testing.assert_close(answer(found, task, "prefix"), answer(model, task, "prefix"))


class TestStateDicts:
    def test_a_prompt_without_an_encoder_can_be_trained_further(self, tmp_path):
        for method in ("prompt", "prefix", "tasks"):
            saved = prompted(peft_fast, method, "llama", "CAUSAL_LM")
            tensors = peft_fast.get_peft_model_state_dict(saved)
            model = peft_fast.get_peft_model(base("llama", "CAUSAL_LM"), config_of(peft_fast, method, "CAUSAL_LM"))
            result = peft_fast.set_peft_model_state_dict(model, tensors)
            assert result.missing_keys == result.unexpected_keys == []
            torch.testing.assert_close(answer(model, "CAUSAL_LM", method), answer(saved, "CAUSAL_LM", method))
            assert all(p.requires_grad for p in model.prompt_encoder.parameters())

    @pytest.mark.parametrize("method", ["projected", "mlp", "lstm", "cpt"])
    def test_one_with_an_encoder_cannot(self, method, untouched):
        """peft writes what the encoder put out into what it takes, where the sizes fit, as those of "mlp" do."""
        model = prompted(peft_fast, method, "llama", "CAUSAL_LM")
        tensors = peft_fast.get_peft_model_state_dict(model)
        with untouched(model), pytest.raises(ValueError, match="has the prompt that an encoder put out"):
            peft_fast.set_peft_model_state_dict(model, tensors)

    @pytest.mark.parametrize("method", ["projected", "mlp", "lstm", "cpt"])
    def test_load_adapter_takes_the_encoder_out_to_use_the_prompt(self, method, tmp_path, untouched):
        """As Trainer does to load the best model; for training on, which peft then does with another prompt, an error.
        A file that is none leaves everything as it was."""
        best = prompted(peft_fast, method, "llama", "CAUSAL_LM")
        best.save_pretrained(tmp_path / "best")
        expected = answer(best, "CAUSAL_LM", method)
        model = prompted(peft_fast, method, "llama", "CAUSAL_LM")
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter += 0.1
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / CONFIG).write_text((tmp_path / "best" / CONFIG).read_text())
        save_file({"prompt_embeddings": torch.zeros(3, 3)}, tmp_path / "broken" / WEIGHTS)
        with untouched(model):
            with pytest.raises(ValueError, match="prompt_embeddings"):
                model.load_adapter(tmp_path / "broken", "default")
            with pytest.raises(ValueError, match="has the prompt that an encoder put out"):
                model.load_adapter(tmp_path / "best", "default", is_trainable=True)
        with pytest.warns(UserWarning, match="makes room for the prompt"):
            model.load_adapter(tmp_path / "best", "default")
        torch.testing.assert_close(answer(model, "CAUSAL_LM", method), expected)
        assert not any(p.requires_grad for p in model.prompt_encoder.parameters())
        model.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(*(load_file(tmp_path / name / WEIGHTS) for name in ("best", "again")))

    def test_the_base_models(self):
        model = prompted(peft_fast, "prefix", "bert", "SEQ_CLS")
        plain = base("bert", "SEQ_CLS").state_dict()
        found = peft_fast.get_base_model_state_dict(model)
        assert found.keys() == plain.keys()
        result = peft_fast.set_base_model_state_dict(model, {key: value + 1 for key, value in plain.items()})
        assert result.missing_keys == result.unexpected_keys == []
        assert torch.equal(model.bert.pooler.dense.weight, plain["bert.pooler.dense.weight"] + 1)

    def test_embeddings_too(self, tmp_path):
        model = prompted(peft_fast, "prompt", "gpt2", "CAUSAL_LM")
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        keys = set(load_file(tmp_path / WEIGHTS))
        assert keys == {"prompt_embeddings", "base_model.transformer.wte.weight", "base_model.lm_head.weight"}
        with torch.no_grad():
            model.word_embeddings.weight.add_(1)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        found = load(peft_fast, tmp_path, "gpt2", "CAUSAL_LM")
        torch.testing.assert_close(found.word_embeddings.weight, model.word_embeddings.weight)
        found = load(peft, tmp_path, "gpt2", "CAUSAL_LM")
        torch.testing.assert_close(found.word_embeddings.weight, model.word_embeddings.weight)


def changed_config(folder, **values):
    text = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**text, **values}))


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        ("prompt", {"num_virtual_tokens": 10**12}, "prompt_embeddings are"),
        ("prompt", {"token_dim": 10**12}, "prompt_embeddings are"),
        ("prompt", {"num_transformer_submodules": 7}, "num_transformer_submodules must be"),
        ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens must be a positive integer"),
        ("prompt", {"num_virtual_tokens": True}, "num_virtual_tokens must be a positive integer"),
        ("prompt", {"num_virtual_tokens": [5]}, "num_virtual_tokens must be a positive integer"),
        ("prompt", {"prompt_tuning_init": "X"}, "prompt_tuning_init must be one of"),
        ("prefix", {"num_layers": 10**9}, "prompt_embeddings are"),
        ("prefix", {"num_layers": 4, "token_dim": 16, "num_attention_heads": 2}, "num_layers must be 2"),
        ("prefix", {"num_attention_heads": 3}, "token_dim must be a multiple"),
        ("tasks", {"num_ranks": 10**12}, "must have prefix_task_cols"),
        ("tasks", {"num_tasks": 10**12}, "must have prefix_task_cols"),
        ("mlp", {"encoder_hidden_size": -1}, "encoder_hidden_size must be a positive integer"),
        ("cpt", {"cpt_token_ids": [1]}, "must have the same length"),
    ],
)
def test_configs_that_are_wrong(method, values, words, tmp_path, untouched):
    prompted(peft_fast, method, "gpt2", "CAUSAL_LM").save_pretrained(tmp_path)
    changed_config(tmp_path, **values)
    model = base("gpt2", "CAUSAL_LM")
    with untouched(model, tmp_path), pytest.raises((ValueError, TypeError), match=words):
        peft_fast.PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("change", [{}, {"prompt_embeddings": None}, {"x": torch.zeros(2)}, "rows", "columns", "bits"])
def test_tensors_that_are_wrong(change, tmp_path, untouched):
    prompted(peft_fast, "prefix", "bert", "SEQ_CLS").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    prompts = tensors["prompt_embeddings"]
    wrong = {
        "rows": {"prompt_embeddings": prompts[:-1].clone()},
        "columns": {"prompt_embeddings": prompts[:, :-1].clone()},
        "bits": {"prompt_embeddings": prompts.view(torch.int32)},
    }
    tensors |= change if isinstance(change, dict) else wrong[change]
    if change == {}:
        del tensors["base_model.classifier.weight"]
    save_file({key: value for key, value in tensors.items() if value is not None}, tmp_path / WEIGHTS)
    model = base("bert", "SEQ_CLS")
    if change == {}:
        with pytest.warns(UserWarning, match="the file lacks weights"):
            peft_fast.PeftModel.from_pretrained(model, tmp_path)
        return
    with untouched(model, tmp_path), pytest.raises(ValueError):
        peft_fast.PeftModel.from_pretrained(model, tmp_path)


def test_another_models_prompt(tmp_path, untouched):
    for method in ("prompt", "prefix"):
        prompted(peft_fast, method, "gpt2", "CAUSAL_LM").save_pretrained(tmp_path)
        model = base("gpt2", "CAUSAL_LM", n_embd=64)
        with untouched(model), pytest.raises(ValueError, match="token_dim"):
            peft_fast.PeftModel.from_pretrained(model, tmp_path)


def test_loading_over_one_of_another_size(tmp_path, untouched):
    prompted(peft_fast, "prompt", "gpt2", "CAUSAL_LM").save_pretrained(tmp_path / "small")
    config = peft_fast.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N + 1)
    model = peft_fast.get_peft_model(base("gpt2", "CAUSAL_LM"), config)
    with untouched(model), pytest.raises(ValueError, match="another number of virtual tokens"):
        model.load_adapter(tmp_path / "small", "default")


CONFIGS = (
    "PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig", "MultitaskPromptTuningConfig", "CPTConfig",
)  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_pefts(name, tmp_path):
    """Their options in order, the defaults, and what is read from a file of either."""
    ours, theirs = (getattr(library, name)(task_type="CAUSAL_LM") for library in (peft_fast, peft))
    assert ours.to_dict().items() >= {key: value for key, value in theirs.to_dict().items() if key != "x"}.items()
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    assert ours.is_prompt_learning
    assert not ours.is_adaption_prompt
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours" / CONFIG).read_text() == (tmp_path / "theirs" / CONFIG).read_text()
    for folder in ("ours", "theirs"):
        assert peft_fast.PeftConfig.from_pretrained(tmp_path / folder) == ours
        assert peft.PeftConfig.from_pretrained(tmp_path / folder) == theirs
