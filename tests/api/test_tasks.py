"""The six task classes beside peft 0.21.2's, and AutoPeftModel."""

import inspect
import json
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import peft_fast
from peft_fast import LoraConfig, PeftModel, get_peft_model
from peft_fast.tuners.modules_to_save import ModulesToSaveWrapper

BERT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {key: BERT[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
LLAMA |= {"num_attention_heads": 4, "pad_token_id": 0}
BART = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
DISTILBERT = {"vocab_size": 96, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}

CLASSES = {
    "SEQ_CLS": ("PeftModelForSequenceClassification", "BertForSequenceClassification", BERT, "classifier"),
    "TOKEN_CLS": ("PeftModelForTokenClassification", "BertForTokenClassification", BERT, "classifier"),
    "QUESTION_ANS": ("PeftModelForQuestionAnswering", "BertForQuestionAnswering", BERT, "qa_outputs"),
    "FEATURE_EXTRACTION": ("PeftModelForFeatureExtraction", "BertModel", BERT, None),
    "SEQ_2_SEQ_LM": ("PeftModelForSeq2SeqLM", "T5ForConditionalGeneration", T5, None),
    "CAUSAL_LM": ("PeftModelForCausalLM", "LlamaForCausalLM", LLAMA, None),
}
TASKS = list(CLASSES)
WITH_HEADS = ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"]


def build(name, sizes, seed=7):
    model_class = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(model_class.config_class(**sizes)).eval()


def base(task):
    return build(*CLASSES[task][1:3])


def make(library, task, model=None, **options):
    torch.manual_seed(5)
    config = library.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": task, **options})
    return library.get_peft_model(base(task) if model is None else model, config)


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("task", TASKS)
def test_signatures_are_pefts(task):
    name = CLASSES[task][0]
    ours, theirs = (getattr(library, name) for library in (peft_fast, peft))
    for method in ("forward", "add_adapter"):
        mine, other = (inspect.signature(getattr(c, method)).parameters for c in (ours, theirs))
        assert list(mine) == list(other)
        assert [p.default for p in mine.values()] == [p.default for p in other.values()]
    start = ["self", "model", "peft_config", "adapter_name"]
    for found in (ours, theirs):
        assert list(inspect.signature(found.__init__).parameters)[:4] == start
    assert peft_fast.auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] is ours
    assert not issubclass(ours, tuple(getattr(peft_fast, CLASSES[t][0]) for t in TASKS if t != task))


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("task", TASKS)
def test_names_flags_outputs_and_gradients_are_pefts(task, targets, inputs, trained):
    if targets and task in ("TOKEN_CLS", "QUESTION_ANS"):
        with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
            make(peft, task, target_modules=targets)
        model = make(peft_fast, task, target_modules=targets)  # the head is left to modules_to_save
        assert isinstance(model.base_model.model.get_submodule(CLASSES[task][3]), ModulesToSaveWrapper)
        return
    ours, theirs = (trained(make(library, task, target_modules=targets)) for library in (peft_fast, peft))
    assert type(ours).__name__ == type(theirs).__name__ == CLASSES[task][0]
    assert flags(ours) == flags(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.modules_to_save == theirs.modules_to_save
    assert ours.peft_config["default"].modules_to_save == theirs.peft_config["default"].modules_to_save
    assert ours.base_model_torch_dtype == theirs.base_model_torch_dtype
    given = inputs(task) | ({"decoder_input_ids": inputs(task)["labels"]} if task == "SEQ_2_SEQ_LM" else {})
    outputs = [model(**given) for model in (ours, theirs)]
    for mine, other in zip(outputs[0].to_tuple(), outputs[1].to_tuple()):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    for output in outputs:
        (output.loss if output.get("loss") is not None else output[0].square().mean()).backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("writer", [peft_fast, peft], ids=["ours", "pefts"])
def test_files_travel_both_ways_with_the_head(task, writer, inputs, trained, tmp_path):
    reader = peft if writer is peft_fast else peft_fast
    written = trained(make(writer, task)).eval()
    written.save_pretrained(tmp_path)
    read = reader.PeftModel.from_pretrained(base(task), tmp_path)
    assert type(read).__name__ == CLASSES[task][0]
    assert not any(flags(read).values())
    one, other = (model(**inputs(task)).to_tuple()[0] for model in (written, read))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    head = CLASSES[task][3]
    if head:
        assert torch.equal(
            read.base_model.model.get_submodule(head).modules_to_save["default"].weight,
            written.base_model.model.get_submodule(head).modules_to_save["default"].weight,
        )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task


@pytest.mark.parametrize("task", WITH_HEADS)
class TestHeads:
    def test_the_head_is_named_and_learns(self, task, inputs):
        model = make(peft_fast, task)
        assert model.cls_layer_name == CLASSES[task][3]
        head = model.get_base_model().get_submodule(model.cls_layer_name)
        before = head.modules_to_save["default"].weight.detach().clone()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**inputs(task)).loss.backward()
        optimizer.step()
        assert not torch.equal(head.modules_to_save["default"].weight, before)
        assert torch.equal(head.original_module.weight, before)
        with model.disable_adapter():
            assert head.current is head.original_module

    def test_each_adapter_has_its_own(self, task, inputs, trained):
        model = make(peft_fast, task)
        config = LoraConfig(r=2, modules_to_save=["LayerNorm"])
        model.add_adapter("other", config)
        assert config.modules_to_save == ["LayerNorm", *model.head_names]
        head = trained(model).get_base_model().get_submodule(model.cls_layer_name)
        assert list(head.modules_to_save) == ["default", "other"]
        assert flags(head.modules_to_save["default"])["weight"]
        assert not flags(head.modules_to_save["other"])["weight"]
        model.set_adapter("other")
        assert head.current is head.modules_to_save["other"]
        model.delete_adapter("other")
        assert list(head.modules_to_save) == ["default"]

    def test_naming_the_head_oneself_changes_nothing(self, task, tmp_path):
        model = make(peft_fast, task, modules_to_save=[CLASSES[task][3]])
        assert sorted(model.peft_config["default"].modules_to_save) == sorted(model.head_names)
        model.save_pretrained(tmp_path)
        read = PeftModel.from_pretrained(base(task), tmp_path, is_trainable=True)
        assert sorted(read.peft_config["default"].modules_to_save) == sorted(model.head_names)
        assert flags(read) == flags(model)

    def test_a_failure_leaves_model_and_config_alone(self, task, untouched):
        model, config = base(task), LoraConfig(task_type=task, target_modules=["no_such_layer"])
        with untouched(model), pytest.raises(ValueError, match="not found"):
            get_peft_model(model, config)
        assert config.modules_to_save is None
        model, config = make(peft_fast, task), LoraConfig(target_modules=["no_such_layer"])
        with untouched(model), pytest.raises(ValueError, match="not found"):
            model.add_adapter("other", config)
        assert config.modules_to_save is None


def test_other_heads():
    distilbert = lambda library: make(  # noqa: E731
        library, "SEQ_CLS", build("DistilBertForSequenceClassification", DISTILBERT), target_modules=["q_lin"]
    )
    model = distilbert(peft_fast)  # peft goes by the end of the name, and its files have both layers
    assert flags(model) == flags(distilbert(peft))
    assert model.cls_layer_name == "classifier"
    llama = make(peft_fast, "SEQ_CLS", build("LlamaForSequenceClassification", LLAMA))
    assert llama.cls_layer_name == "score"


def test_a_head_of_another_name_is_missed_with_a_warning(tmp_path, tokens, trained):
    bart = lambda: build("BartForSequenceClassification", BART)  # noqa: E731
    with pytest.warns(UserWarning, match="no layer called classifier or score.*Name it in modules_to_save"):
        model = make(peft_fast, "SEQ_CLS", bart())
    assert model.cls_layer_name is None
    assert model.modules_to_save is None
    assert flags(model) == flags(make(peft, "SEQ_CLS", bart()))  # peft misses it silently
    # A file of peft's names layers that are not there.
    theirs = trained(make(peft, "SEQ_CLS", bart())).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no layer called"):
        read = PeftModel.from_pretrained(bart(), tmp_path)
    tokens[tokens == 2] = 3
    tokens[:, -1] = 2  # BART classifies at the end-of-sequence token
    torch.testing.assert_close(read(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        named = make(peft_fast, "SEQ_CLS", bart(), modules_to_save=["classification_head"])
    assert named.base_model.model.classification_head.modules_to_save["default"].dense.weight.requires_grad


def test_modules_to_save_means_the_ends_of_names_as_in_peft(llama):
    for names in (["norm"], ["layernorm", "lm_head"]):
        ours, theirs = (make(library, "CAUSAL_LM", llama(), modules_to_save=names) for library in (peft_fast, peft))
        assert flags(ours) == flags(theirs)
    with pytest.raises(ValueError, match="takes all of them away"):
        make(peft_fast, "CAUSAL_LM", llama(), modules_to_save=["proj"])


def test_answering_questions_leaves_the_segments_out_as_peft_does(inputs, trained):
    """They change what BERT answers: so an adapter that was trained in one library would answer differently in the
    other."""
    ours, theirs = (trained(make(library, "QUESTION_ANS")).eval() for library in (peft_fast, peft))
    given = inputs("QUESTION_ANS")
    segments = torch.arange(10)[None].expand(3, 10) // 5
    alone = base("QUESTION_ANS")
    assert not torch.equal(alone(**given, token_type_ids=segments).start_logits, alone(**given).start_logits)
    for name, values in {"token_type_ids": segments, "position_ids": torch.arange(1, 11)[None]}.items():
        with pytest.warns(UserWarning, match=f"{name} are left out"):
            mine = ours(**given, **{name: values}).start_logits
        torch.testing.assert_close(mine, theirs(**given, **{name: values}).start_logits)
        with ours.disable_adapter():
            seen = ours.base_model(**given, **{name: values}).start_logits
            torch.testing.assert_close(seen, alone(**given, **{name: values}).start_logits)


@pytest.mark.parametrize("config", [None, {"peft_type": "LORA"}, peft.LoraConfig()], ids=["none", "dict", "pefts"])
def test_without_a_config_of_ours(config, untouched):
    names = [CLASSES[task][0] for task in TASKS] + ["PeftModel"]
    for name, task in zip(names, [*TASKS, "CAUSAL_LM"]):
        model = base(task)
        with untouched(model), pytest.raises(TypeError, match="peft_config must be a PeftConfig of peft_fast.*got"):
            getattr(peft_fast, name)(model, config)
        if config is None and task in WITH_HEADS:
            with pytest.raises(TypeError, match="got None"):
                getattr(peft_fast, name)(model)
    with pytest.raises(TypeError, match="peft_config must be"):
        get_peft_model(base("SEQ_CLS"), config)


@pytest.mark.parametrize("library", [peft_fast, peft], ids=["ours", "pefts"])
def test_prompts_of_a_model_without_prompt_learning(library):
    model = make(library, "SEQ_CLS")
    for call in (lambda: model.get_prompt(2), lambda: model.get_prompt_embedding_to_save("default")):
        with pytest.raises(AttributeError, match="'BertForSequenceClassification' object has no attribute 'prompt_enc"):
            call()
    for name in ("prompt_encoder", "prompt_tokens", "transformer_backbone_name", "word_embeddings"):
        assert not hasattr(model, name)


@pytest.mark.parametrize("task", TASKS)
def test_attributes_fall_through(task):
    model = make(peft_fast, task)
    assert model.config is model.get_base_model().config
    assert model.num_parameters() == sum(p.numel() for p in model.get_base_model().parameters())
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    assert model.special_peft_forward_args == make(peft, task).special_peft_forward_args
    with pytest.raises(ValueError, match="task_ids"):
        model(task_ids=torch.zeros(1))
    with pytest.raises(ValueError, match="alora_offsets"):
        model(alora_offsets=[1])


@pytest.mark.parametrize("library", [peft_fast, peft], ids=["ours", "pefts"])
def test_generation(library, tokens):
    encoder_decoder, causal = make(library, "SEQ_2_SEQ_LM"), make(library, "CAUSAL_LM")
    assert encoder_decoder.generate(input_ids=tokens, min_new_tokens=3, max_new_tokens=3).shape == (3, 4)
    mask = torch.ones_like(tokens)
    assert causal.generate(tokens, attention_mask=mask, min_new_tokens=3, max_new_tokens=3).shape == (3, 13)
    for model in (encoder_decoder, causal):
        assert callable(model.base_model_prepare_inputs_for_generation)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.classifier = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x, factor=1):
        return self.classifier(self.first(x).relu()) * factor


def test_a_plain_module(tmp_path, trained):
    torch.manual_seed(0)
    plain, x = Plain(), torch.randn(4, 6)
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    model = trained(get_peft_model(plain, LoraConfig(r=2, target_modules=["first"], modules_to_save=["classifier"])))
    assert type(model) is PeftModel
    assert torch.equal(model(x, factor=2), 2 * model(x))
    assert model.classifier is plain.classifier
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    fresh = Plain()
    fresh.load_state_dict(weights)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(x), expected)
    assert type(get_peft_model(Plain(), LoraConfig(task_type="SEQ_CLS", target_modules=["first"]))).__name__ == (
        "PeftModelForSequenceClassification"
    )
