"""Small things that code written for peft does, in both libraries: numbers, texts, names of arguments."""

import dataclasses
from collections import OrderedDict

import numpy as np
import peft
import pytest
import torch
from torch import nn

import peft_fast
from peft_fast.tuners import METHODS, PROMPT_METHODS

BOTH = (peft, peft_fast)
IDS = torch.arange(1, 9).view(1, 8)


def layer_of(library, llama):
    config = library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = library.get_peft_model(llama(), config)
    return model, model.base_model.model.model.layers[0].self_attn.q_proj


NUMBERS = [
    2, 0.5, np.float32(0.5), np.float64(2), np.int64(2), torch.tensor(2.0), torch.tensor([0.5]), torch.tensor(2),
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_scales_of_any_kind_of_number(llama, number):
    found = []
    for library in BOTH:
        torch.manual_seed(0)
        model, layer = layer_of(library, llama)
        scales = []
        for change in ("scale_layer", "unscale_layer"):
            getattr(layer, change)(number)
            scales.append(float(layer.scaling["default"]))
        layer.set_scale("default", number)
        scales.append(float(layer.scaling["default"]))
        found.append((scales, model(IDS).logits))
    assert found[0][0] == found[1][0] == [float(number), 1.0, float(number)]
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "wrong",
    ["2", None, 2 + 0j, torch.tensor([1.0, 2.0]), torch.tensor(1j), nn.Parameter(torch.tensor(2.0)), True],
    ids=repr,
)
def test_what_is_no_scale(llama, wrong):
    _, layer = layer_of(peft_fast, llama)
    with pytest.raises(TypeError, match="must be a number"):
        layer.scale_layer(wrong)
    assert layer.scaling == {"default": 1.0}


def test_a_task_is_what_it_was_given_as():
    for given in ("CAUSAL_LM", "the enum"):
        texts = []
        for library in BOTH:
            task = library.TaskType.CAUSAL_LM if given == "the enum" else given
            config = library.LoraConfig(task_type=task, target_modules=["x"])
            assert config.task_type == library.TaskType.CAUSAL_LM == "CAUSAL_LM"
            texts.append((repr(config.task_type), str(config.task_type), f"{config.to_dict()['task_type']}"))
        assert texts[0] == texts[1]


def test_every_option_says_what_it_is():
    kinds = [made[0] for made in (METHODS | PROMPT_METHODS).values()]
    for cls in [peft_fast.PeftConfig, *kinds, peft_fast.LoraRuntimeConfig]:
        for field in dataclasses.fields(cls):
            text = field.metadata["help"]
            known = "not built here" not in text or field.name in peft_fast.tuners.lora.config.NOT_BUILT
            assert text, field.name
            assert known, field.name
            assert "Raises" not in text
    texts = {field.name: field.metadata["help"] for field in dataclasses.fields(peft_fast.LoraConfig)}
    assert texts["r"] == "the rank."
    assert "all-linear" in texts["target_modules"]
    assert texts["rank_pattern"] == texts["alpha_pattern"]
    of_base, of_prefix = (
        {field.name: field.metadata["help"] for field in dataclasses.fields(cls)}
        for cls in (peft_fast.PeftConfig, peft_fast.PrefixTuningConfig)
    )
    assert of_base["task_type"] == of_prefix["task_type"] == texts["task_type"]
    assert of_prefix["token_dim"].startswith("the base model's sizes")  # and not what prefix tuning says of it


def test_inputs_by_name(llama):
    for library in BOTH:
        config = library.LoraConfig(target_modules=["embed_tokens", "q_proj"])
        model = library.get_peft_model(llama(), config).base_model.model.model
        assert model.embed_tokens(x=IDS).shape == (1, 8, 64)
        assert model.layers[0].self_attn.q_proj(x=torch.ones(2, 64)).shape == (2, 64)


def test_tensors_of_a_compiled_model(llama):
    for library in BOTH:
        model = library.get_peft_model(llama(), library.LoraConfig(target_modules=["q_proj"]))
        compiled = torch.compile(model)
        tensors = library.get_peft_model_state_dict(model)
        of_compiled = library.get_peft_model_state_dict(compiled)
        assert list(of_compiled) == [f"_orig_mod.{key}" for key in tensors]
        assert list(library.get_peft_model_state_dict(compiled, unwrap_compiled=True)) == list(tensors)
        given = {key: torch.full_like(value, 3) for key, value in compiled.state_dict().items()}
        of_given = library.get_peft_model_state_dict(compiled, state_dict=given)
        assert list(of_given) == list(of_compiled)
        assert all(bool((value == 3).all()) for value in of_given.values())
    assert not any(library.set_peft_model_state_dict(compiled, of_given))
    assert all(bool((value == 3).all()) for value in library.get_peft_model_state_dict(model).values())


def test_configs_of_models(llama):
    found = []
    for library in BOTH:
        of = library.tuners.tuners_utils.BaseTuner.get_model_config
        plain = nn.Linear(1, 1)
        dicts = [of(plain)]
        plain.config = {"model_type": "mine"}
        found.append([*dicts, of(plain), of(llama())])
    assert found[0] == found[1]


def test_more_of_buffers():
    from peft.tuners._buffer_dict import BufferDict as Theirs

    from peft_fast.tuners._buffer_dict import BufferDict as Ours

    for cls in (Ours, Theirs):
        buffers = cls({"a": torch.zeros(2), "b": torch.ones(1)})
        assert buffers.pop("a").shape == (2,)
        assert list(buffers) == ["b"]
        buffers.clear()
        assert len(buffers) == 0


def test_adapters_of_layers_in_eight_bits_are_wide(llama):
    """As with layerwise casting, whose hooks cast the base weights for each forward."""
    for library in BOTH:
        base = nn.Sequential(nn.Linear(4, 4)).to(torch.float8_e4m3fn)
        model = library.get_peft_model(base, library.LoraConfig(target_modules=["0"]))
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
        assert base[0].base_layer.weight.dtype == torch.float8_e4m3fn


def test_a_loading_that_lacks_nothing_says_so(llama, tmp_path):
    texts = []
    for library in BOTH:
        model, _ = layer_of(library, llama)
        model.save_pretrained(tmp_path)
        texts.append(repr(model.load_adapter(tmp_path, "other")))
    assert texts[0] == texts[1] == "<All keys matched successfully>"


def test_dicts_that_cannot_be_copied():
    """DeepSpeed's ZeRO-3 gives modules such dicts of parameters."""

    class OfModule(OrderedDict):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = peft_fast.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft_fast.LoraConfig(target_modules=["0"]))
    for module in model.modules():
        held = OfModule(module)
        held.update(module._parameters)
        module._parameters = held
    with pytest.raises(TypeError):
        held.copy()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="no_such"):
        model.add_adapter("other", peft_fast.LoraConfig(target_modules=["no_such"]))
    assert list(model.state_dict()) == keys
    model.add_adapter("other", peft_fast.LoraConfig(target_modules=["0"]))
    assert len(model.state_dict()) == len(keys) + 2
