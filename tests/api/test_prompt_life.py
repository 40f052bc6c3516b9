"""The life of learned prompts: several of them, switching, deleting, checkpointing, copies, what is refused."""

import copy
import pickle
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from prompt_models import N, base, config_of, inputs_of, prompted, shaken

import peft_fast
from peft_fast import PeftModel
from peft_fast.functional import set_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def answer(model, task, method=""):
    with torch.no_grad():
        return model.eval()(**inputs_of(task, method)).logits


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("library", [peft_fast, peft], ids=["ours", "pefts"])
@pytest.mark.parametrize("method", ["prefix", "lstm"])
@pytest.mark.parametrize(("task", "kind"), [("CAUSAL_LM", "llama"), ("SEQ_CLS", "bert")])
def test_what_a_model_has(library, method, task, kind):
    model = prompted(library, method, kind, task)
    assert model._is_prompt_learning
    assert model.base_model is model.get_base_model()
    assert isinstance(model.base_model, transformers.PreTrainedModel)
    assert model.peft_type == "PREFIX_TUNING" or method == "lstm"
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert model.active_adapter == "default"
    assert model.active_peft_config is model.peft_config["default"]
    assert model.has_active_enabled_adapter
    assert isinstance(model.prompt_encoder, torch.nn.ModuleDict)
    assert torch.equal(model.prompt_tokens["default"], torch.arange(N))
    assert model.word_embeddings is model.get_input_embeddings()
    assert model.transformer_backbone_name == ("bert" if kind == "bert" else "model")
    assert (model.modules_to_save == {"classifier", "score"}) == (task == "SEQ_CLS")
    assert model.get_prompt_embedding_to_save("default").shape == (
        N,
        2 * 2 * 16 if kind == "llama" else 2 * 2 * 32,
    ) or (method == "lstm")
    prompt = model.get_prompt(3)
    if method == "prefix":
        assert prompt.get_seq_length() == N
        assert prompt.layers[1].keys.shape == (3, 2 if kind == "llama" else 4, N, 8)
    else:
        assert prompt.shape == (3, N, 32)
    names = set(model.state_dict())
    assert {"word_embeddings.weight", "prompt_encoder.default.embedding.weight"} <= names


class TestSeveral:
    def two(self, task="SEQ_CLS", kind="bert"):
        model = prompted(peft_fast, "mlp", kind, task)
        model.add_adapter("other", config_of(peft_fast, "mlp", task, encoder_hidden_size=6))
        return shaken(model, 2, "other")

    def test_a_new_one_is_neither_active_nor_trainable(self):
        model = self.two()
        assert model.active_adapters == ["default"]
        assert all(".default." in name for name in trainable(model))
        model.set_adapter("other")
        assert model.active_adapters == ["other"]
        assert all(".other." in name for name in trainable(model))
        model.set_adapter("default", inference_mode=True)
        assert trainable(model) == set()

    def test_each_has_its_own_head(self):
        model = self.two()
        model.set_adapter("other")
        shaken(model, 2, "other")
        with torch.no_grad():
            model.classifier.modules_to_save["other"].weight.mul_(2)
        second = answer(model, "SEQ_CLS")
        model.set_adapter("default")
        first = answer(model, "SEQ_CLS")
        assert not torch.allclose(first, second)
        assert model.classifier.active_adapters == ["default"]
        model.delete_adapter("other")
        torch.testing.assert_close(answer(model, "SEQ_CLS"), first)
        assert set(model.prompt_encoder) == set(model.prompt_tokens) == set(model.peft_config) == {"default"}
        assert not any(".other." in name for name in model.state_dict())

    def test_deleting_the_active_one(self):
        model = self.two()
        model.set_adapter("other")
        with pytest.warns(UserWarning, match="'default' is active now"):
            model.delete_adapter("other")
        assert model.active_adapters == ["default"]
        assert trainable(model)
        model.delete_adapter("default")
        assert model.active_adapters == []
        assert not model.has_active_enabled_adapter
        with pytest.raises(ValueError, match="no adapter is active"):
            model(**inputs_of("SEQ_CLS"))
        with pytest.raises(ValueError, match="no adapter is active"):
            model.get_prompt(1)

    def test_requires_grad(self):
        """peft refuses this for prompts."""
        model = self.two()
        model.set_requires_grad("default", False)
        assert trainable(model) == set()
        model.set_requires_grad(["other"])
        assert {name.split(".")[0] for name in trainable(model)} == {"base_model", "prompt_encoder"}
        with pytest.raises(ValueError, match="'no' does not exist"):
            model.set_requires_grad("no")

    def test_unknown_and_taken_names(self, untouched):
        model = self.two()
        with untouched(model):
            for call in (model.set_adapter, model.delete_adapter, model.get_prompt_embedding_to_save):
                with pytest.raises(ValueError, match="'no' does not exist"):
                    call("no")
            for name in ("other", "a.b", ""):
                with pytest.raises(ValueError, match=r"exists already|must be a string without"):
                    model.add_adapter(name, config_of(peft_fast, "mlp", "SEQ_CLS"))
            with pytest.raises(ValueError, match="one prompt can be active"):
                set_adapter(model, ["default", "other"])

    def test_other_methods_are_refused(self, untouched):
        model = self.two()
        for config in (config_of(peft_fast, "prompt", "SEQ_CLS"), peft_fast.LoraConfig(task_type="SEQ_CLS")):
            given = copy.deepcopy(config)
            with untouched(model), pytest.raises(ValueError, match="must be of one type: it has P_TUNING"):
                model.add_adapter("third", config)
            assert config == given


class TestDisabling:
    @pytest.mark.parametrize("method", ["prefix", "prompt", "cpt"])
    def test_the_model_is_the_base_model(self, method):
        model = prompted(peft_fast, method, "llama", "CAUSAL_LM")
        expected, with_prompt = answer(base("llama", "CAUSAL_LM"), "CAUSAL_LM"), answer(model, "CAUSAL_LM")
        with model.disable_adapter():
            assert not model.has_active_enabled_adapter
            torch.testing.assert_close(answer(model, "CAUSAL_LM"), expected)
            with model.disable_adapter():
                torch.testing.assert_close(answer(model, "CAUSAL_LM"), expected)
            torch.testing.assert_close(answer(model, "CAUSAL_LM"), expected)
        torch.testing.assert_close(answer(model, "CAUSAL_LM"), with_prompt)

    def test_with_its_own_head(self):
        """peft fails for models that do not generate, and would keep the trained head for others."""
        model = prompted(peft_fast, "prefix", "bert", "SEQ_CLS")
        with torch.no_grad():
            model.classifier.modules_to_save["default"].weight.mul_(5)
        names, before = trainable(model), answer(model, "SEQ_CLS")
        with model.disable_adapter():
            torch.testing.assert_close(answer(model, "SEQ_CLS"), answer(base("bert", "SEQ_CLS"), "SEQ_CLS"))
        assert trainable(model) == names
        torch.testing.assert_close(answer(model, "SEQ_CLS"), before)
        theirs = prompted(peft, "prefix", "bert", "SEQ_CLS")
        with pytest.raises((AttributeError, UnboundLocalError)), theirs.disable_adapter():
            pass

    def test_after_an_error(self):
        model = prompted(peft_fast, "prompt", "gpt2", "CAUSAL_LM")
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        assert model.has_active_enabled_adapter

    def test_one_that_is_added_within(self):
        model = prompted(peft_fast, "prompt", "bert", "SEQ_CLS")
        expected = answer(base("bert", "SEQ_CLS"), "SEQ_CLS")
        with model.disable_adapter():
            model.add_adapter("other", config_of(peft_fast, "prompt", "SEQ_CLS", modules_to_save=["pooler"]))
            model.set_adapter("other")
            with torch.no_grad():
                model.bert.pooler.modules_to_save["other"].dense.weight.add_(1)
            torch.testing.assert_close(answer(model, "SEQ_CLS"), expected)
        assert not torch.allclose(answer(model, "SEQ_CLS"), expected)


class TestCheckpointing:
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_prompts_get_the_same_gradients(self, kind, reentrant):
        gradients = []
        for checkpointed in (False, True):
            model = base(kind, "CAUSAL_LM")
            if checkpointed:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            torch.manual_seed(11)
            model = shaken(peft_fast.get_peft_model(model, config_of(peft_fast, "mlp", "CAUSAL_LM"))).train()
            model(**inputs_of("CAUSAL_LM"), use_cache=False).loss.backward()
            gradients.append([p.grad for p in model.prompt_encoder.parameters()])
        torch.testing.assert_close(*gradients)

    def test_a_prefix_is_refused(self, untouched):
        model = base("gpt2", "CAUSAL_LM").eval()
        model.gradient_checkpointing_enable()
        with (
            untouched(model),
            pytest.raises(ValueError, match="does not work with gradient checkpointing"),
        ):
            peft_fast.get_peft_model(model, config_of(peft_fast, "prefix", "CAUSAL_LM"))

    @pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
    def test_a_prefix_is_never_quietly_left_out(self, kind):
        """Switched on later. peft's models fail in the middle of a forward."""
        task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
        model = prompted(peft_fast, "prefix", kind, task).train()
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient"):
            model(**inputs_of(task))
        model.gradient_checkpointing_disable()
        model(**inputs_of(task)).loss.backward()
        assert model.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


class TestCopies:
    @pytest.mark.parametrize("method", ["prefix", "lstm", "cpt"])
    def test_deepcopy_and_pickle(self, method):
        model = prompted(peft_fast, method, "gpt2", "CAUSAL_LM")
        expected = answer(model, "CAUSAL_LM")
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(answer(twin, "CAUSAL_LM"), expected)
            shaken(twin, 9)
            assert not torch.allclose(answer(twin, "CAUSAL_LM"), expected)
            twin.train()(**inputs_of("CAUSAL_LM")).loss.backward()
            assert all(p.grad is None for p in model.parameters())
            assert twin.word_embeddings is twin.get_input_embeddings()
        torch.testing.assert_close(answer(model, "CAUSAL_LM"), expected)

    def test_training_lowers_the_loss(self):
        for method in ("prefix", "projected", "prompt", "mlp", "lstm", "tasks", "cpt"):
            model = prompted(peft_fast, method, "llama", "CAUSAL_LM").train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
            frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
            losses = []
            for _ in range(8):
                optimizer.zero_grad()
                loss = model(**inputs_of("CAUSAL_LM", method)).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert losses[-1] < losses[0] - 0.01, method
            own = dict(model.named_parameters())
            assert all(torch.equal(own[n], value) for n, value in frozen.items()), method


class TestModulesToSave:
    def test_one_of_the_users(self):
        options = {"modules_to_save": ["lm_head"]}
        results = []
        for library in (peft_fast, peft):
            model = prompted(library, "prompt", "llama", "CAUSAL_LM", **options)
            model.train()(**inputs_of("CAUSAL_LM")).loss.backward()
            results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*results)
        assert "base_model.lm_head.modules_to_save.default.weight" in results[0]

    def test_one_that_is_not_there(self, untouched):
        model, config = base("gpt2", "CAUSAL_LM"), config_of(peft_fast, "prompt", "CAUSAL_LM", modules_to_save=["zzz"])
        given = copy.deepcopy(config)
        with untouched(model), pytest.raises(ValueError, match="not found"):
            peft_fast.get_peft_model(model, config)
        assert config == given


class TestRefusals:
    def test_what_has_no_meaning_for_prompts(self):
        for library in (peft_fast, peft):
            model = prompted(library, "prefix", "bert", "SEQ_CLS")
            for name in ("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "add_weighted_adapter"):
                with pytest.raises(AttributeError, match=f"'BertForSequenceClassification' object has no .*{name}"):
                    getattr(model, name)
            for call in (model.get_layer_status, model.get_model_status):
                with pytest.raises(TypeError, match="get_layer_status|get_model_status"):
                    call()
        with pytest.raises(AttributeError, match="prompt_encoder"):
            peft_fast.get_peft_model(base("gpt2", "CAUSAL_LM"), peft_fast.LoraConfig()).get_prompt(1)

    def test_models_with_other_adapters(self, untouched):
        model = peft_fast.get_peft_model(base("llama", "CAUSAL_LM"), peft_fast.LoraConfig(task_type="CAUSAL_LM"))
        for inner in (model, model.get_base_model()):
            with (
                untouched(model),
                pytest.raises(ValueError, match="cannot be mixed with adapters in"),
            ):
                peft_fast.PeftModelForCausalLM(inner, config_of(peft_fast, "prompt", "CAUSAL_LM"))

    def test_injection(self, untouched):
        model = base("llama", "CAUSAL_LM")
        with untouched(model), pytest.raises(ValueError, match="puts nothing into a model's layers"):
            peft_fast.inject_adapter_in_model(config_of(peft_fast, "prompt", "CAUSAL_LM"), model)

    def test_without_a_task(self, untouched):
        model = base("llama", "CAUSAL_LM")
        for make in (peft_fast.get_peft_model, PeftModel):
            with untouched(model), pytest.raises(ValueError, match="prompt learning needs task_type"):
                make(model, config_of(peft_fast, "prompt", None))
        wrapped = peft_fast.PeftModelForCausalLM(model, config_of(peft_fast, "prompt", None))
        assert torch.isfinite(wrapped(**inputs_of("CAUSAL_LM")).loss)

    def test_models_without_tokens(self, untouched):
        model = torch.nn.Sequential(torch.nn.Linear(3, 3))
        with untouched(model), pytest.raises(ValueError, match="prompts are for models of tokens"):
            peft_fast.PeftModelForFeatureExtraction(model, config_of(peft_fast, "prompt", "FEATURE_EXTRACTION"))

    def test_a_prefix_for_a_model_without_a_cache(self, untouched):
        config = transformers.DistilBertConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
        model = transformers.DistilBertForSequenceClassification(config)
        with untouched(model), pytest.raises(ValueError, match="does not support past_key_values"):
            peft_fast.get_peft_model(model, config_of(peft_fast, "prefix", "SEQ_CLS"))

    def test_arguments_of_a_forward(self):
        model = prompted(peft_fast, "prefix", "gpt2", "CAUSAL_LM")
        given = inputs_of("CAUSAL_LM")
        with pytest.raises(ValueError, match="past_key_values cannot be given"):
            model(**given, past_key_values=transformers.DynamicCache())
        with pytest.raises(ValueError, match="task_ids are for MULTITASK_PROMPT_TUNING"):
            model(**given, task_ids=torch.zeros(2, dtype=torch.long))
        with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
            model(labels=given["labels"])
        model = prompted(peft_fast, "tasks", "gpt2", "CAUSAL_LM")
        for wrong, words in ((None, "got None"), ([0], r"must be \[2\]"), ([0, 3], "from 0 to 2"), ([-1, 0], "from 0")):
            with pytest.raises(ValueError, match=words):
                model(**given, task_ids=None if wrong is None else torch.tensor(wrong))
