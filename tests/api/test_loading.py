"""What an adapter's file may look like, and the arguments that say how it is read: beside peft on the same file."""

import importlib
import json
import warnings
from inspect import signature

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import peft_fast
from peft_fast import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLACE = "base_model.model.model.layers.0.self_attn.q_proj"
BOTH = [peft_fast, peft]


@pytest.fixture
def saved(llama, trained, tmp_path):
    """Saves an adapter with these options and returns its folder and its model."""

    def save(safe=True, **options):
        base = llama(attention_bias=True)
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        model = trained(get_peft_model(base, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))).eval()
        model.save_pretrained(tmp_path, safe_serialization=safe)
        return tmp_path, model

    return save


def llava():
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))


def rewrite(folder, change):
    """Every key of the file becomes `change(key)`."""
    tensors = load_file(folder / WEIGHTS)
    changed = {change(key): value for key, value in tensors.items()}
    assert changed.keys() != tensors.keys()
    save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})


def with_the_adapters_name(key):
    return key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


class TestOlderKeys:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_names_as_they_are_in_the_model(self, llama, saved, tokens, low_cpu_mem_usage):
        folder, model = saved()
        rewrite(folder, with_the_adapters_name)
        for library in BOTH:
            read = library.PeftModel.from_pretrained(
                llama(attention_bias=True), folder, low_cpu_mem_usage=low_cpu_mem_usage
            )
            read.load_state_dict({k: v for k, v in model.state_dict().items() if "bias" in k}, strict=False)
            torch.testing.assert_close(read(tokens).logits, model(tokens).logits)

    def test_what_torch_compile_adds(self, llama, saved, tokens):
        folder, model = saved(modules_to_save=["lm_head"])
        rewrite(folder, lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."))
        assert PeftModel.from_pretrained(llama(attention_bias=True), folder).load_adapter(folder, "x") == ([], [])
        rewrite(folder, lambda key: "_orig_mod." + key)
        read = PeftModel.from_pretrained(llama(attention_bias=True), folder)
        assert torch.equal(read.lm_head.weight, model.lm_head.weight)

    def test_biases_from_before_there_was_a_base_layer(self, llama, saved, tokens):
        folder, model = saved(bias="all")
        rewrite(folder, lambda key: key.replace(".base_layer.", "."))
        assert f"{PLACE}.bias" in load_file(folder / WEIGHTS)
        read = PeftModel.from_pretrained(llama(attention_bias=True), folder)
        assert torch.equal(read(tokens).logits, model(tokens).logits)

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_names_that_transformers_has_changed_since(self, trained, tmp_path, wrapped):
        """Llava's language_model.model.layers is model.language_model.layers now."""
        base = llava()
        config = {"target_modules": ["q_proj"], "exclude_modules": ".*vision.*", "task_type": "CAUSAL_LM"}
        model = trained(get_peft_model(base, LoraConfig(**config)))
        model.save_pretrained(tmp_path)
        state = get_peft_model_state_dict(model)
        base = model.unload()
        rewrite(tmp_path, lambda key: key.replace("model.model.language_model.", "model.language_model.model."))
        if not wrapped:
            base = inject_adapter_in_model(LoraConfig(**config), base)
            assert set_peft_model_state_dict(base, load_peft_weights(tmp_path)) == ([], [])
            got = get_peft_model_state_dict(base)
            assert all(torch.equal(got[key.removeprefix("base_model.model.")], state[key]) for key in state)
            return
        for library in BOTH:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*missing adapter keys|.*lacks weights")
                read = library.PeftModel.from_pretrained(base, tmp_path)
            got = library.get_peft_model_state_dict(read)
            assert got.keys() == state.keys()
            assert all(torch.equal(got[key], state[key]) for key in state)
            base = read.unload()

    def test_a_weight_under_two_keys_must_be_the_same(self, llama, saved, untouched):
        folder, _ = saved()
        tensors = load_file(folder / WEIGHTS)
        key = f"{PLACE}.lora_A.weight"
        save_file({**tensors, with_the_adapters_name(key): tensors[key].clone()}, folder / WEIGHTS)
        read = PeftModel.from_pretrained(llama(attention_bias=True), folder)
        assert torch.equal(read.state_dict()[with_the_adapters_name(key)], tensors[key])
        save_file({**tensors, with_the_adapters_name(key): tensors[key] + 1}, folder / WEIGHTS)
        base = llama(attention_bias=True)
        with untouched(base, folder), pytest.raises(ValueError, match="twice, with other values"):
            PeftModel.from_pretrained(base, folder)


class TestKeyMapping:
    def test_as_peft_maps(self, llama, saved, tokens):
        folder, model = saved(modules_to_save=["lm_head"])
        model.load_state_dict(
            {k: torch.zeros_like(v) for k, v in model.state_dict().items() if "bias" in k}, strict=False
        )
        rewrite(folder, lambda key: key.replace("model.model.layers.", "model.decoder.blocks.").replace("lm_", "out_"))
        mapping = {r"^decoder\.blocks\.": "model.layers.", "out_": "lm_", r"layers\.0": "never reached"}
        loaded = [library.load_peft_weights(folder, "cpu", mapping) for library in (peft_fast, peft.utils)]
        assert sorted(loaded[0]) == sorted(loaded[1])
        for library in BOTH:
            read = library.PeftModel.from_pretrained(llama(attention_bias=True), folder, key_mapping=mapping)
            torch.testing.assert_close(read(tokens).logits, model(tokens).logits)
            read.load_adapter(folder, "other", key_mapping=mapping)
            read.set_adapter("other")
            torch.testing.assert_close(read(tokens).logits, model(tokens).logits)

    def test_models_bring_their_own(self, llama, saved, tokens):
        folder, _ = saved()
        rewrite(folder, lambda key: key.replace("model.model.layers.", "model.blocks."))
        for library in BOTH:
            base = llama(attention_bias=True)
            base._checkpoint_conversion_mapping = {r"^blocks\.": "model.layers."}
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*missing adapter keys|.*lacks weights")
                library.PeftModel.from_pretrained(base, folder)

    def test_mappings_that_lose_something(self, saved, untouched):
        folder, _ = saved()
        for mapping, message in (
            ({r"layers\.\d": "layers.0"}, "gives several tensors the name"),
            ({"(": "x"}, "must map regular expressions"),
            ({"layers": r"\3"}, "must map regular expressions"),
        ):
            with untouched(None, folder), pytest.raises(ValueError, match=message):
                load_peft_weights(folder, key_mapping=mapping)


class TestArguments:
    def test_their_order_is_pefts(self):
        for name in ("PeftModel.from_pretrained", "PeftModel.load_adapter", "PeftModel.save_pretrained"):
            cls, method = name.split(".")
            ours, theirs = (list(signature(getattr(getattr(library, cls), method)).parameters) for library in BOTH)
            named = [parameter for parameter in theirs if parameter != "kwargs"]
            assert ours[: len(named)] == named
        for function in ("load_peft_weights", "get_peft_model_state_dict", "set_peft_model_state_dict"):
            modules = [importlib.import_module(f"{library.__name__}.utils.save_and_load") for library in BOTH]
            ours, theirs = (list(signature(getattr(module, function)).parameters) for module in modules)
            assert [name for name in ours if name != "hub_arguments"] == [n for n in theirs if "kwargs" not in n]

    def test_sizes_that_do_not_fit_can_be_left_out(self, llama, saved):
        folder, _ = saved()
        tensors = load_file(folder / WEIGHTS)
        key = f"{PLACE}.lora_A.weight"
        save_file({**tensors, key: torch.zeros(4, 3)}, folder / WEIGHTS)
        for library in BOTH:
            base = llama(attention_bias=True)
            with pytest.warns(UserWarning, match=r"q_proj\.lora_A"):
                read = library.PeftModel.from_pretrained(base, folder, ignore_mismatched_sizes=True)
            layer = read.base_model.model.model.layers[0].self_attn.q_proj
            assert layer.lora_A["default"].weight.abs().sum() > 0
            assert torch.equal(layer.lora_B["default"].weight, tensors[f"{PLACE}.lora_B.weight"])

    def test_missing_weights_are_named_as_in_the_model(self, llama, saved):
        folder, _ = saved()
        tensors = load_file(folder / WEIGHTS)
        key = f"{PLACE}.lora_A.weight"
        save_file({k: v for k, v in tensors.items() if k != key}, folder / WEIGHTS)
        for library in BOTH:
            with pytest.warns(UserWarning, match="lora_A.default.weight"):
                read = library.PeftModel.from_pretrained(llama(attention_bias=True), folder)
            result = read.load_adapter(folder, "other")
            assert result.missing_keys == [with_the_adapters_name(key).replace("default", "other")]

    def test_what_does_nothing_is_accepted_and_said(self, llama, saved, tokens):
        """Much code hands device_map and torch_dtype to PeftModel, where peft ignores them."""
        folder, _ = saved()
        with pytest.warns(UserWarning, match=r"\['device_map', 'torch_dtype'\] have no effect on an adapter"):
            read = PeftModel.from_pretrained(
                llama(attention_bias=True), folder, device_map="auto", torch_dtype=torch.float16
            )
        assert {p.dtype for n, p in read.named_parameters() if "lora_" in n} == {torch.float32}
        with pytest.warns(UserWarning, match=r"\['device_map'\] have no effect"):
            read.load_adapter(folder, "other", device_map={"": 0})
        with pytest.raises(TypeError, match="unknown keyword arguments .*'divice_map'"):
            read.load_adapter(folder, "third", divice_map={"": 0})

    @pytest.mark.parametrize("device", ["cuda:99", "abacus", "meta", 3.5])
    def test_devices_that_are_not_there(self, llama, saved, untouched, device):
        folder, _ = saved()
        base = llama(attention_bias=True)
        with untouched(base, folder), pytest.raises(ValueError, match="the device must"):
            PeftModel.from_pretrained(base, folder, torch_device=device)
        with pytest.raises(ValueError, match="the device must"):
            load_peft_weights(folder, device)

    def test_saving_takes_what_examples_with_accelerate_pass(self, llama, saved, tmp_path):
        _, model = saved()
        model.save_pretrained(tmp_path / "x", is_main_process=True, save_function=torch.save, max_shard_size="5GB")
        assert (tmp_path / "x" / WEIGHTS).is_file()
        with pytest.raises(ValueError, match="uploads nothing: call push_to_hub"):
            model.save_pretrained(tmp_path / "y", push_to_hub=True)
        assert not (tmp_path / "y").exists()


class TestWhatIsWritten:
    @pytest.mark.parametrize("make", ["wrapper", "added"])
    def test_the_base_model_is_named(self, llama, tmp_path, make):
        """Also where get_peft_model, which notes it in the config, was not used."""
        for library in BOTH:
            base = llama()
            base.name_or_path = "some/model"
            config = library.LoraConfig(task_type="CAUSAL_LM")
            if make == "wrapper":
                model = library.PeftModelForCausalLM(base, config)
            else:
                model = library.get_peft_model(base, library.LoraConfig(task_type="CAUSAL_LM"))
                model.add_adapter("other", config)
            folder = tmp_path / library.__name__
            model.save_pretrained(folder)
            text = (folder / ("other" if make == "added" else "") / CONFIG).read_text()
            assert json.loads(text)["base_model_name_or_path"] == "some/model"

    def test_shards_are_not_saved_over_an_adapter(self, llama, saved, untouched):
        folder, model = saved()
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data = torch.empty(0)
        with untouched(None, folder), pytest.raises(ValueError, match="1 tensors of the adapter are empty"):
            model.save_pretrained(folder)

    def test_embeddings_that_nobody_knows(self, tmp_path):
        for library in BOTH:
            model = library.get_peft_model(nn.Sequential(nn.Linear(4, 4)), library.LoraConfig(target_modules=["0"]))
            with pytest.warns(UserWarning, match="embedding|is no transformers model"):
                model.save_pretrained(tmp_path, save_embedding_layers=True)

    def test_a_vocabulary_that_cannot_be_looked_up(self, llama, tmp_path):
        for library in BOTH:
            base = llama()
            base.name_or_path = "nobody/nothing"
            model = library.get_peft_model(base, library.LoraConfig(task_type="CAUSAL_LM"))
            with pytest.warns(UserWarning, match="vocabulary"):
                model.save_pretrained(tmp_path)

    @pytest.mark.parametrize("text", ["---\na: [1\n---\nMine.", "---\n- a\n---\nMine.", "\xff\xfe"])
    def test_a_card_that_cannot_be_read_is_left_alone(self, llama, tmp_path, text):
        (tmp_path / "README.md").write_text(text, encoding="latin-1")
        with pytest.warns(UserWarning, match="README.md is left as it is"):
            get_peft_model(llama(), LoraConfig()).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text(encoding="latin-1") == text
        assert (tmp_path / WEIGHTS).is_file()

    def test_the_card_says_what_wrote_it_once(self, llama, tmp_path):
        model = get_peft_model(llama(), LoraConfig())
        (tmp_path / "README.md").write_text("---\n---\nMine.\n\n### Framework versions\n\n- peft_fast 0.0.1, old\n")
        for _ in range(2):
            model.create_or_update_model_card(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert "0.0.1" not in text
        assert text.count("- peft_fast ") == text.count("### Framework versions") == 1
        assert "Mine." in text
        assert "- transformers" in text


def test_values_on_meta_are_not_shared_with_the_callers_dict(llama, saved, tokens):
    folder, _ = saved()
    tensors = load_peft_weights(folder)
    read = get_peft_model(llama(attention_bias=True), LoraConfig(r=4, task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
    set_peft_model_state_dict(read, tensors, low_cpu_mem_usage=True)
    parameter = read.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    parameter.data.zero_()
    assert tensors[f"{PLACE}.lora_A.weight"].abs().sum() > 0


def test_add_adapter_wants_a_config(llama, untouched):
    model = get_peft_model(llama(), LoraConfig())
    with untouched(model), pytest.raises(TypeError, match="must be a PeftConfig of peft_fast"):
        model.add_adapter("other", {"r": 4})
    with untouched(model), pytest.raises(TypeError, match="got a peft.tuners.lora.config.LoraConfig"):
        model.add_adapter("other", peft.LoraConfig())


class TestTheBaseModelsStateDict:
    def model(self, library, base):
        options = {"target_modules": "all-linear", "modules_to_save": ["lm_head", "norm"], "lora_bias": True}
        return library.get_peft_model(base, library.LoraConfig(task_type="CAUSAL_LM", **options))

    def test_it_is_the_one_from_before(self, llama, tokens):
        before = llama(attention_bias=True).state_dict()
        for library in BOTH:
            state = library.get_base_model_state_dict(self.model(library, llama(attention_bias=True)))
            assert state.keys() == before.keys()
            assert all(torch.equal(value, before[key]) for key, value in state.items())

    def test_it_goes_into_a_model_with_adapters(self, llama, trained, tokens):
        other = llama(attention_bias=True)
        for parameter in other.parameters():
            parameter.data.mul_(1.5)
        for library in BOTH:
            model = trained(self.model(library, llama(attention_bias=True))).eval()
            result = library.set_base_model_state_dict(model, other.state_dict())
            assert (result.missing_keys, result.unexpected_keys) == ([], [])
            with model.disable_adapter():
                torch.testing.assert_close(model(tokens).logits, other(tokens).logits)

    def test_what_is_not_this_models(self, llama, untouched):
        good = llama(attention_bias=True).state_dict()
        key = "model.layers.0.self_attn.q_proj.weight"
        for library in BOTH:
            model = self.model(library, llama(attention_bias=True))
            partial = {"foreign": torch.zeros(1), **{k: 2 * v for k, v in good.items() if k != key}}
            with untouched(model), pytest.raises(RuntimeError, match="foreign"):
                library.set_base_model_state_dict(model, partial)
            result = library.set_base_model_state_dict(model, partial, strict=False)
            assert (result.missing_keys, result.unexpected_keys) == ([key], ["foreign"])
        with (
            untouched(model := self.model(peft_fast, llama())),
            pytest.raises(RuntimeError, match="do not fit .*q_proj"),
        ):
            peft_fast.set_base_model_state_dict(model, {**llama().state_dict(), key: torch.ones(3, 3)})


@pytest.mark.parametrize("name", ["lora", "l", "A", "w", "weight", "lora_A", "q_proj", "base_model", "layers"])
def test_adapters_may_be_called_like_a_part_of_a_key(llama, trained, tokens, tmp_path, name):
    """peft warns of names that are a part of "lora_"."""
    model = get_peft_model(llama(), LoraConfig(r=4, modules_to_save=["lm_head"]), adapter_name=name)
    trained(model).eval().save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        read = PeftModel.from_pretrained(llama(), tmp_path / name, name, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(read(tokens).logits, model(tokens).logits)
        assert read.load_adapter(tmp_path / name, "default") == ([], [])
