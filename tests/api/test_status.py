"""get_layer_status and get_model_status beside peft 0.21.2's, field by field."""

from dataclasses import asdict, fields

import peft
import pytest
import torch
from torch import nn

import peft_fast
from peft_fast.quantized_linear import quantize_linear_layers

LIBRARIES = [peft_fast, peft]


def make(library, model, name="default", **options):
    torch.manual_seed(5)
    config = library.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], **options})
    return library.get_peft_model(model, config, adapter_name=name)


def first(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def freeze_half(model):
    first(model).lora_A["default"].weight.requires_grad_(False)


def two_adapters(model, library):
    model.add_adapter("other", library.LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))


STATES = {
    "fresh": lambda model, library: None,
    "switched off": lambda model, library: model.base_model.disable_adapter_layers(),
    "one layer off": lambda model, library: first(model).enable_adapters(False),
    "merged": lambda model, library: model.merge_adapter(),
    "one layer merged": lambda model, library: first(model).merge(),
    "one layer unmerged": lambda model, library: (model.merge_adapter(), first(model).unmerge()),
    "a weight frozen": lambda model, library: freeze_half(model),
    "all frozen": lambda model, library: model.set_requires_grad("default", False),
    "a second adapter": two_adapters,
    "the second set": lambda model, library: (two_adapters(model, library), model.set_adapter("other")),
    "both set": lambda model, library: (
        two_adapters(model, library),
        model.base_model.set_adapter(["default", "other"]),
    ),
    "set in one layer": lambda model, library: (two_adapters(model, library), first(model).set_adapter("other")),
    "one of two merged": lambda model, library: (
        two_adapters(model, library),
        model.merge_adapter(adapter_names=["other"]),
    ),
}


def compare(ours, theirs):
    layers = [[asdict(layer) for layer in library.get_layer_status(m)] for library, m in zip(LIBRARIES, (ours, theirs))]
    assert layers[0] == layers[1]
    models = [asdict(library.get_model_status(model)) for library, model in zip(LIBRARIES, (ours, theirs))]
    assert models[0] == models[1]
    return models[0]


def test_the_fields_are_pefts():
    from peft.peft_model import TunerLayerStatus, TunerModelStatus

    for mine, other in (
        (peft_fast.TunerLayerStatus, TunerLayerStatus),
        (peft_fast.TunerModelStatus, TunerModelStatus),
    ):
        assert [field.name for field in fields(mine)] == [field.name for field in fields(other)]


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["layers", "and a whole module"])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_each_state_is_told_as_in_peft(llama, state, options):
    models = [make(library, llama(), **options) for library in LIBRARIES]
    for model, library in zip(models, LIBRARIES):
        state(model, library)
    compare(*models)
    for model in models:
        assert asdict(model.get_model_status())["num_adapter_layers"] == len(model.get_layer_status())


def test_what_is_irregular_is_said_so(llama):
    expected = {
        "one layer off": {"enabled": "irregular"},
        "one layer merged": {"merged_adapters": "irregular"},
        "a weight frozen": {"requires_grad": {"default": "irregular"}},
        "set in one layer": {"active_adapters": "irregular"},
        "fresh": {"enabled": True, "merged_adapters": [], "active_adapters": ["default"]},
    }
    for name, values in expected.items():
        model = make(peft_fast, llama())
        STATES[name](model, peft_fast)
        status = asdict(model.get_model_status())
        assert {key: status[key] for key in values} == values, name


def test_other_devices(llama):
    models = [make(library, llama()) for library in LIBRARIES]
    for model in models:
        first(model).lora_B["default"].to("meta")
    assert compare(*models)["devices"] == {"default": ["cpu", "meta"]}


def compare_all_but_the_backend(models):
    """peft documents "bnb 4bit" for quantization_backend, and its LoRA layers of 0.21.2 leave it None."""
    layers = [[asdict(layer) for layer in library.get_layer_status(m)] for library, m in zip(LIBRARIES, models)]
    for mine, other in zip(*layers):
        assert mine | {"quantization_backend": None} == other
    mine, other = (asdict(library.get_model_status(model)) for library, model in zip(LIBRARIES, models))
    assert mine | {"quantization_backend": None} == other
    return mine["quantization_backend"], {layer["module_type"] for layer in layers[0]}


def test_kbit_layers(llama, llama_4bit, load):
    models = [make(library, llama_4bit()) for library in LIBRARIES]
    assert compare_all_but_the_backend(models) == ("bnb 4bit", {"lora.Linear4bit"})
    models = [make(library, llama_4bit(), target_modules=["q_proj", "lm_head"]) for library in LIBRARIES]
    assert compare_all_but_the_backend(models) == ("irregular", {"lora.Linear4bit", "lora.Linear"})
    models = [make(library, load("llama", 8)) for library in LIBRARIES]
    assert compare_all_but_the_backend(models) == ("bnb 8bit", {"lora.Linear8bitLt"})
    own = make(peft_fast, quantize_linear_layers(llama())).get_model_status()
    assert own.quantization_backend == "nf4"


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.up_proj = nn.Linear(6, 2)


def test_models_without_a_peft_model_around_them(llama):
    for build in (Plain, llama):
        wrapped = [make(library, build()) for library in LIBRARIES]
        compare(*wrapped)
        bare = [model.get_base_model() for model in wrapped]
        status = compare(*bare)
        assert status["base_model_type"] == ("other" if build is Plain else "LlamaForCausalLM")
        assert status["adapter_model_type"] == "None"
        assert status["peft_types"] == {}
        compare(*(nn.Sequential(model) for model in bare))
        compare(*(model.base_model for model in wrapped))


@pytest.mark.parametrize("library", LIBRARIES, ids=["ours", "pefts"])
def test_a_model_without_adapters(library, llama):
    for call in (library.get_layer_status, library.get_model_status):
        for model in (Plain(), llama(), make(library, llama()).unload()):
            with pytest.raises(ValueError, match="adapter layers"):
                call(model)
