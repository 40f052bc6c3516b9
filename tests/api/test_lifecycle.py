"""Several adapters, step by step beside peft 0.21.2: names, what is active, what is trained, and outputs."""

import peft
import pytest
import torch

import peft_fast

LIBRARIES = [peft_fast, peft]


class Pair:
    """The same steps with both libraries; after each everything that can be seen must be equal."""

    def __init__(self, llama, trained, tokens, folder):
        self.trained, self.tokens, self.folder = trained, tokens, folder
        self.models = []
        for library in LIBRARIES:
            torch.manual_seed(5)
            config = library.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
            self.models.append(library.get_peft_model(llama(), config))
        self.compare()

    def do(self, step):
        torch.manual_seed(6)
        for library, model in zip(LIBRARIES, self.models):
            torch.manual_seed(6)
            step(model, library, self.folder / library.__name__)
        self.compare()

    def train(self):
        for model in self.models:
            self.trained(model)
        self.compare()

    def compare(self):
        ours, theirs = self.models
        flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in self.models]
        assert flags[0] == flags[1]
        assert list(ours.peft_config) == list(theirs.peft_config)
        assert ours.active_adapters == theirs.active_adapters
        if len(ours.active_adapters) == 1:  # with several peft still names the one that was set last, alone
            assert ours.active_adapter == theirs.active_adapter
        assert ours.training == theirs.training
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        torch.testing.assert_close(ours(self.tokens).logits, theirs(self.tokens).logits, rtol=1e-4, atol=1e-6)


@pytest.fixture
def pair(llama, trained, tokens, tmp_path):
    return Pair(llama, trained, tokens, tmp_path)


def add(name, **options):
    return lambda model, library, _: model.add_adapter(name, library.LoraConfig(**{"r": 2, **options}))


def test_adding_setting_and_deleting(pair):
    pair.do(add("other", target_modules=["up_proj", "down_proj"]))
    pair.do(add("for_use", target_modules=["q_proj"], inference_mode=True))
    pair.do(add("whole", target_modules=["q_proj"], modules_to_save=["lm_head"]))
    pair.train()
    for name in ("other", "for_use", "whole", "default"):
        pair.do(lambda model, library, _, name=name: model.set_adapter(name))
        pair.do(lambda model, library, _, name=name: model.set_adapter(name, inference_mode=True))
        pair.do(lambda model, library, _, name=name: model.set_requires_grad(name))
        pair.do(lambda model, library, _, name=name: model.set_requires_grad([name, "other"], requires_grad=False))
    pair.do(lambda model, library, _: model.base_model.set_adapter(["default", "other"], inference_mode=True))
    pair.do(lambda model, library, _: model.base_model.set_adapter(["other", "whole"]))
    pair.do(lambda model, library, _: model.set_adapter("default"))
    for name in ("whole", "other", "for_use"):
        pair.do(lambda model, library, _, name=name: model.delete_adapter(name))


def test_switching_off(pair):
    pair.do(add("other", target_modules=["up_proj", "down_proj"]))
    pair.train()

    def inside(model, library, _):
        with model.disable_adapter():
            assert torch.equal(model(pair.tokens).logits, base)
            assert not any(parameter.requires_grad for parameter in model.parameters())

    base = pair.models[0].get_base_model()
    with pair.models[0].disable_adapter():
        base = base(pair.tokens).logits
    pair.do(inside)
    pair.do(lambda model, library, _: model.base_model.disable_adapter_layers())
    pair.do(lambda model, library, _: model.base_model.enable_adapter_layers())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_several(pair, low_cpu_mem_usage):
    pair.do(add("other", target_modules=["up_proj", "down_proj"], modules_to_save=["lm_head"]))
    pair.train()
    pair.do(lambda model, library, folder: model.save_pretrained(folder))
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    pair.do(lambda model, library, folder: model.load_adapter(folder / "other", "third", **options))
    pair.do(lambda model, library, folder: model.load_adapter(folder, "fourth", is_trainable=True, **options))
    for name in ("third", "fourth"):
        pair.do(lambda model, library, _, name=name: model.set_adapter(name))
    pair.train()
    pair.do(lambda model, library, folder: model.load_adapter(folder, "fourth", is_trainable=True))
    pair.do(lambda model, library, _: model.delete_adapter("other"))
    for library, model in zip(LIBRARIES, pair.models):
        with pytest.raises(ValueError, match="exist"):
            add("third")(model, library, None)


def test_merging_one_of_several(pair):
    pair.do(add("other", target_modules=["up_proj", "down_proj"]))
    pair.train()
    pair.do(lambda model, library, _: model.merge_adapter(adapter_names=["other"]))
    pair.do(lambda model, library, _: model.unmerge_adapter())
    pair.do(lambda model, library, _: model.merge_adapter())
    pair.do(lambda model, library, _: model.unmerge_adapter())
    merged = [model.merge_and_unload(adapter_names=["default", "other"], safe_merge=True) for model in pair.models]
    torch.testing.assert_close(*(model(pair.tokens).logits for model in merged), rtol=1e-4, atol=1e-6)
