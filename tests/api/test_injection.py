"""The mechanism that all methods share: putting adapters into a model, switching them, taking them out."""

import peft
import pytest
import torch
from torch import nn

from peft_fast import LoraConfig, PeftModel, get_peft_model
from peft_fast.transaction import unchanged_on_error
from peft_fast.tuners import BaseTunerLayer, ModulesToSaveWrapper
from peft_fast.tuners.lora import Linear


def adapted(model, **options):
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options}))


def graph(model):
    return [(name, id(module)) for name, module in model.named_modules()]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class Mixture(nn.Module):
    """Layers whose last names say little."""

    def __init__(self):
        super().__init__()
        self.tower = nn.ModuleDict({"proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.other = nn.ModuleDict({"proj": nn.LayerNorm(4), "out": nn.Linear(4, 4)})


def test_layers_stand_where_the_targets_stood(llama):
    base = llama()
    before = dict(base.named_modules())
    model = adapted(base, target_modules=["q_proj", "down_proj"])
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            assert module.base_layer is before[name]
    names = [f"model.layers.{i}.{end}" for i in (0, 1) for end in ("self_attn.q_proj", "mlp.down_proj")]
    assert model.base_model.targeted_module_names == names
    assert repr(base.model.layers[0].self_attn.q_proj).startswith("lora.Linear(")


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_unload_gives_the_same_objects_back(llama, trained, options):
    base = llama(attention_bias=True)
    before, values = graph(base), {name: p.clone() for name, p in base.named_parameters()}
    returned = trained(adapted(base, target_modules="all-linear", **options)).unload()
    assert returned is base
    assert graph(base) == before
    assert all(torch.equal(values[name], parameter) for name, parameter in base.named_parameters())


@pytest.mark.parametrize("layers", [2, 3])
def test_many_names_are_saved_by_their_shortest_unambiguous_ends(llama, layers):
    paths = {name for name, module in llama(num_hidden_layers=layers).named_modules() if type(module) is nn.Linear}
    layers_of = {name for name in paths if name != "lm_head"}
    ends = {name.rpartition(".")[2] for name in layers_of}
    few = {name for name in layers_of if not name.endswith("2.self_attn.q_proj")}
    for targets in ("all-linear", layers_of, few, sorted(few)[:19], sorted(ends)):
        given = targets if isinstance(targets, str) else list(targets)
        theirs = peft.get_peft_model(llama(num_hidden_layers=layers), peft.LoraConfig(target_modules=given))
        ours = adapted(llama(num_hidden_layers=layers), target_modules=given)
        assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules
        assert set(ours.base_model.targeted_module_names) == set(theirs.base_model.targeted_module_names)
        if targets == "all-linear":
            assert ours.peft_config["default"].target_modules == (ends if layers == 3 else layers_of)


def test_all_linear_where_ends_are_ambiguous():
    model = adapted(Mixture(), target_modules="all-linear")
    assert model.peft_config["default"].target_modules == {"tower.proj", "other.out"}
    assert model.base_model.targeted_module_names == ["tower.proj", "other.out"]


def test_a_second_all_linear_adapter_does_not_adapt_the_first(llama):
    model = adapted(llama(), target_modules="all-linear")
    names = list(model.base_model.targeted_module_names)
    model.add_adapter("other", LoraConfig(target_modules="all-linear"))
    assert model.base_model.targeted_module_names == names


def test_a_second_adapter_waits_to_be_set(llama, trained, tokens):
    model = adapted(llama(), modules_to_save=["lm_head"])
    first = trainable(model)
    before = model(tokens).logits
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "k_proj"], modules_to_save=["lm_head"]))
    trained_other = {n: p for n, p in model.named_parameters() if ".other." in n}
    for parameter in trained_other.values():
        parameter.data += 0.1
    assert trainable(model) == first
    assert torch.equal(model(tokens).logits, before)
    model.set_adapter("other")
    assert (model.active_adapter, model.active_adapters) == ("other", ["other"])
    assert trainable(model) == set(trained_other)
    assert not torch.equal(model(tokens).logits, before)
    model.set_adapter("default")
    assert trainable(model) == first
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_a_second_adapter_changes_nothing_about_what_is_trainable(llama, inference_mode):
    model = adapted(llama(), target_modules=["q_proj", "k_proj"])
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    before = trainable(model)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"], inference_mode=inference_mode))
    assert trainable(model) == before


def test_deleting_adapters(llama, trained, tokens):
    model = adapted(llama(), modules_to_save=["lm_head"])
    without = model(tokens).logits
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    trained(model)
    with pytest.warns(UserWarning, match="'other' is active now"):
        model.delete_adapter("default")
    assert model.active_adapter == "other"
    assert not any(".default." in name for name in model.state_dict())
    assert trainable(model) == {name for name in model.state_dict() if ".other." in name}
    model.delete_adapter("other")
    assert model.active_adapters == []
    assert torch.equal(model(tokens).logits, without)
    with pytest.raises(ValueError, match="'other' does not exist"):
        model.delete_adapter("other")


def test_an_adapter_for_inference_takes_over_frozen(llama):
    model = adapted(llama())
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], inference_mode=True))
    with pytest.warns(UserWarning, match="'other' is active now"):
        model.delete_adapter("default")
    assert trainable(model) == set()


def test_a_merged_adapter_cannot_be_deleted(llama):
    model = adapted(llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter first"):
        model.delete_adapter("default")


def test_disabling_restores_what_was_trainable_and_nothing_else(llama, trained, tokens):
    base = llama()
    reference = base(tokens).logits
    model = trained(adapted(base, modules_to_save=["lm_head"]))
    model.add_adapter("frozen", LoraConfig(target_modules=["k_proj"]))
    before, flags = model(tokens).logits, trainable(model)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, reference)
        assert trainable(model) == set()
        with model.disable_adapter():
            pass
        assert torch.equal(model(tokens).logits, reference)
    assert torch.equal(model(tokens).logits, before)
    assert trainable(model) == flags
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert trainable(model) == flags


def test_an_inference_adapter_stays_frozen_when_it_was_disabled(llama):
    model = adapted(llama(), inference_mode=True)
    with model.disable_adapter():
        pass
    assert trainable(model) == set()


def test_modules_to_save_answers_for_the_module(llama, trained, tokens):
    base = llama()
    head = base.lm_head
    model = adapted(base, modules_to_save=["lm_head"])
    wrapper = base.lm_head
    assert isinstance(wrapper, ModulesToSaveWrapper)
    assert (wrapper.in_features, wrapper.original_module) == (64, head)
    assert wrapper.weight is wrapper.modules_to_save["default"].weight
    assert trainable(model) >= {"base_model.model.lm_head.modules_to_save.default.weight"}
    trained(model)
    logits = model(tokens).logits
    assert torch.allclose(model.merge_and_unload()(tokens).logits, logits, atol=1e-5)
    assert base.lm_head is not head


def test_two_copies_of_a_module_cannot_be_active_at_once(llama, untouched):
    model = adapted(llama(), modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    for _ in ("as it is", "merged"):
        with untouched(model), pytest.raises(ValueError, match="outputs of whole modules cannot be summed"):
            model.base_model.set_adapter(["default", "other"])
        assert model.active_adapters == ["default"]
        model.merge_adapter()


def test_setting_an_adapter_unmerges_the_others(llama, trained, tokens):
    model = trained(adapted(llama()))
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    before = model(tokens).logits
    model.merge_adapter()
    with pytest.warns(UserWarning, match="are unmerged before"):
        model.set_adapter("other")
    model.set_adapter("default")
    torch.testing.assert_close(model(tokens).logits, before)


def test_injection_that_fails_half_way_leaves_the_model_as_it_was(llama, untouched, monkeypatch):
    calls = []
    update = Linear.update_layer

    def fail_at_the_third(self, *args, **kwargs):
        calls.append(self)
        update(self, *args, **kwargs)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    base = llama()
    monkeypatch.setattr(Linear, "update_layer", fail_at_the_third)
    with untouched(base), pytest.raises(RuntimeError, match="out of memory"):
        adapted(base, target_modules="all-linear", modules_to_save=["lm_head"])
    monkeypatch.undo()

    model = adapted(base, target_modules="all-linear", modules_to_save=["lm_head"])
    calls.clear()
    monkeypatch.setattr(Linear, "update_layer", fail_at_the_third)
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head", "norm"])
    with untouched(model), pytest.raises(RuntimeError, match="out of memory"):
        model.add_adapter("other", config)
    assert list(model.peft_config) == ["default"]
    assert config.target_modules == "all-linear"


def test_the_transaction_keeps_containers_and_hooks_themselves():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.numbers = {"a": 1}
    handle = model[0].register_forward_hook(lambda *args: None)
    containers = [model._modules, model.numbers, model[0]._forward_hooks]

    def change_everything():
        model[1] = nn.Identity()
        model.extra = nn.Linear(1, 1)
        model.numbers["b"] = 2
        model[0].weight.requires_grad_(False)
        model[0].register_forward_hook(print)
        model.eval()
        raise KeyError

    with pytest.raises(KeyError), unchanged_on_error(model):
        change_everything()
    assert isinstance(model[1], nn.Linear)
    assert not hasattr(model, "extra")
    assert model.numbers == {"a": 1}
    assert model[0].weight.requires_grad
    assert model.training
    assert containers[0] is model._modules
    assert containers[1] is model.numbers
    assert containers[2] is model[0]._forward_hooks
    assert len(model[0]._forward_hooks) == 1
    handle.remove()
    assert len(model[0]._forward_hooks) == 0


def test_low_cpu_mem_usage_makes_adapters_on_meta(llama):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == ("lora_" in name)


def test_layers_that_are_named_but_absent_are_warned_of(llama):
    with pytest.warns(UserWarning, match=r"target_modules \['q_prj'\] match nothing: did you mean q_proj"):
        adapted(llama(), target_modules=["q_prj", "v_proj"])
    with pytest.warns(UserWarning, match=r"exclude_modules \['nothing'\] match nothing"):
        adapted(llama(), exclude_modules=["nothing"])
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys \['k_proj'\] match no target"):
        adapted(llama(), rank_pattern={"k_proj": 3})


def test_a_second_get_peft_model_warns(llama):
    base = llama()
    adapted(base)
    with pytest.warns(UserWarning, match="has adapters already"):
        get_peft_model(base, LoraConfig(target_modules=["k_proj"]), adapter_name="second")


def test_fan_in_fan_out_is_reset_for_linear_layers(llama):
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = adapted(llama(), fan_in_fan_out=True)
    assert not model.peft_config["default"].fan_in_fan_out


def test_a_plain_module_can_be_adapted():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), LoraConfig(target_modules=["0"]))
    assert type(model) is PeftModel
    assert model(torch.ones(3, 4)).shape == (3, 2)
    assert trainable(model) == {f"base_model.model.0.lora_{m}.default.weight" for m in "AB"}


@pytest.mark.parametrize("modules_to_save", [None, ["norm"]])
def test_adding_an_adapter_while_all_are_off_changes_nothing_for_those_there(llama, tokens, modules_to_save):
    model = adapted(llama())
    before, logits = trainable(model), model(tokens).logits
    with model.disable_adapter():
        config = LoraConfig(target_modules=["q_proj", "k_proj"], modules_to_save=modules_to_save)
        model.add_adapter("other", config)
        assert all(holder.disable_adapters for _, holder in model.base_model.holders())
        assert trainable(model) == set()
    assert trainable(model) == before
    assert not any(holder.disable_adapters for _, holder in model.base_model.holders())
    assert torch.equal(model(tokens).logits, logits)


def test_adapters_that_were_off_stay_off_after_disable_adapter(llama):
    model = adapted(llama())
    before = trainable(model)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        model.add_adapter("other", LoraConfig(target_modules=["k_proj"]))
    assert all(holder.disable_adapters for _, holder in model.base_model.holders())
    assert trainable(model) == set()
    model.base_model.enable_adapter_layers()
    assert trainable(model) == before
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.enable_adapters(False)
    with model.disable_adapter():
        pass
    assert [h for _, h in model.base_model.holders() if h.disable_adapters] == [layer]


def test_the_first_adapter_after_all_were_deleted_is_active(llama):
    model = adapted(llama())
    before = trainable(model)
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, target_modules=["q_proj"]))
    assert (model.active_adapters, trainable(model)) == (["default"], before)


def test_biases_are_not_trained_in_a_module_that_a_copy_stands_for():
    model = adapted(Mixture(), target_modules=["tower.proj"], bias="all", modules_to_save=["other.out"])
    biases = {name.removeprefix("base_model.model.") for name in trainable(model) if name.endswith("bias")}
    assert "other.out.modules_to_save.default.bias" in biases
    assert not any("original_module" in name for name in biases)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.block = nn.ModuleDict({"inner": nn.Linear(8, 8)})
        self.again = self.block

    def forward(self, x):
        return self.again["inner"](self.block["inner"](self.second(self.first(x))))


def test_a_module_under_several_names_gets_one_layer(trained):
    base = Tied()
    before, x = graph(base), torch.randn(2, 8)
    names = ["first", "second", "inner"]
    model = trained(adapted(base, target_modules=names, lora_alpha=64))
    assert base.first is base.second
    assert isinstance(base.first, Linear)
    assert isinstance(base.again["inner"], Linear)
    assert not isinstance(base.again["inner"].base_layer, Linear)
    assert model.base_model.targeted_module_names == ["first", "second", "block.inner", "again.inner"]
    model.add_adapter("other", LoraConfig(target_modules=names))
    assert len(list(model.base_model.layers())) == 2
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
    assert graph(base) == before


def test_loading_an_adapter_while_all_are_off_changes_nothing_for_those_there(llama, tmp_path):
    model = adapted(llama())
    model.save_pretrained(tmp_path)
    before = trainable(model)
    with model.disable_adapter():
        model.load_adapter(tmp_path, "other")
    assert trainable(model) == before
