"""Adapters on disk: what is written, what is read back, and what a crash leaves."""

import copy
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

import peft_fast
import peft_fast.saving
from peft_fast import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft_fast.files import write_together

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def adapted(model, **options):
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))


def name_in_model(key):
    return key.replace(".weight", ".default.weight")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written(llama, trained, tmp_path):
    model = trained(adapted(llama(), modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    assert names(folder) == FILES
    tensors = load_file(folder / "adapter_model.safetensors")
    state = model.state_dict()
    ends = ("q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B")
    paths = [f"base_model.model.model.layers.{i}.self_attn.{end}" for i in (0, 1) for end in ends]
    assert set(tensors) == {f"{path}.weight" for path in paths} | {"base_model.model.lm_head.weight"}
    for path in paths:
        assert torch.equal(tensors[f"{path}.weight"], state[f"{path}.default.weight"])
    head = state["base_model.model.lm_head.modules_to_save.default.weight"]
    assert torch.equal(tensors["base_model.model.lm_head.weight"], head)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["inference_mode"], config["auto_mapping"], config["peft_version"]) == (True, None, "0.21.2")
    assert not model.peft_config["default"].inference_mode


def test_models_without_a_task_say_where_their_class_is(llama, tmp_path):
    adapted(llama(), task_type=None).save_pretrained(tmp_path)
    mapping = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
    module = "transformers.models.llama.modeling_llama"
    assert mapping == {"base_model_class": "LlamaForCausalLM", "parent_library": module}


def test_several_adapters_have_folders(llama, trained, tokens, tmp_path):
    model = adapted(llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    trained(model).eval()
    model.save_pretrained(tmp_path / "both")
    assert names(tmp_path / "both") == sorted([*FILES, "other"])
    assert names(tmp_path / "both" / "other") == FILES[1:]  # one card, for the folder
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert names(tmp_path / "one") == ["README.md", "other"]
    with pytest.raises(ValueError, match=r"selected_adapters \['absent'\] do not exist"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["absent"])
    assert not (tmp_path / "none").exists()

    model.set_adapter("other")
    again = PeftModel.from_pretrained(llama(), tmp_path / "both", subfolder="other")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    result = again.load_adapter(tmp_path / "both", "first")
    assert result == ([], [])
    assert again.active_adapter == "default"
    model.set_adapter("default")
    again.set_adapter("first")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"torch_device": "cpu"}], ids=str)
@pytest.mark.parametrize("safe", [True, False])
def test_from_pretrained_is_frozen_unless_trainable(llama, trained, tokens, tmp_path, options, safe):
    model = trained(adapted(llama(), modules_to_save=["norm"])).eval()
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert ("adapter_model.bin" in names(tmp_path)) != safe
    for trainable in (False, True):
        read = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=trainable, **options)
        assert read.training == trainable
        assert read.peft_config["default"].inference_mode != trainable
        assert torch.equal(read(tokens).logits, model(tokens).logits)
        assert not any(parameter.is_meta for parameter in read.parameters())
        for (name, one), other in zip(read.named_parameters(), model.parameters()):
            assert one.requires_grad == (trainable and other.requires_grad), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_adapters_are_where_their_layers_are(llama, trained, tokens, tmp_path, low_cpu_mem_usage):
    model = trained(adapted(llama().cuda())).eval()
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(llama().cuda(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {parameter.device.type for parameter in read.parameters()} == {"cuda"}
    assert torch.equal(read(tokens.cuda()).logits, model(tokens.cuda()).logits)


def test_a_config_can_be_given(llama, trained, tokens, tmp_path):
    model = trained(adapted(llama())).eval()
    model.save_pretrained(tmp_path)
    config = LoraConfig(r=4, lora_alpha=0)  # an adapter that does nothing
    read = PeftModel.from_pretrained(llama(), tmp_path, config=config)
    assert torch.equal(read(tokens).logits, llama()(tokens).logits)
    with pytest.raises(ValueError, match="config must be a PeftConfig, got dict"):
        PeftModel.from_pretrained(llama(), tmp_path, config={})


def test_a_config_that_was_given_is_as_before_after_an_error(llama, tmp_path, untouched):
    adapted(llama()).save_pretrained(tmp_path)
    config = LoraConfig(r=3, target_modules="all-linear")
    before, base = copy.deepcopy(config), llama()
    with untouched(base, tmp_path), pytest.raises(ValueError, match="do not fit"):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert config == before


def test_weights_of_an_adapter_that_is_there_are_replaced(llama, trained, tokens, tmp_path):
    model = trained(adapted(llama())).eval()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    trained(model, seed=9)
    assert not torch.equal(model(tokens).logits, expected)
    model.train().load_adapter(tmp_path, "default", is_trainable=True)
    assert model.training
    assert torch.equal(model(tokens).logits, expected)


def test_state_dicts(llama, trained, tokens):
    model, twin = trained(adapted(llama())).eval(), adapted(llama()).eval()
    state = get_peft_model_state_dict(model)
    assert set_peft_model_state_dict(twin, state) == ([], [])
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    gathered = {name: value * 2 for name, value in model.state_dict().items()}
    doubled = get_peft_model_state_dict(model, gathered)
    assert all(torch.equal(doubled[key], 2 * value) for key, value in state.items())
    key = next(iter(state))
    partial = {"foreign.weight": torch.zeros(1), **{k: v for k, v in state.items() if k != key}}
    assert set_peft_model_state_dict(twin, partial) == ([name_in_model(key)], ["foreign.weight"])
    with pytest.raises(ValueError, match="state_dict lacks 8 tensors of adapter 'default'"):
        get_peft_model_state_dict(model, {})
    compiled = torch.compile(model, backend="eager")
    assert get_peft_model_state_dict(compiled, unwrap_compiled=True).keys() == state.keys()


def test_sizes_that_do_not_fit_can_be_left_out(llama, trained):
    state = get_peft_model_state_dict(trained(adapted(llama(), rank_pattern={"layers.0.self_attn.q_proj": 2})))
    twin = adapted(llama())
    before = twin.state_dict()["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"].clone()
    with pytest.warns(UserWarning, match="not loaded, because of their sizes"):
        set_peft_model_state_dict(twin, state, ignore_mismatched_sizes=True)
    values = twin.state_dict()
    assert torch.equal(values["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"], before)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A"
    assert torch.equal(values[f"{key}.default.weight"], state[f"{key}.weight"])


class TestEmbeddings:
    KEYS = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")

    def saved(self, model, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return [key for key in get_peft_model_state_dict(model, **options) if key in self.KEYS]

    def test_only_when_asked_for(self, llama):
        assert self.saved(adapted(llama())) == []
        assert self.saved(adapted(llama()), save_embedding_layers=True) == list(self.KEYS)
        with pytest.raises(ValueError, match="must be True, False or 'auto'"):
            self.saved(adapted(llama()), save_embedding_layers="yes")

    def test_with_a_resized_vocabulary(self, llama, trained, tokens, tmp_path):
        llama().save_pretrained(tmp_path / "base")
        base = llama()
        base.name_or_path = str(tmp_path / "base")
        model = adapted(base)
        assert self.saved(model) == []
        base.resize_token_embeddings(99)
        with pytest.warns(UserWarning, match="vocabulary was resized"):
            trained(model).eval().save_pretrained(tmp_path / "adapter")
        again = llama()
        again.resize_token_embeddings(99)
        read = PeftModel.from_pretrained(again, tmp_path / "adapter")
        assert torch.equal(read(tokens + 2).logits, model(tokens + 2).logits)
        assert self.saved(model, save_embedding_layers=False) == []


def test_the_model_card_names_base_and_library_and_keeps_the_text(llama, tmp_path):
    base = llama()
    base.name_or_path = "some/model"
    model = adapted(base)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "some/model")
    assert set(card.data.tags) >= {"lora", "base_model:adapter:some/model"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\nMy words.\n")
    model.create_or_update_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "peft")
    assert "mine" in card.data.tags
    assert "My words." in card.text
    base.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    for _ in range(2):
        model.create_or_update_model_card(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").text.count("- quant_method: bitsandbytes\n") == 1
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "local")
    assert ModelCard.load(tmp_path / "local" / "README.md").data.base_model is None


def test_pushing_saves_first(llama, monkeypatch, tmp_path):
    """PushToHubMixin hands max_shard_size to save_pretrained."""
    adapted(llama()).save_pretrained(tmp_path, max_shard_size="5GB", is_main_process=True)
    assert names(tmp_path) == FILES


def test_only_the_main_process_writes(llama, tmp_path):
    adapted(llama()).save_pretrained(tmp_path / "x", is_main_process=False)
    # What accelerate's get_state_dict gives the other processes.
    adapted(llama()).save_pretrained(tmp_path / "x", is_main_process=False, state_dict={})
    assert not (tmp_path / "x").exists()


class TestCrash:
    """A save that fails, wherever it fails, leaves the adapter that was there, and nothing else."""

    @pytest.fixture
    def before(self, llama, trained, tokens, tmp_path):
        model = trained(adapted(llama(), r=2)).eval()
        model.save_pretrained(tmp_path)
        return model(tokens).logits

    def check(self, llama, tokens, folder, before):
        assert names(folder) == FILES
        assert torch.equal(PeftModel.from_pretrained(llama(), folder)(tokens).logits, before)

    @pytest.mark.parametrize("at", [1, 2, 3])
    def test_while_files_are_moved(self, llama, trained, tokens, tmp_path, before, untouched, monkeypatch, at):
        other = trained(adapted(llama(), r=3), seed=2)
        calls, replace = [], os.replace

        def failing(source, target):
            calls.append(target)
            if len(calls) == at:
                raise OSError("disk is gone")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with untouched(other, tmp_path), pytest.raises(OSError, match="disk is gone"):
            other.save_pretrained(tmp_path)
        monkeypatch.undo()
        self.check(llama, tokens, tmp_path, before)

    def test_while_tensors_are_written(self, llama, tokens, tmp_path, before, untouched, monkeypatch):
        def half_written(tensors, path, metadata):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(peft_fast.saving, "save_file", half_written)
        with untouched(None, tmp_path), pytest.raises(KeyboardInterrupt):
            adapted(llama(), r=3).save_pretrained(tmp_path)
        monkeypatch.undo()
        self.check(llama, tokens, tmp_path, before)

    def test_without_hard_links(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError("not supported")))
        (tmp_path / "a").write_text("old")

        def refuse(path):
            raise ValueError

        with pytest.raises(ValueError):
            write_together({tmp_path / "a": lambda p: p.write_text("new"), tmp_path / "b": refuse})
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}
        write_together({tmp_path / "a": lambda p: p.write_text("new"), tmp_path / "b": lambda p: p.write_text("b")})
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new", "b": "b"}

    def test_the_same_adapter_again_moves_only_its_weights(self, llama, trained, tmp_path, monkeypatch):
        model = adapted(llama())
        model.save_pretrained(tmp_path)
        moved, replace = [], os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: moved.append(Path(b).name) or replace(a, b))
        trained(model).save_pretrained(tmp_path)
        assert moved == ["adapter_model.safetensors"]


def test_weights_can_be_read_without_a_model(llama, tmp_path):
    adapted(llama()).save_pretrained(tmp_path)
    assert load_peft_weights(tmp_path).keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


class TestTheOtherFormat:
    def test_it_is_removed(self, llama, trained, tmp_path):
        model = adapted(llama())
        for safe in (True, False, True, False):
            trained(model).save_pretrained(tmp_path, safe_serialization=safe)
            kind = "safetensors" if safe else "bin"
            assert names(tmp_path) == ["README.md", "adapter_config.json", f"adapter_model.{kind}"]
            state = get_peft_model_state_dict(model)
            assert all(torch.equal(value, state[key]) for key, value in load_peft_weights(tmp_path).items())

    def test_it_is_put_back_on_failure(self, llama, trained, tmp_path, untouched, monkeypatch):
        model = adapted(llama())
        model.save_pretrained(tmp_path)
        unlink = Path.unlink

        def refuse(path, *args, **options):
            unlink(path, *args, **options)
            if path.name == "adapter_model.safetensors":
                raise OSError("no space")

        monkeypatch.setattr(Path, "unlink", refuse)
        with untouched(None, tmp_path), pytest.raises(OSError, match="no space"):
            trained(model).save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", 2),
        ("lora_alpha", 64),
        ("use_rslora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("lora_bias", True),
    ],
)
def test_weights_of_another_scale_are_not_loaded_over_an_adapter(llama, trained, tmp_path, untouched, option, value):
    adapted(llama(), **{option: value}).save_pretrained(tmp_path)
    model = trained(adapted(llama()))
    with untouched(model), pytest.raises(ValueError, match=f"trained with {option}="):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "other")
    model.load_adapter(tmp_path, "other")


def test_a_config_of_ones_own_replaces_the_files(llama, trained, tmp_path):
    trained(adapted(llama())).save_pretrained(tmp_path)
    config = LoraConfig(r=4, lora_alpha=1, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = PeftModel.from_pretrained(llama(), tmp_path, config=config)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 0.25}


def test_weights_without_a_config_can_still_be_loaded_over_an_adapter(llama, trained, tmp_path):
    model = trained(adapted(llama()))
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert adapted(llama()).load_adapter(tmp_path, "default") == ([], [])
