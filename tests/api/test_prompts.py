"""Learned prompts in a forward, beside peft's from the same seed: outputs, losses, gradients, names."""

import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from prompt_models import METHODS, N, base, config_of, inputs_of, prompted

import peft_fast

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(P|p)osition.ids.*:UserWarning"),
]
EVERY = [("SEQ_CLS", "bert"), ("CAUSAL_LM", "llama"), ("SEQ_2_SEQ_LM", "t5"), ("FEATURE_EXTRACTION", "gpt2")]
SOME = [
    ("SEQ_CLS", "roberta"), ("SEQ_CLS", "gpt2"), ("SEQ_CLS", "llama"), ("QUESTION_ANS", "bert"), ("CAUSAL_LM", "gpt2"),
    ("CAUSAL_LM", "mistral"), ("CAUSAL_LM", "gemma2"), ("SEQ_2_SEQ_LM", "bart"), ("FEATURE_EXTRACTION", "bert"),
]  # fmt: skip
CASES = [(task, kind, method) for task, kind in EVERY for method in METHODS]
CASES += [(task, kind, method) for task, kind in SOME for method in ("projected", "lstm")]
CASES += [("TOKEN_CLS", kind, method) for kind in ("bert", "gpt2") for method in ("prefix", "projected")]
CASES += [("CAUSAL_LM", "gpt2", "cpt"), ("SEQ_2_SEQ_LM", "bart", "tasks"), ("SEQ_2_SEQ_LM", "bart", "prefix")]
CASES.remove(("FEATURE_EXTRACTION", "gpt2", "tasks"))  # peft's has no way to be told which task it is


def step(library, method, kind, task, dtype=torch.float32, given=None, **options):
    """(model, outputs, loss) of one forward and backward in training."""
    model = prompted(library, method, kind, task, dtype, **options).train()
    outputs = model(**(inputs_of(task, method) if given is None else given))
    loss = outputs.get("loss")
    if loss is None:
        loss = outputs[0].float().square().mean()
    loss.backward()
    return model, outputs, loss


def logits(outputs):
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [outputs[name] for name in names if name in outputs]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("task", "kind", "method"), CASES)
def test_it_is_what_pefts_is(task, kind, method):
    (ours, outputs, loss), (theirs, expected, their_loss) = (
        step(library, method, kind, task) for library in (peft_fast, peft)
    )
    names = [[(n, p.shape, p.requires_grad) for n, p in model.named_parameters()] for model in (ours, theirs)]
    assert names[0] == names[1]
    torch.testing.assert_close(logits(outputs), logits(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=0)
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys() != set()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)
    assert sum(g.abs().sum() > 0 for g in found.values()) > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert"])
@pytest.mark.parametrize("method", ["prefix", "projected", "prompt", "lstm"])
@pytest.mark.parametrize("how", ["autocast", "model"])
def test_bf16(kind, method, how):
    """Under autocast, and with a base model in bf16; prompts are fp32 in both."""
    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(kind, "CAUSAL_LM")
    results = []
    for library in (peft_fast, peft):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            dtype = torch.float32 if how == "autocast" else torch.bfloat16
            results.append(step(library, method, kind, task, dtype))
    (ours, outputs, loss), (theirs, expected, their_loss) = results
    assert {p.dtype for p in ours.prompt_encoder.parameters()} == {torch.float32}
    assert logits(outputs)[0].dtype == logits(expected)[0].dtype
    torch.testing.assert_close(logits(outputs), logits(expected), rtol=0, atol=2e-2)
    torch.testing.assert_close(loss, their_loss, rtol=5e-3, atol=0)
    found, wanted = gradients(ours), gradients(theirs)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name


@pytest.mark.parametrize("method", ["prompt", "lstm", "tasks"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_labels_of_tokens(method, kind):
    """peft gives the prompt no labels, and fails: the logits are its virtual tokens' too."""
    model, outputs, loss = step(peft_fast, method, kind, "TOKEN_CLS")
    given = inputs_of("TOKEN_CLS", method)
    assert outputs.logits.shape == (2, N + 7, 2)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, N:].flatten(0, 1), given["labels"].flatten())
    torch.testing.assert_close(loss, expected)
    assert all(g.abs().sum() > 0 for g in gradients(model).values())
    with pytest.raises(ValueError, match="batch_size"):
        step(peft, method, kind, "TOKEN_CLS")


class TestPositions:
    def test_those_of_a_prefix_move_on(self):
        model = prompted(peft_fast, "prefix", "gpt2", "CAUSAL_LM").eval()
        given = inputs_of("CAUSAL_LM")
        positions = torch.arange(7).expand(2, -1)
        torch.testing.assert_close(model(**given, position_ids=positions).logits, model(**given).logits)
        theirs = prompted(peft, "prefix", "gpt2", "CAUSAL_LM").eval()
        positions = torch.tensor([[0, 0, 1, 2, 3, 4, 5]]).expand(2, -1)
        torch.testing.assert_close(
            model(**given, position_ids=positions).logits, theirs(**given, position_ids=positions).logits
        )

    def test_others_are_left_out(self):
        model = prompted(peft_fast, "prompt", "gpt2", "CAUSAL_LM").eval()
        given = inputs_of("CAUSAL_LM")
        with pytest.warns(UserWarning, match="position_ids are left out"):
            outputs = model(**given, position_ids=torch.zeros(2, 7, dtype=torch.long))
        torch.testing.assert_close(outputs.logits, model(**given).logits)


class TestTokenTypes:
    @pytest.mark.parametrize("method", ["prefix", "prompt"])
    def test_classifiers_take_them(self, method):
        given = {**inputs_of("SEQ_CLS"), "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)}
        ours, theirs = (prompted(library, method, "bert", "SEQ_CLS").eval() for library in (peft_fast, peft))
        assert not torch.allclose(logits(ours(**given))[0], logits(ours(**inputs_of("SEQ_CLS")))[0])
        torch.testing.assert_close(logits(ours(**given)), logits(theirs(**given)))

    @pytest.mark.parametrize("method", ["prefix", "prompt"])
    @pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
    def test_answering_questions_leaves_them_out_as_peft_does(self, method, name):
        """An adapter that was trained in one library would answer differently in the other."""
        given = {**inputs_of("QUESTION_ANS"), name: torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)}
        ours, theirs = (prompted(library, method, "bert", "QUESTION_ANS").eval() for library in (peft_fast, peft))
        with pytest.warns(UserWarning, match=f"{name} are left out, as in peft"):
            found = logits(ours(**given))
        torch.testing.assert_close(found, logits(theirs(**given)))

    def test_others_do_not(self):
        model = prompted(peft_fast, "prompt", "bert", "FEATURE_EXTRACTION").eval()
        given = inputs_of("FEATURE_EXTRACTION")
        with pytest.warns(UserWarning, match="token_type_ids are left out"):
            outputs = model(**given, token_type_ids=torch.ones(2, 7, dtype=torch.long))
        torch.testing.assert_close(outputs[0], model(**given)[0])


@pytest.mark.parametrize("method", ["prefix", "prompt", "tasks"])
@pytest.mark.parametrize(("task", "kind"), [("CAUSAL_LM", "llama"), ("SEQ_2_SEQ_LM", "t5"), ("SEQ_CLS", "bert")])
def test_embeddings_in_place_of_tokens(method, task, kind):
    model = prompted(peft_fast, method, kind, task).eval()
    given = inputs_of(task, method)
    expected = model(**given).logits
    embeddings = model.word_embeddings(given.pop("input_ids"))
    torch.testing.assert_close(model(**given, inputs_embeds=embeddings).logits, expected)


@pytest.mark.parametrize("method", ["prefix", "prompt", "tasks"])
def test_a_decoders_own_inputs(method):
    """With a mask of their own; for prompts of several tasks peft wants embeddings."""
    given = inputs_of("SEQ_2_SEQ_LM", method)
    labels = given.pop("labels")
    given["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    models = [prompted(library, method, "t5", "SEQ_2_SEQ_LM").eval() for library in (peft_fast, peft)]
    ids = {"decoder_input_ids": labels}
    theirs = {"decoder_inputs_embeds": models[1].word_embeddings(labels)} if method == "tasks" else ids
    torch.testing.assert_close(models[0](**given, **ids).logits, models[1](**given, **theirs).logits)


def test_a_mask_is_not_needed():
    for method in ("prefix", "prompt"):
        model = prompted(peft_fast, method, "llama", "CAUSAL_LM").eval()
        ids = inputs_of("CAUSAL_LM")["input_ids"]
        torch.testing.assert_close(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


def test_outputs_as_a_tuple():
    for method in ("prefix", "prompt", "cpt"):
        model = prompted(peft_fast, method, "gpt2", "CAUSAL_LM").eval()
        given = inputs_of("CAUSAL_LM")
        outputs, expected = model(**given, return_dict=False), model(**given)
        torch.testing.assert_close(outputs[0], expected.loss)
        torch.testing.assert_close(outputs[1], expected.logits)


class TestSizes:
    def test_they_are_found_out_as_in_peft(self):
        for task, kind in (*EVERY, *SOME):
            for method in ("prefix", "projected", "prompt", "lstm"):
                found = [vars(prompted(lib, method, kind, task).peft_config["default"]) for lib in (peft_fast, peft)]
                for name in ("num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"):
                    assert found[0][name] == found[1][name], (kind, method, name)

    def test_word_embeddings_of_another_size_than_the_model(self):
        """peft makes a prompt of the model's size then, and fails."""
        import transformers

        config = transformers.OPTConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
            max_position_embeddings=32, word_embed_proj_dim=16,
        )  # fmt: skip
        model = peft_fast.get_peft_model(
            transformers.OPTForCausalLM(config), config_of(peft_fast, "prompt", "CAUSAL_LM")
        )
        assert model.peft_config["default"].token_dim == 16
        assert torch.isfinite(model(**inputs_of("CAUSAL_LM")).loss)

    def test_heads_that_do_not_divide_the_model(self):
        """T5 says the size of its heads (flan-t5-small: 6 of 64 in 512); peft does not look, and fails."""
        model = peft_fast.get_peft_model(
            base("t5", "SEQ_2_SEQ_LM", d_kv=6), config_of(peft_fast, "prefix", "SEQ_2_SEQ_LM")
        )
        assert model.peft_config["default"].token_dim == 4 * 6
        assert torch.isfinite(model(**inputs_of("SEQ_2_SEQ_LM")).loss)

    def test_a_decoder_of_more_layers_than_the_encoder(self):
        model = peft_fast.get_peft_model(
            base("t5", "SEQ_2_SEQ_LM", num_decoder_layers=4), config_of(peft_fast, "prefix", "SEQ_2_SEQ_LM")
        )
        assert model.peft_config["default"].num_layers == 4
        assert torch.isfinite(model(**inputs_of("SEQ_2_SEQ_LM")).loss)

    @pytest.mark.parametrize("shared", [0, 2])
    def test_layers_that_differ(self, shared, monkeypatch):
        """Gemma 4: heads of two sizes, and layers that use the keys of others."""
        import prompt_models
        import transformers

        sizes = {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "pad_token_id": 0,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
            "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": shared,
        }  # fmt: skip
        monkeypatch.setitem(prompt_models.CONFIGS, "gemma4", lambda: transformers.Gemma4TextConfig(**sizes))
        results = []
        for library in (peft_fast, peft):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model, outputs, _ = step(library, "prefix", "gemma4", "CAUSAL_LM")
            results.append((outputs.logits, gradients(model)))
            of_layers = [str(one.message) for one in said if "[2, 3]" in str(one.message)]
            assert bool(of_layers) == bool(shared)
        torch.testing.assert_close(results[0], results[1])
        assert model.peft_config["default"].token_dim == 2 * 16


class TestTheBaseModel:
    def test_it_may_be_resized_afterwards(self):
        """peft embeds with the table of before."""
        model = prompted(peft_fast, "prompt", "gpt2", "CAUSAL_LM")
        model.resize_token_embeddings(100, mean_resizing=False)
        assert torch.isfinite(model(torch.tensor([[99, 3]])).logits).all()

    def test_embeddings_that_are_trained_whole(self):
        """peft trains a copy that no input goes through."""
        model = prompted(peft_fast, "prompt", "llama", "CAUSAL_LM", modules_to_save=["embed_tokens"])
        model(**inputs_of("CAUSAL_LM")).loss.backward()
        assert model.get_input_embeddings().modules_to_save["default"].weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("method", ["prefix", "prompt", "lstm"])
    def test_in_4_bits(self, method, llama_4bit):
        results = []
        for library in (peft_fast, peft):
            torch.manual_seed(11)
            model = library.get_peft_model(llama_4bit(), config_of(library, method, "CAUSAL_LM"))
            loss = model.train()(**inputs_of("CAUSAL_LM")).loss
            loss.backward()
            results.append((loss, gradients(model)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["prefix", "prompt"])
    def test_compiled(self, method):
        model = prompted(peft_fast, method, "llama", "CAUSAL_LM").eval()
        given = inputs_of("CAUSAL_LM")
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits)

    def test_explained(self):
        assert "prompts are learned" in str(peft_fast.explain(prompted(peft_fast, "prefix", "gpt2", "CAUSAL_LM")))


@pytest.mark.parametrize(("task", "kind"), [("SEQ_CLS", "bert"), ("CAUSAL_LM", "gpt2"), ("SEQ_2_SEQ_LM", "t5")])
@pytest.mark.parametrize("method", ["prefix", "mlp"])
def test_transformers_trainer(task, kind, method, tmp_path):
    """Losses beside peft's, evaluation, and the adapter afterwards."""
    import transformers

    rows = [inputs_of(task, seed=seed) for seed in range(4)]
    data = [{key: value[i] for key, value in row.items()} for row in rows for i in range(2)]
    losses, models = [], []
    for library in (peft_fast, peft):
        model = prompted(library, method, kind, task)
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path / library.__name__), per_device_train_batch_size=2, num_train_epochs=2,
            learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            eval_strategy="steps", eval_steps=4,
        )  # fmt: skip
        trainer = transformers.Trainer(model, options, train_dataset=data, eval_dataset=data)
        trainer.train()
        models.append(model.eval())
        losses.append([row[key] for row in trainer.state.log_history for key in ("loss", "eval_loss") if key in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    models[0].save_pretrained(tmp_path)
    found = peft.PeftModel.from_pretrained(base(kind, task), tmp_path)
    torch.testing.assert_close(found(**rows[0]).loss, models[0](**rows[0]).loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(models[0](**rows[0]).loss, models[1](**rows[0]).loss, rtol=1e-4, atol=0)
