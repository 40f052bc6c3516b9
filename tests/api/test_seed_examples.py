"""The examples of the documents that this library was asked to be: peft's "Models", [A] of v0.6.2 (shared/seeds/000...)
and [B] of v0.15 (001...), line by line, on models of the published configurations, beside peft 0.21.2.

| example | in | state |
|---|---|---|
| `with model.disable_adapter(): model(inputs)` | B | runs, to the letter |
| `for name, param in model_peft.named_parameters(): ...` (twice) | B | runs; `if ...:` is filled in |
| PeftModelForSeq2SeqLM, LORA, t5-base | A, B | runs, to the letter; peft 0.21.2 itself refuses `enable_lora` |
| PeftModelForQuestionAnswering, LORA, bert-base-cased | A, B | runs, to the letter |
| PeftModelForFeatureExtraction, LORA, bert-base-cased | A, B | runs, to the letter; no figures in the documents |
| PeftModelForSequenceClassification, PREFIX_TUNING, bert-base-cased | A, B | runs, to the letter; peft 0.21.2 |
|   |   | itself refuses `postprocess_past_key_value_function` |
| PeftModelForTokenClassification, PREFIX_TUNING, bert-base-cased | A, B | runs, but for one name: it imports |
|   |   | AutoModelForSequenceClassification and uses AutoModelForTokenClassification |
| PeftModelForCausalLM, PREFIX_TUNING, gpt2-large | A, B | runs, to the letter |
| PeftMixedModel.from_pretrained, load_adapter, set_adapter of two, a forward | B | runs, to the letter |

What is printed is what peft 0.21.2 prints on the same model. Where that is not what the documents say:
  t5-base   all 223,843,584 in the documents, 223,788,288 now: peft once gave each of the 72 adapted layers a bias of
            768 zeros (55,296), where T5 has none.
  BERT QA   trainable 592,900 in the documents, 591,362 now: the original qa_outputs (1,538) beside its trained copy was
            once trainable too. All parameters are the documents' 108,312,580.
  BERT SEQ_CLS  all 108,680,450 in the documents, 108,681,988 now: beside the classifier (1,538) there is its trained
            copy. Trainable are the documents' 370,178.
  BERT TOKEN_CLS  all 108,680,450 in the documents, which is SEQ_CLS's figure: a token classifier has no pooler
            (590,592), and it has the copy, so that it is 108,091,396 now.
And all percentages have four digits now. (In [A] every underscore in a string has a backslash: the page's markup.)
"""

import re
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers

import peft_fast

CONFIGS = {
    "bert-base-cased": transformers.BertConfig(vocab_size=28996),
    "gpt2-large": transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "t5-base": transformers.T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0
    ),
}
SEQ2SEQ = """
>>> from transformers import AutoModelForSeq2SeqLM
>>> from peft import PeftModelForSeq2SeqLM, get_peft_config

>>> config = {
...     "peft_type": "LORA",
...     "task_type": "SEQ_2_SEQ_LM",
...     "inference_mode": False,
...     "r": 8,
...     "target_modules": ["q", "v"],
...     "lora_alpha": 32,
...     "lora_dropout": 0.1,
...     "fan_in_fan_out": False,
...     "enable_lora": None,
...     "bias": "none",
... }

>>> peft_config = get_peft_config(config)
>>> model = AutoModelForSeq2SeqLM.from_pretrained("t5-base")
>>> peft_model = PeftModelForSeq2SeqLM(model, peft_config)
>>> peft_model.print_trainable_parameters()
trainable params: 884736 || all params: 223843584 || trainable%: 0.3952474242013566
"""
QUESTION_ANSWERING = """
>>> from transformers import AutoModelForQuestionAnswering
>>> from peft import PeftModelForQuestionAnswering, get_peft_config

>>> config = {
...     "peft_type": "LORA",
...     "task_type": "QUESTION_ANS",
...     "inference_mode": False,
...     "r": 16,
...     "target_modules": ["query", "value"],
...     "lora_alpha": 32,
...     "lora_dropout": 0.05,
...     "fan_in_fan_out": False,
...     "bias": "none",
... }

>>> peft_config = get_peft_config(config)
>>> model = AutoModelForQuestionAnswering.from_pretrained("bert-base-cased")
>>> peft_model = PeftModelForQuestionAnswering(model, peft_config)
>>> peft_model.print_trainable_parameters()
trainable params: 592900 || all params: 108312580 || trainable%: 0.5473971721475013
"""
FEATURE_EXTRACTION = """
>>> from transformers import AutoModel
>>> from peft import PeftModelForFeatureExtraction, get_peft_config

>>> config = {
...     "peft_type": "LORA",
...     "task_type": "FEATURE_EXTRACTION",
...     "inference_mode": False,
...     "r": 16,
...     "target_modules": ["query", "value"],
...     "lora_alpha": 32,
...     "lora_dropout": 0.05,
...     "fan_in_fan_out": False,
...     "bias": "none",
... }
>>> peft_config = get_peft_config(config)
>>> model = AutoModel.from_pretrained("bert-base-cased")
>>> peft_model = PeftModelForFeatureExtraction(model, peft_config)
>>> peft_model.print_trainable_parameters()
"""
SEQUENCE_CLASSIFICATION = """
>>> from transformers import AutoModelForSequenceClassification
>>> from peft import PeftModelForSequenceClassification, get_peft_config

>>> config = {
...     "peft_type": "PREFIX_TUNING",
...     "task_type": "SEQ_CLS",
...     "inference_mode": False,
...     "num_virtual_tokens": 20,
...     "token_dim": 768,
...     "num_transformer_submodules": 1,
...     "num_attention_heads": 12,
...     "num_layers": 12,
...     "encoder_hidden_size": 768,
...     "prefix_projection": False,
...     "postprocess_past_key_value_function": None,
... }

>>> peft_config = get_peft_config(config)
>>> model = AutoModelForSequenceClassification.from_pretrained("bert-base-cased")
>>> peft_model = PeftModelForSequenceClassification(model, peft_config)
>>> peft_model.print_trainable_parameters()
trainable params: 370178 || all params: 108680450 || trainable%: 0.3406113979101117
"""
# As SEQUENCE_CLASSIFICATION in the documents too, with the class that it needs imported.
TOKEN_CLASSIFICATION = SEQUENCE_CLASSIFICATION.replace("SEQ_CLS", "TOKEN_CLS").replace("Sequence", "Token")
CAUSAL_LM = """
>>> from transformers import AutoModelForCausalLM
>>> from peft import PeftModelForCausalLM, get_peft_config

>>> config = {
...     "peft_type": "PREFIX_TUNING",
...     "task_type": "CAUSAL_LM",
...     "inference_mode": False,
...     "num_virtual_tokens": 20,
...     "token_dim": 1280,
...     "num_transformer_submodules": 1,
...     "num_attention_heads": 20,
...     "num_layers": 36,
...     "encoder_hidden_size": 1280,
...     "prefix_projection": False,
...     "postprocess_past_key_value_function": None,
... }

>>> peft_config = get_peft_config(config)
>>> model = AutoModelForCausalLM.from_pretrained("gpt2-large")
>>> peft_model = PeftModelForCausalLM(model, peft_config)
>>> peft_model.print_trainable_parameters()
trainable params: 1843200 || all params: 775873280 || trainable%: 0.23756456724479544
"""
MIXED = """
>>> peft_model = PeftMixedModel.from_pretrained(base_model, path_to_adapter1, "adapter1").eval()
>>> peft_model.load_adapter(path_to_adapter2, "adapter2")
>>> peft_model.set_adapter(["adapter1", "adapter2"])  # activate both adapters
>>> peft_model(data)  # forward pass using both adapters
"""
DISABLING = """
>>> with model.disable_adapter():
...     model(inputs)
"""
FREEZING = """
>>> for name, param in model_peft.named_parameters():
...     if ...:  # some check on name (ex. if 'lora' in name)
...         param.requires_grad = False
"""
# What both libraries print: trainable, all, and what is missing from the documents' figures.
PRINTED = {
    "seq2seq": (SEQ2SEQ, 884_736, 223_788_288, (0, 72 * 768)),
    "question-answering": (QUESTION_ANSWERING, 591_362, 108_312_580, (2 * 768 + 2, 0)),
    "feature-extraction": (FEATURE_EXTRACTION, 589_824, 108_900_096, None),
    "sequence-classification": (SEQUENCE_CLASSIFICATION, 370_178, 108_681_988, (0, -(2 * 768 + 2))),
    "token-classification": (TOKEN_CLASSIFICATION, 370_178, 108_091_396, (0, 768 * 768 + 768 - (2 * 768 + 2))),
    "causal-lm": (CAUSAL_LM, 1_843_200, 775_873_280, (0, 0)),
}


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """from_pretrained of the documents' names gives a model of that configuration, without values: they are not
    needed to count them."""

    def build(cls, name, **options):
        with torch.device("meta"):
            return cls.from_config(CONFIGS[name])

    for name in (
        "AutoModel", "AutoModelForSeq2SeqLM", "AutoModelForQuestionAnswering", "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification", "AutoModelForCausalLM",
    ):  # fmt: skip
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", classmethod(build))


def run(example, library, **names):
    """Runs an example as it stands, with the library's name for "peft". Returns what it left."""
    lines = re.findall(r"^(?:>>>|\.\.\.) ?(.*)$", example, re.MULTILINE)
    code = "\n".join(lines).replace("from peft import", f"from {library.__name__} import")
    if library is peft:
        for key in ("enable_lora", "postprocess_past_key_value_function"):  # peft 0.21.2 refuses them: see below
            code = code.replace(f'    "{key}": None,\n', "")
    exec(code, names)  # noqa: S102 (the text above)
    return SimpleNamespace(**{name: value for name, value in names.items() if name.isidentifier()})


@pytest.mark.parametrize(("example", "trainable", "total", "explained"), PRINTED.values(), ids=PRINTED.keys())
@pytest.mark.filterwarnings("ignore:.* has no options .'(enable_lora|postprocess.*)'.:UserWarning")
def test_it_runs_and_prints_what_peft_prints(example, trainable, total, explained, capsys):
    prints, models = [], []
    for library in (peft_fast, peft):
        models.append(run(example, library).peft_model)
        prints.append(capsys.readouterr().out)
    assert prints[0] == prints[1]
    assert prints[0] == (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}\n"
    )
    documented = re.search(r"^trainable params: (\d+) \|\| all params: (\d+)", example, re.MULTILINE)
    assert (documented is None) == (explained is None)
    if documented:
        assert tuple(map(int, documented.groups())) == (trainable + explained[0], total + explained[1])
    names = [[(n, p.shape, p.requires_grad) for n, p in model.named_parameters()] for model in models]
    assert names[0] == names[1]


def test_the_differences_to_the_documents_are_what_they_are_said_to_be():
    assert len(run(SEQ2SEQ.replace('"enable_lora": None,', ""), peft_fast).peft_model.get_layer_status()) == 72
    head = run(QUESTION_ANSWERING, peft_fast).peft_model.qa_outputs.original_module
    assert sum(p.numel() for p in head.parameters()) == 2 * 768 + 2
    classifier = run(SEQUENCE_CLASSIFICATION, peft_fast).peft_model
    assert sum(p.numel() for p in classifier.classifier.modules_to_save.parameters()) == 2 * 768 + 2
    assert sum(p.numel() for p in classifier.bert.pooler.parameters()) == 768 * 768 + 768
    assert run(TOKEN_CLASSIFICATION, peft_fast).peft_model.bert.pooler is None


def test_peft_itself_refuses_keys_of_its_documents():
    with pytest.raises(TypeError, match="enable_lora"):
        peft.get_peft_config({"peft_type": "LORA", "enable_lora": None})
    with pytest.warns(UserWarning, match="enable_lora"):
        run(SEQ2SEQ, peft_fast)
    with pytest.raises(TypeError, match="postprocess_past_key_value_function"):
        peft.get_peft_config({"peft_type": "PREFIX_TUNING", "postprocess_past_key_value_function": None})
    with pytest.warns(UserWarning, match="postprocess_past_key_value_function"):
        run(CAUSAL_LM, peft_fast)


@pytest.mark.parametrize("library", [peft_fast, peft], ids=["ours", "pefts"])
def test_disabling_and_freezing(library, llama, tokens, trained):
    model = trained(library.get_peft_model(llama(), library.LoraConfig(task_type="CAUSAL_LM")))
    outputs = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(output.logits))
    run(DISABLING, library, model=model, inputs=tokens)
    torch.testing.assert_close(outputs[0], llama()(tokens).logits)
    assert not torch.equal(model(tokens).logits, outputs[0])
    run(FREEZING.replace("if ...:", "if 'lora' in name:"), library, model_peft=model)
    assert model.get_nb_trainable_parameters()[0] == 0


def test_mixed_adapters(llama, tokens, tmp_path):
    """Of LoRA and LoHa, as the documents say."""
    outputs = []
    for library in (peft_fast, peft):
        paths = [tmp_path / library.__name__ / name for name in ("one", "two")]
        for path, config in zip(paths, (library.LoraConfig(r=4), library.LoHaConfig(r=3))):
            torch.manual_seed(2)
            model = library.get_peft_model(llama(), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(torch.randn(parameter.shape) * 0.1)
            model.save_pretrained(path)
        names = {"path_to_adapter1": paths[0], "path_to_adapter2": paths[1], "PeftMixedModel": library.PeftMixedModel}
        model = run(MIXED, library, base_model=llama(), data=tokens, **names).peft_model
        outputs.append(model(tokens).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], llama()(tokens).logits, atol=1e-3)
