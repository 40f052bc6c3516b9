"""Differences to peft that a reader with both libraries side by side found: each is a case of its own here."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import peft_fast

from .lora_layer_models import WITH_BIAS, adapted, relative

BOTH = (peft, peft_fast)
SIZES = dict(hidden_size=32, num_hidden_layers=2, vocab_size=64)
IDS = torch.arange(12).view(2, 6)


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_attention_heads=4, intermediate_size=48, **SIZES)).eval()


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, intermediate_size=48, **SIZES))


class TestWeightsThatPeftWritesTwice:
    """Trained copies of embeddings, and biases of modules with a trained copy, are under two names in peft's files."""

    @pytest.fixture
    def enlarged(self, tmp_path):
        llama().save_pretrained(tmp_path / "base")

        def make():
            model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
            torch.manual_seed(1)
            model.resize_token_embeddings(70, mean_resizing=False)
            return model

        return make

    def travels(self, written, base, folder):
        with torch.no_grad():
            for name, parameter in written.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(name)))
        expected = written.eval()(IDS).logits
        written.save_pretrained(folder)
        for reader in BOTH:
            read = reader.PeftModel.from_pretrained(base(), folder).eval()
            assert relative(read(IDS).logits, expected) <= 1e-5

    @pytest.mark.parametrize("writer", BOTH)
    @pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]], ids=str)
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_an_enlarged_vocabulary(self, enlarged, tmp_path, writer, saved):
        config = writer.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=saved)
        self.travels(writer.get_peft_model(enlarged(), config), enlarged, tmp_path / "adapter")
        if writer is peft:
            keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
            assert any(key.endswith(".modules_to_save.weight") for key in keys), "peft writes it once by now"

    @pytest.mark.parametrize("writer", BOTH)
    @pytest.mark.parametrize("options", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["pooler"]}], ids=str)
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_all_biases_and_a_module_that_is_trained_whole(self, tmp_path, writer, options):
        config = writer.LoraConfig(bias="all", target_modules=["query"], **options)
        self.travels(writer.get_peft_model(bert(), config), bert, tmp_path)


def generator(name):
    return torch.Generator().manual_seed(sum(map(ord, name)))


@pytest.mark.parametrize(
    ("targets", "lists"),
    [(["q_proj", "lm_head"], None), (["v_proj", "model.layers.0.self_attn.q_proj"], "layers"), (["q_proj"], None)],
    ids=str,
)
def test_layers_named_by_their_whole_path_need_not_be_in_layers_to_transform(targets, lists):
    found = []
    for library in BOTH:
        config = library.LoraConfig(target_modules=targets, layers_to_transform=[1], layers_pattern=lists)
        model = library.get_peft_model(llama(), config)
        found.append([name for name, _ in model.named_modules() if name.endswith("lora_A.default")])
    assert found[0] == found[1] != []


@pytest.mark.parametrize("kind", WITH_BIAS)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_the_bias_of_an_adapter_is_merged(kind, safe_merge):
    model, x = adapted(peft_fast, kind, lora_bias=True)
    before = copy.deepcopy(model)(x)
    plain = model.get_base_model().layer.base_layer.bias.clone()
    model.merge_adapter(safe_merge=safe_merge)
    assert not torch.allclose(model.get_base_model().layer.base_layer.bias, plain)
    assert relative(model(x), before) <= 1e-5
    model.unmerge_adapter()
    torch.testing.assert_close(model.get_base_model().layer.base_layer.bias, plain)
    assert relative(model.merge_and_unload()(x), before) <= 1e-5


@pytest.mark.parametrize("library", BOTH)
def test_the_bias_of_an_adapter_is_not_lost_where_the_convolution_has_none(library):
    config = library.LoraConfig(r=2, target_modules=["0"], lora_bias=True)
    with pytest.warns(UserWarning, match="bias"):
        model = library.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False)), config)
    with pytest.raises((RuntimeError, ValueError)):
        model.merge_adapter()


@pytest.mark.parametrize("library", BOTH)
@pytest.mark.parametrize("injected", [False, True])
def test_an_adapters_tensors_can_be_averaged(library, injected):
    config = library.LoraConfig(target_modules=["q_proj"])
    model = library.inject_adapter_in_model(config, llama()) if injected else library.get_peft_model(llama(), config)
    state = library.get_peft_model_state_dict(model)
    assert state
    for value in state.values():
        assert type(value) is torch.Tensor
        assert not value.requires_grad
        value.cpu().numpy()
        value.mul_(0.5)
    again = library.get_peft_model_state_dict(model)
    assert all(again[key].data_ptr() == value.data_ptr() for key, value in state.items()), "the model's own memory"


@pytest.mark.parametrize("library", BOTH)
@pytest.mark.parametrize("targets", [["out_proj"], ["in_proj", "conv1d"], "all-linear"], ids=str)
def test_layers_that_mamba_reads_without_calling_them_are_refused(library, targets):
    model = MambaForCausalLM(MambaConfig(**SIZES))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"out_proj|conv1d"):
        library.get_peft_model(model, library.LoraConfig(target_modules=targets))
    if library is peft_fast:
        assert dict(model.named_modules()) == before
    library.get_peft_model(MambaForCausalLM(MambaConfig(**SIZES)), library.LoraConfig(target_modules=["in_proj"]))


class TestWhatSearchesAndOtherProgramsWrite:
    def test_numpys_numbers(self, tmp_path):
        for library in BOTH:
            config = library.LoraConfig(
                r=np.int64(4), lora_alpha=np.float32(8), lora_dropout=np.float64(0.25), target_modules=["q_proj"],
                rank_pattern={"v_proj": np.int32(2)}, alpha_pattern={"v_proj": np.float64(3)},
            )  # fmt: skip
            layer = library.get_peft_model(llama(), config).base_model.model.model.layers[0].self_attn.q_proj
            assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (4, 2.0, 0.25)
        config.save_pretrained(tmp_path)
        read = peft_fast.LoraConfig.from_pretrained(tmp_path)
        assert (read.r, read.lora_alpha, read.rank_pattern) == (4, 8.0, {"v_proj": 2})

    @pytest.mark.parametrize(
        "wrong", [{"r": np.float64(4)}, {"lora_alpha": np.float64("nan")}, {"r": np.int64(0)}], ids=str
    )
    def test_what_is_no_rank_is_none_of_numpys_either(self, wrong):
        with pytest.raises(ValueError, match="must be a"):
            peft_fast.LoraConfig(**wrong)

    @pytest.mark.parametrize("names", [frozenset(["q_proj"]), {"q_proj": 1}.keys(), ("q_proj",)], ids=str)
    def test_any_collection_of_names(self, names):
        for library in BOTH:
            config = library.LoraConfig(target_modules=names, exclude_modules=frozenset(["k_proj"]))
            model = library.get_peft_model(llama(), config)
            assert len([n for n, _ in model.named_modules() if n.endswith("lora_A.default")]) == 2

    @pytest.mark.parametrize("option", ["use_dora", "fan_in_fan_out", "megatron_core", "lora_bias"])
    def test_options_that_are_null_are_off(self, tmp_path, option):
        peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), option: None}))
        for library in BOTH:
            library.PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("library", BOTH)
def test_names_that_code_written_for_peft_asks_for(library):
    model = library.get_peft_model(llama(), library.LoraConfig(target_modules=["q_proj"]))
    assert model.base_model.active_adapter == ["default"]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.get_delta_weight(adapter="default").shape == (32, 32)
    base = llama()
    model.prepare_model_for_gradient_checkpointing(base)
    assert base.get_input_embeddings()(IDS).requires_grad
    tuner = library.LoraModel(llama(), library.LoraConfig(target_modules=["q_proj"]), "default", True)
    assert {p.is_meta for n, p in tuner.named_parameters() if "lora_" in n} == {True}


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_all_linear_leaves_a_classifier_out_where_adapters_are_injected_too(task):
    found = []
    for library in BOTH:
        model = bert()
        library.inject_adapter_in_model(library.LoraConfig(target_modules="all-linear", task_type=task), model)
        found.append({name for name, _ in model.named_modules() if name.endswith("lora_A.default")})
    assert found[0] == found[1]
    assert ("classifier.lora_A.default" in found[0]) == (task is None)
