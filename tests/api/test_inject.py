"""Adapters in a model without a PeftModel around it, beside peft 0.21.2, and get_peft_config."""

import copy
import warnings

import peft
import peft.functional
import pytest
import torch
from torch import nn

import peft_fast
import peft_fast.functional
from peft_fast import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft_fast import set_peft_model_state_dict as set_state_dict

LIBRARIES = [peft_fast, peft]
TARGETS = ["q_proj", "up_proj"]


def inject(library, model, name="default", state_dict=None, low_cpu_mem_usage=False, **options):
    torch.manual_seed(5)
    config = library.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options})
    return library.inject_adapter_in_model(config, model, name, low_cpu_mem_usage, state_dict)


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"inference_mode": True}], ids=str)
def test_the_model_itself_is_adapted_as_in_peft(llama, options, dtype):
    bases = [llama(dtype) for _ in LIBRARIES]
    ours, theirs = (inject(library, base, **options) for library, base in zip(LIBRARIES, bases))
    assert ours is bases[0]
    assert flags(ours) == flags(theirs)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert mine.dtype == other.dtype, name
        assert torch.equal(mine, other), name
    assert list(ours.peft_config) == list(theirs.peft_config) == ["default"]
    assert not isinstance(ours, peft_fast.PeftModel)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_state_dicts_are_pefts_and_travel_both_ways(llama, tokens, trained, modules_to_save):
    models = [trained(inject(library, llama(), modules_to_save=modules_to_save)) for library in LIBRARIES]
    dicts = [library.get_peft_model_state_dict(model) for library, model in zip(LIBRARIES, models)]
    assert dicts[0].keys() == dicts[1].keys()
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in dicts[0]
    fresh = [inject(library, llama(), modules_to_save=modules_to_save) for library in LIBRARIES]
    results = [library.set_peft_model_state_dict(m, d) for library, m, d in zip(LIBRARIES, fresh, reversed(dicts))]
    assert all(not result.unexpected_keys for result in results)
    assert results[0].missing_keys == []
    torch.testing.assert_close(fresh[0](tokens).logits, models[1](tokens).logits)
    torch.testing.assert_close(fresh[1](tokens).logits, models[0](tokens).logits)
    for library, model in zip(LIBRARIES, fresh):  # what a PeftModel saved, in a model without one around it
        wrapped = {f"base_model.model.{key}": 2 * value for key, value in dicts[0].items()}
        if modules_to_save and library is peft_fast:  # peft: a KeyError
            assert set_state_dict(model, wrapped) == ([], [])
        elif not modules_to_save:
            library.set_peft_model_state_dict(model, wrapped)
            assert torch.equal(
                library.get_peft_model_state_dict(model)[next(iter(dicts[0]))], wrapped[next(iter(wrapped))]
            )


def test_several_adapters(llama, tokens, trained):
    model = inject(peft_fast, llama())
    with pytest.warns(UserWarning, match="already"):
        inject(peft_fast, model, "other", r=2, target_modules=["up_proj", "down_proj"])
    assert list(model.peft_config) == ["default", "other"]
    status = peft_fast.get_model_status(model)
    assert status.active_adapters == ["other"]
    assert status.requires_grad == {"default": True, "other": True}  # as in peft: the first stays as it was
    trained(model)
    for name in ("default", "other"):
        twin = inject(peft_fast, llama(), name, **vars_of(model.peft_config[name]))
        set_state_dict(twin, get_peft_model_state_dict(model, adapter_name=name), name)
        for layer in model.modules():
            if isinstance(layer, peft_fast.tuners.BaseTunerLayer):
                layer.set_adapter(name)
        torch.testing.assert_close(twin(tokens).logits, model(tokens).logits)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    assert list(get_peft_model_state_dict(twin, adapter_name="other"))


def vars_of(config):
    return {"r": config.r, "target_modules": config.target_modules}


def test_on_the_meta_device(llama, tokens, trained):
    model = trained(inject(peft_fast, llama()))
    tensors = get_peft_model_state_dict(model)
    empty = inject(peft_fast, llama(), low_cpu_mem_usage=True)
    assert all(parameter.is_meta for name, parameter in empty.named_parameters() if "lora_" in name)
    set_state_dict(empty, tensors, low_cpu_mem_usage=True)
    assert torch.equal(empty(tokens).logits, model(tokens).logits)


class TestFromAStateDict:
    def tensors(self, llama, **options):
        return get_peft_model_state_dict(inject(peft_fast, llama(), **options))

    @pytest.mark.parametrize("prefix", ["", "base_model.model.", "_orig_mod."])
    @pytest.mark.parametrize("given", [None, "the same"])
    def test_its_keys_say_what_is_adapted(self, llama, prefix, given):
        targets = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"]
        tensors = {prefix + key: value for key, value in self.tensors(llama, target_modules=targets).items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = inject(peft_fast, llama(), state_dict=tensors, target_modules=given and targets)
        assert [status.name for status in peft_fast.get_layer_status(model)] == sorted(targets)
        assert model.peft_config["default"].target_modules == set(targets)
        if given and prefix != "base_model.model.":
            assert flags(model) == flags(inject(peft, llama(), state_dict=tensors, target_modules=targets))

    def test_where_the_config_differs_it_counts(self, llama):
        tensors = self.tensors(llama, target_modules=["k_proj"])
        with pytest.warns(
            RuntimeWarning, match="state_dict counts: only the config has .*q_proj.*only state_dict has .*k_p"
        ):
            model = inject(peft_fast, llama(), state_dict=tensors)
        with pytest.warns(RuntimeWarning, match="inconsistency"):
            theirs = inject(peft, llama(), state_dict=tensors)
        assert flags(model) == flags(theirs)
        twin = inject(peft_fast, llama(), target_modules=model.peft_config["default"].target_modules)
        assert flags(model) == flags(twin)  # the config describes what is there

    def test_a_path_that_is_anothers_end(self):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.proj, self.inner = nn.Linear(4, 4), nn.ModuleDict({"proj": nn.Linear(4, 4)})

        tensors = {"proj.lora_A.weight": torch.zeros(2, 4), "proj.lora_B.weight": torch.zeros(4, 2)}
        models = [inject(library, Outer(), state_dict=tensors, r=2, target_modules=["proj"]) for library in LIBRARIES]
        assert flags(models[0]) == flags(models[1])
        again = inject(peft_fast, Outer(), r=2, target_modules=models[0].peft_config["default"].target_modules)
        assert flags(again) == flags(models[0])

    def test_what_does_not_fit(self, llama, untouched):
        model = llama()
        for tensors in ({}, {"elsewhere.lora_A.weight": torch.zeros(1)}, {"lm_head.weight": torch.zeros(1)}):
            with untouched(model), pytest.raises(ValueError, match="state_dict names no layer of LlamaForCausalLM"):
                inject(peft_fast, model, state_dict=tensors)
        tensors = self.tensors(llama)
        with untouched(model), pytest.raises(ValueError, match="exclude_modules.*of the config take away"):
            inject(peft_fast, model, state_dict=tensors, exclude_modules=["up_proj"])
        with pytest.warns(UserWarning, match="layers that the model lacks: .'elsewhere'"):
            inject(peft_fast, model, state_dict=tensors | {"elsewhere.lora_A.weight": torch.zeros(1)})


def test_what_is_refused(llama, untouched):
    plain, wrapped = llama(), get_peft_model(llama(), LoraConfig())
    with untouched(plain):
        with pytest.raises(TypeError, match="peft_config must be a PeftConfig"):
            inject_adapter_in_model({"peft_type": "LORA"}, plain)
        with pytest.raises(ValueError, match="not found"):
            inject(peft_fast, plain, target_modules=["nothing"])
        assert not hasattr(plain, "peft_config")
        for call in (get_peft_model_state_dict, lambda m: set_state_dict(m, {})):
            with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters"):
                call(plain)
    with untouched(wrapped):
        with pytest.raises(ValueError, match="call add_adapter"):
            inject(peft_fast, wrapped)
        with pytest.raises(ValueError, match="belong to a PeftModel around it"):
            inject(peft_fast, wrapped.get_base_model())
        outer, compiled = nn.Sequential(wrapped), torch.compile(wrapped, backend="eager")
        calls = [get_peft_model_state_dict, lambda m: set_state_dict(m, {}), lambda m: inject(peft_fast, m)]
        for call, model in [*((call, outer) for call in calls), (calls[-1], compiled)]:
            with pytest.raises(ValueError, match="is a wrapper around a PeftModel"):
                call(model)
    assert get_peft_model_state_dict(torch.compile(wrapped, backend="eager"), unwrap_compiled=True)
    model = inject(peft_fast, llama())
    with untouched(model):
        with pytest.raises(ValueError, match="'default' exists already"):
            inject(peft_fast, model)
        with pytest.raises(ValueError, match="not found"):
            inject(peft_fast, model, "other", target_modules=["nothing"])


class TestFunctional:
    def both(self, llama, **options):
        models = []
        for library in LIBRARIES:
            model = inject(library, llama(), **options)
            inject(library, model, "other", target_modules=["up_proj", "down_proj"], **options)
            models.append(model)
        return models

    def test_setting_and_freezing(self, llama, tokens, trained):
        models = [trained(model) for model in self.both(llama)]
        calls = [
            lambda f, m: f.set_adapter(m, "default"),
            lambda f, m: f.set_adapter(m, ["default", "other"]),
            lambda f, m: f.set_adapter(m, "other", inference_mode=True),
            lambda f, m: f.set_requires_grad(m, "other"),
            lambda f, m: f.set_requires_grad(m, ["default", "other"], requires_grad=False),
        ]
        for call in calls:
            for library, model in zip(LIBRARIES, models):
                call(library.functional, model)
            assert flags(models[0]) == flags(models[1])
            torch.testing.assert_close(models[0](tokens).logits, models[1](tokens).logits)

    def test_deleting(self, llama):
        models = self.both(llama)
        for library, model in zip(LIBRARIES, models):
            library.functional.set_adapter(model, "default")
            assert library.functional.delete_adapter(model, "other", prefix="lora_") == ["default"]
        assert flags(models[0]) == flags(models[1])
        ours = models[0]
        assert list(ours.peft_config) == ["default"]
        assert peft_fast.functional.delete_adapter(ours, "default", prefix="lora_") is None
        assert not [name for name in flags(ours) if "lora_" in name]
        inject(peft_fast, ours, "again")
        assert peft_fast.get_model_status(ours).active_adapters == ["again"]

    def test_casting(self, llama):
        model = inject(peft_fast, llama(torch.bfloat16))
        weights = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        peft_fast.functional.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
        assert {weight.dtype for weight in weights} == {torch.bfloat16}
        peft_fast.functional.cast_adapter_dtype(model, "default")
        assert {weight.dtype for weight in weights} == {torch.float32}

    def test_what_is_refused(self, llama, untouched):
        model, f = inject(peft_fast, llama()), peft_fast.functional
        with untouched(model):
            for call in (f.set_adapter, f.delete_adapter, f.set_requires_grad, f.cast_adapter_dtype):
                with pytest.raises(ValueError, match="'nobody' does not exist"):
                    call(model, "nobody")
                with pytest.raises(ValueError, match="has no adapters"):
                    call(llama(), "default")
            with pytest.raises(ValueError, match="prefix must be 'lora_'"):
                f.delete_adapter(model, "default", "hada_")
            with pytest.raises(ValueError, match="no layers of the class"):
                f.set_adapter(model, "default", layer_cls=nn.Linear)


class TestGetPeftConfig:
    def test_a_dict_is_a_config(self):
        options = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "target_modules": ["q_proj"], "bias": "all"}
        ours, theirs = (library.get_peft_config(dict(options)) for library in LIBRARIES)
        assert type(ours) is LoraConfig
        assert {name: getattr(ours, name) for name in options} == {name: getattr(theirs, name) for name in options}

    def test_unknown_keys(self):
        old = {"enable_lora": None, "postprocess_past_key_value_function": None}
        with pytest.warns(UserWarning, match="no options .'enable_lora', 'postprocess_past_key_value_function'.: they"):
            config = peft_fast.get_peft_config({"peft_type": "LORA", "r": 2, **old})
        assert config == LoraConfig(r=2)
        for value in (False, 0, [True]):
            with pytest.raises(TypeError, match="unknown config key for LoraConfig: 'enable_lora'"):
                peft_fast.get_peft_config({"peft_type": "LORA", "enable_lora": value, "other": None})
        for library in LIBRARIES:
            with pytest.raises(TypeError, match="enable_lora"):
                library.LoraConfig(enable_lora=None)

    def test_no_config(self):
        with pytest.raises(TypeError, match="config_dict must be a dict of options, got None"):
            peft_fast.get_peft_config(None)
        for options in ({}, {"peft_type": None}, {"r": 8}):
            with pytest.raises(ValueError, match="must have a key 'peft_type'"):
                peft_fast.get_peft_config(options)
        with pytest.raises(ValueError, match="unknown peft_type 'LORE'"):
            peft_fast.get_peft_config({"peft_type": "LORE"})
        with pytest.raises(NotImplementedError, match="POLY is not built"):
            peft_fast.get_peft_config({"peft_type": "POLY"})
