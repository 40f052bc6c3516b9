"""What is particular to a method: what prompts start from, prompts of several tasks, CPT's loss and limits."""

import copy
import sys
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from prompt_models import N, base, config_of, inputs_of, prompted

import peft_fast
from peft_fast.tuners import MultitaskPromptTuningConfig
from peft_fast.tuners.cpt.model import cpt_loss

LIBRARIES = (peft_fast, peft)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:for MLP, the argument:UserWarning"),
]


def weights(library, method, kind="llama", task="CAUSAL_LM", **options):
    """Of a new prompt, as it starts."""
    torch.manual_seed(4)
    model = library.get_peft_model(base(kind, task), config_of(library, method, task, **options))
    return model, dict(model.prompt_encoder["default"].named_parameters())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One that is made here, and saved as any on a hub is."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>"], vocab_size=60)
    made.train_from_iterator(["predict whether this review is good or bad and say why in a few words"], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)
    return folder


class TestStarts:
    @pytest.mark.parametrize("text", ["this review is good", "is this good or bad and why in a few words"])
    @pytest.mark.parametrize("method", ["prompt", "tasks"])
    @pytest.mark.parametrize(("kind", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
    def test_a_text(self, text, method, kind, task, tokenizer):
        """Repeated where it is shorter than the prompt, and cut where it is longer."""
        options = {
            "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": str(tokenizer),
        }  # fmt: skip
        (model, ours), (_, theirs) = (weights(library, method, kind, task, **options) for library in LIBRARIES)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
        ids = transformers.AutoTokenizer.from_pretrained(tokenizer)(text)["input_ids"]
        first = model.word_embeddings.weight[ids[:N]]
        assert torch.equal(ours["embedding.weight"][: len(first)], first)

    def test_options_of_the_tokenizer(self, tokenizer, monkeypatch):
        """All but trust_remote_code: a config is not to say that code is run."""
        found, load = [], transformers.AutoTokenizer.from_pretrained

        def loading(name, **options):
            found.append(options)
            return load(name, **options)

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", loading)
        options = {
            "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good", "tokenizer_name_or_path": str(tokenizer),
            "tokenizer_kwargs": {"trust_remote_code": True, "unk_token": "<s>"},
        }  # fmt: skip
        model, ours = weights(peft_fast, "prompt", **copy.deepcopy(options))
        assert torch.equal(ours["embedding.weight"], weights(peft, "prompt", **options)[1]["embedding.weight"])
        assert model.peft_config["default"].tokenizer_kwargs["trust_remote_code"]  # peft takes it out of the config
        assert found == [{"unk_token": "<s>"}] * 2

    def test_another_models_tokenizer(self, tokenizer, untouched):
        model = base("llama", "CAUSAL_LM", vocab_size=5)
        config = config_of(
            peft_fast, "prompt", "CAUSAL_LM", prompt_tuning_init="TEXT", prompt_tuning_init_text="good or bad",
            tokenizer_name_or_path=str(tokenizer),
        )  # fmt: skip
        with untouched(model), pytest.raises(ValueError, match="the model's vocabulary has 5"):
            peft_fast.get_peft_model(model, config)

    def test_sampled_tokens(self):
        model, ours = weights(peft_fast, "vocabulary")
        assert torch.equal(ours["embedding.weight"], weights(peft, "vocabulary")[1]["embedding.weight"])
        rows = model.word_embeddings.weight
        assert all((rows == prompt).all(dim=1).any() for prompt in ours["embedding.weight"])

    @pytest.mark.parametrize("method", ["prefix", "projected"])
    def test_a_prefix_of_zeros(self, method):
        model, ours = weights(peft_fast, method, init_weights="zero")
        theirs = weights(peft, method, init_weights="zero")[1]
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        assert not model.get_prompt_embedding_to_save("default").any()

    @pytest.mark.parametrize("method", ["prefix", "projected", "prompt", "mlp", "lstm", "tasks", "cpt"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_random_numbers_are_pefts(self, method, dtype):
        results = []
        for library in LIBRARIES:
            torch.manual_seed(4)
            model = library.get_peft_model(base("llama", "CAUSAL_LM", dtype), config_of(library, method, "CAUSAL_LM"))
            results.append((dict(model.prompt_encoder.named_parameters()), torch.rand(1)))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)

    def test_inputs_of_a_text_are_left_out_where_a_file_is_loaded(self, tokenizer, tmp_path):
        """The tokenizer and the source file need not be there then; peft looks for the latter."""
        options = {
            "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good", "tokenizer_name_or_path": str(tokenizer),
        }  # fmt: skip
        model, _ = weights(peft_fast, "prompt", **options)
        model.peft_config["default"].tokenizer_name_or_path = "/nowhere"
        model.save_pretrained(tmp_path)
        found = peft_fast.PeftModel.from_pretrained(base("llama", "CAUSAL_LM"), tmp_path)
        torch.testing.assert_close(found.get_prompt(1), model.get_prompt(1))


class TestTasks:
    def source(self, folder, safe=True):
        model = prompted(peft_fast, "tasks", "llama", "CAUSAL_LM")
        model.save_pretrained(folder, safe_serialization=safe)
        return model, str(folder / ("adapter_model.safetensors" if safe else "adapter_model.bin"))

    @pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
    @pytest.mark.parametrize("safe", [True, False])
    def test_starting_from_other_tasks(self, init, safe, tmp_path):
        source, path = self.source(tmp_path, safe)
        tasks = 4 if init == "ONLY_SOURCE_SHARED" else 1
        options = {
            "prompt_tuning_init": init, "prompt_tuning_init_state_dict_path": path, "prompt_tuning_init_task": 2,
            "num_tasks": tasks,
        }  # fmt: skip
        (model, ours), (_, theirs) = (weights(library, "tasks", **options) for library in LIBRARIES)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)
        assert torch.equal(ours["embedding.weight"], source.prompt_encoder["default"].embedding.weight)
        Path(path).rename(tmp_path / "elsewhere")
        model.save_pretrained(tmp_path / "new")
        found = peft_fast.PeftModel.from_pretrained(base("llama", "CAUSAL_LM"), tmp_path / "new")
        ids = torch.zeros(2, dtype=torch.long)
        torch.testing.assert_close(found.get_prompt(2, ids), model.get_prompt(2, ids))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"prompt_tuning_init_state_dict_path": None}, "needs prompt_tuning_init_state_dict_path"),
            ({"num_tasks": 2}, "makes a prompt for one task"),
            ({"prompt_tuning_init_task": 3}, "prompt_tuning_init_task must be from 0 to 2"),
            ({"num_ranks": 3}, "is needed"),
            ({"prompt_tuning_init_state_dict_path": "/nowhere/x.safetensors"}, "cannot be read"),
        ],
    )
    def test_starting_from_what_does_not_fit(self, change, words, tmp_path, untouched):
        _, path = self.source(tmp_path)
        options = {
            "prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": path, "num_tasks": 1,
        }  # fmt: skip
        model = base("llama", "CAUSAL_LM")
        with untouched(model), pytest.raises(ValueError, match=words):
            peft_fast.get_peft_model(model, config_of(peft_fast, "tasks", "CAUSAL_LM", **{**options, **change}))

    def test_a_file_of_something_else(self, tmp_path, untouched):
        prompted(peft_fast, "prompt", "llama", "CAUSAL_LM").save_pretrained(tmp_path)
        config = MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=N, prompt_tuning_init="AVERAGE_SOURCE_TASKS",
            prompt_tuning_init_state_dict_path=str(tmp_path / "adapter_model.safetensors"),
        )  # fmt: skip
        model = base("llama", "CAUSAL_LM")
        with untouched(model), pytest.raises(ValueError, match="not of prompts for several tasks: it lacks"):
            peft_fast.get_peft_model(model, config)

    def test_each_sample_has_its_tasks_prompt(self):
        model = prompted(peft_fast, "tasks", "llama", "CAUSAL_LM").eval()
        both = model.get_prompt(2, torch.tensor([2, 0]))
        for row, task in zip(both, (2, 0)):
            torch.testing.assert_close(row, model.get_prompt(1, torch.tensor([task]))[0])
        assert not torch.allclose(both[0], both[1])
        with pytest.raises(ValueError, match="task_ids"):
            model.get_prompt(2)


class TestEncoders:
    @pytest.mark.parametrize("option", [{"encoder_num_layers": 3}, {"encoder_dropout": 0.1}])
    def test_what_an_mlp_does_not_have(self, option):
        with pytest.warns(UserWarning, match=r"has no effect on the MLP"):
            weights(peft_fast, "mlp", **option)

    def test_an_lstm_of_several_layers(self):
        for options in ({"encoder_num_layers": 3}, {"encoder_num_layers": 2, "encoder_hidden_size": 7}):
            (ours, mine), (theirs, other) = (weights(library, "lstm", **options) for library in LIBRARIES)
            assert mine.keys() == other.keys()
            torch.testing.assert_close(ours.get_prompt(2), theirs.get_prompt(2))


class TestCPT:
    KINDS = (1, 2, 3, 4, 5, 6, 7, 8)

    def options(self, **more):
        ids = list(range(20, 28))
        return {"cpt_token_ids": ids, "cpt_tokens_type_mask": list(self.KINDS), **more}

    @pytest.mark.parametrize("loss", [{}, {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}])
    @pytest.mark.parametrize("masked", [False, True])
    def test_loss_and_gradients(self, loss, masked):
        given = inputs_of("CAUSAL_LM")
        given["labels"] = given["input_ids"].clone()
        if masked:
            given["input_type_mask"] = torch.tensor([[1, 2, 2, 3, 4, 0, 0], [1, 3, 4, 4, 5, 7, 8]])
        results = []
        for library in LIBRARIES:
            mine = {name: value.clone() for name, value in given.items()}
            model = prompted(library, "cpt", "llama", "CAUSAL_LM", **self.options(**loss)).train()
            for _ in range(2):  # the second after a step, which leaves the limits
                model.zero_grad()
                result = model(**mine).loss if library is peft_fast else model(**_fresh(mine)).loss
                result.backward()
                with torch.no_grad():
                    delta = model.prompt_encoder["default"].delta_embedding.weight
                    delta -= 30 * delta.grad
            assert library is peft or all(torch.equal(mine[name], given[name]) for name in given)
            results.append((result, delta.grad, delta, model.get_prompt(1)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
        moved = results[0][1].abs().sum(dim=1) > 0
        assert moved.tolist() == [kind % 4 != 0 for kind in self.KINDS]

    def test_limits(self):
        model = prompted(peft_fast, "cpt", "llama", "CAUSAL_LM", **self.options(opt_projection_epsilon=0.3))
        encoder = model.prompt_encoder["default"]
        with torch.no_grad():
            encoder.delta_embedding.weight.fill_(1)
        start = model.word_embeddings.weight[list(range(20, 28))]
        distances = (model.get_prompt(1)[0] - start).norm(dim=1)
        scale = (32 / 2048) ** 0.5
        expected = torch.tensor([{1: 0.1, 2: 0.3, 3: 0.1, 0: 0}[kind % 4] * scale for kind in self.KINDS])
        torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-6)

    def test_the_loss_by_hand(self):
        logits = torch.randn(1, 6, 5)
        labels = torch.tensor([[0, 1, -100, 3, 4, 2]])
        kinds = torch.tensor([[1, 4, 1, 8, 8, 12]])
        config = peft_fast.CPTConfig(task_type="CAUSAL_LM", opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none", ignore_index=-100)
        expected = (losses * torch.tensor([0.25, 0, 0.5, 0.5, 1])).sum() / 4
        torch.testing.assert_close(cpt_loss(logits, labels, kinds, config), expected)

    def test_the_active_adapters_config_counts(self):
        """peft takes the one called default."""
        model = prompted(peft_fast, "cpt", "gpt2", "CAUSAL_LM", **self.options())
        decay = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.1}
        model.add_adapter("other", config_of(peft_fast, "cpt", "CAUSAL_LM", **self.options(**decay)))
        with torch.no_grad():
            model.prompt_encoder["other"].delta_embedding.weight.copy_(
                model.prompt_encoder["default"].delta_embedding.weight
            )
        first = model.eval()(**inputs_of("CAUSAL_LM")).loss
        model.set_adapter("other")
        assert model(**inputs_of("CAUSAL_LM")).loss < first

    def test_its_file_loads(self, tmp_path):
        model = prompted(peft_fast, "cpt", "gpt2", "CAUSAL_LM", **self.options())
        model.save_pretrained(tmp_path)
        found = peft_fast.PeftModel.from_pretrained(base("gpt2", "CAUSAL_LM"), tmp_path)
        torch.testing.assert_close(found.get_prompt(2), model.get_prompt(2).detach())
        given = inputs_of("CAUSAL_LM")
        torch.testing.assert_close(found(**given).loss, model.eval()(**given).loss.detach())


def _fresh(given):
    """peft writes into input_type_mask."""
    return {name: value.clone() for name, value in given.items()}
