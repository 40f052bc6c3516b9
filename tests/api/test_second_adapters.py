"""Adapters beside others, by the ways that code written for peft takes: setters, inject_adapter, injecting twice."""

import inspect

import peft
import pytest
import torch
from torch import nn

import peft_fast

BOTH = (peft, peft_fast)
IDS = torch.arange(1, 9).view(1, 8)


def two(library, llama, **options):
    config = library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **options)
    model = library.get_peft_model(llama(), config)
    model.add_adapter("other", library.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    return model


@pytest.mark.filterwarnings("ignore:active_adapter")
def test_setting_active_adapter_names_a_config(llama):
    found = []
    for library in BOTH:
        torch.manual_seed(0)
        model = two(library, llama)
        before = model(IDS).logits
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        model.active_adapter = "other"
        assert model.active_adapter == "other"
        assert model.active_peft_config is model.peft_config["other"]
        assert model.active_adapters == ["default"]
        assert torch.equal(model(IDS).logits, before)
        assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
        model.set_adapter("default")
        assert model.active_adapter == "default"
        model.active_adapter = "other"
        model.set_adapter("other")
        assert model.active_adapter == "other"
        found.append(model(IDS).logits)
    assert not torch.equal(found[1], before)


def test_setting_it_says_that_the_layers_stay(llama, recwarn):
    model = two(peft_fast, llama)
    recwarn.clear()
    model.active_adapter = "default"
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"'default'\] stay active.*set_adapter\('other'\)"):
        model.active_adapter = "other"
    model.base_model.set_adapter(["default", "other"])  # which is said now
    assert model.active_adapter == ["default", "other"]
    for wrong in ("none", ["other"], None):
        with pytest.raises(ValueError, match="must be one of"):
            model.active_adapter = wrong


def test_setting_it_takes_another_prompt(llama):
    for library in BOTH:
        config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
        model = library.get_peft_model(llama(), library.PromptTuningConfig(**config)).eval()
        model.add_adapter("other", library.PromptTuningConfig(**config))
        first = model(IDS).logits
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        model.active_adapter = "other"
        assert model.active_adapters == ["other"]
        assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
        assert not torch.equal(model(IDS).logits, first)


def test_setting_the_configs(llama):
    for library in BOTH:
        model = two(library, llama)
        configs = {name: library.LoraConfig(target_modules=["q_proj"], lora_alpha=2) for name in ("default", "other")}
        model.peft_config = configs
        assert model.peft_config == model.base_model.peft_config == configs
        model.base_model.active_adapter = "other"
        assert model.base_model.active_adapters == ["other"]
    before = model.peft_config
    for wrong in ({"default": configs["default"]}, None, {**configs, "third": configs["other"]}):
        with pytest.raises(ValueError, match="a config for each adapter"):
            model.peft_config = wrong
    with pytest.raises(TypeError, match="PeftConfig"):
        model.peft_config = {"default": {}, "other": {}}
    assert model.peft_config is before
    prompts = peft_fast.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft_fast.get_peft_model(llama(), prompts)
    model.peft_config = {"default": prompts}
    assert model.peft_config["default"] is prompts


def test_keywords_that_never_reach_the_base_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x, **kwargs):
            assert not kwargs
            return self.inner(x)

    for library in BOTH:
        model = library.get_peft_model(Model(), library.LoraConfig(target_modules=["inner"]))
        assert type(model.special_peft_forward_args) is set
        with pytest.raises(AssertionError):
            model(torch.ones(1, 2), mine=1)
        model.special_peft_forward_args.add("mine")
        model(torch.ones(1, 2), mine=1)
        assert (
            "mine"
            not in library.get_peft_model(
                Model(), library.LoraConfig(target_modules=["inner"])
            ).special_peft_forward_args
        )


class TestInjectAdapter:
    def test_the_order_of_its_arguments(self):
        ours, theirs = (library.LoraModel.inject_adapter for library in BOTH)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)

    def test_it_puts_in_what_peft_config_says(self, llama):
        found = []
        for library in BOTH:
            model = library.get_peft_model(llama(torch.bfloat16), library.LoraConfig(target_modules=["q_proj"]))
            tuner = model.base_model
            tuner.peft_config["other"] = library.LoraConfig(target_modules=["v_proj"], r=2)
            tuner.inject_adapter(tuner.model, "other", False)
            found.append({name: (p.dtype, p.shape, p.requires_grad) for name, p in model.named_parameters()})
            model.set_adapter("other")
        assert found[0] == found[1]

    def test_what_it_refuses(self, llama, untouched):
        model = two(peft_fast, llama)
        tuner = model.base_model
        with untouched(model):
            with pytest.raises(ValueError, match="another LlamaForCausalLM"):
                tuner.inject_adapter(llama(), "other")
            with pytest.raises(ValueError, match="in the model already"):
                tuner.inject_adapter(tuner.model, "other")
            with pytest.raises(KeyError):
                tuner.inject_adapter(tuner.model, "third")
        tuner.peft_config["third"] = config = peft_fast.LoraConfig(target_modules=["nothing"])
        with untouched(model), pytest.raises(ValueError, match="not found"):
            tuner.inject_adapter(tuner.model, "third")
        assert list(tuner.peft_config) == ["default", "other", "third"]
        assert tuner.peft_config["third"] is config


SECOND = [
    {}, {"inference_mode": True}, {"r": 4}, {"target_modules": ["v_proj"]}, {"modules_to_save": ["lm_head"]},
    {"bias": "all"}, {"target_modules": ["embed_tokens"], "use_rslora": True},
]  # fmt: skip


@pytest.mark.parametrize("options", SECOND, ids=str)
def test_injecting_a_second_one(llama, options):
    found = []
    for library in BOTH:
        model = library.inject_adapter_in_model(library.LoraConfig(target_modules=["q_proj"]), llama())
        config = library.LoraConfig(**{"target_modules": ["q_proj"], **options})
        with pytest.warns(UserWarning, match=r"[Aa]lready"):
            library.inject_adapter_in_model(config, model, "other")
        layers = {name: m.active_adapters for name, m in model.named_modules() if hasattr(m, "lora_A")}
        found.append((layers, {name: p.requires_grad for name, p in model.named_parameters()}, list(model.peft_config)))
    assert found[0] == found[1]


def test_a_name_that_is_taken_is_refused_and_the_weights_stay(llama, untouched):
    config = {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = peft_fast.inject_adapter_in_model(peft_fast.LoraConfig(**config), llama())
    with untouched(model), pytest.raises(ValueError, match="exists already"):
        peft_fast.inject_adapter_in_model(peft_fast.LoraConfig(**config), model)


@pytest.mark.parametrize("selected", [None, ["default"], ["other"], ["other", "default"], []], ids=str)
def test_which_files_are_where(llama, tmp_path, selected):
    for library in BOTH:
        two(library, llama).save_pretrained(tmp_path / library.__name__, selected_adapters=selected)
    ours, theirs = (
        sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")) for name in ("peft_fast", "peft")
    )
    assert ours == theirs
    assert "library_name: peft" in (tmp_path / "peft_fast" / "README.md").read_text()


def test_a_file_of_another_rank_over_an_adapter(llama, tmp_path, untouched):
    results = []
    for library in BOTH:
        options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
        saved = library.get_peft_model(llama(), library.LoraConfig(r=4, **options))
        saved.base_model.model.lm_head.modules_to_save["default"].weight.data.fill_(3)
        saved.save_pretrained(tmp_path)
        torch.manual_seed(1)
        model = library.get_peft_model(llama(), library.LoraConfig(r=8, **options))
        factors = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
        with pytest.raises((RuntimeError, ValueError), match="size mismatch|r=4, and the adapter here has 8"):
            model.load_adapter(tmp_path, "default")
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.fill_(0)
        with pytest.warns(UserWarning, match="size"):
            result = model.load_adapter(tmp_path, "default", ignore_mismatched_sizes=True)
        assert not result.unexpected_keys
        assert set(result.missing_keys) == factors.keys()
        assert (model.base_model.model.lm_head.modules_to_save["default"].weight == 3).all()
        assert all(torch.equal(p, factors[name]) for name, p in model.named_parameters() if "lora_" in name)
        results.append(model.peft_config["default"].r)
    assert results == [8, 8]
    other = peft_fast.get_peft_model(llama(), peft_fast.LoraConfig(r=8, lora_alpha=3, **options))
    with untouched(other), pytest.raises(ValueError, match="lora_alpha=8, and the adapter here has 3"):
        other.load_adapter(tmp_path, "default", ignore_mismatched_sizes=True)
