"""What users get wrong: a clear error, and model and files as they were."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_fast import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft_fast.quantized_linear import quantize_linear_layers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def saved(llama, trained, tmp_path):
    """The folder of an adapter that fits `llama()`."""
    model = get_peft_model(llama(), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    trained(model).save_pretrained(tmp_path)
    return tmp_path


def change(folder, **values):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["q_prj"]}, ValueError, r"\['q_prj'\] not found in the base model: did you mean q_proj"),
        ({"target_modules": ["zzz"]}, ValueError, "its modules end in model, embed_tokens"),
        ({"target_modules": "q_proj"}, ValueError, "'q_proj' not found in the base model: did you mean q_proj"),
        ({"target_modules": []}, ValueError, r"target_modules \[\] not found"),
        ({"target_modules": ["self_attn"]}, ValueError, "cannot adapt model.layers.0.self_attn, a LlamaAttention"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, ValueError, "input_layernorm, a LlamaRMSNorm"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, ValueError, "exclude_modules=.* takes all of them away"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [7]},
            ValueError,
            r"layers_to_transform=\[7\] takes all",
        ),
        ({"modules_to_save": ["lm_hed"]}, ValueError, r"modules_to_save \['lm_hed'\] not found"),
        ({"modules_to_save": ["layers"]}, ValueError, "cannot hold model.layers: a ModuleList"),
    ],
)
def test_targets_that_cannot_be_adapted(llama, untouched, options, error, message):
    base, config = llama(), LoraConfig(task_type="CAUSAL_LM", **options)
    targets = config.target_modules
    with untouched(base), pytest.raises(error, match=message):
        get_peft_model(base, config)
    assert config.target_modules == targets
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    with untouched(model), pytest.raises(error, match=message):
        model.add_adapter("other", config)
    assert list(model.peft_config) == ["default"]


def test_models_without_a_default_target(untouched):
    base = nn.Sequential(nn.Linear(4, 4))
    with untouched(base), pytest.raises(ValueError, match="target_modules must be given for a model of type None"):
        get_peft_model(base, LoraConfig())
    base = nn.Sequential(nn.ReLU())
    with untouched(base), pytest.raises(ValueError, match="found no linear layer"):
        get_peft_model(base, LoraConfig(target_modules="all-linear"))


def test_layers_of_other_kinds(untouched):
    base = gpt2()
    with untouched(base), pytest.raises(ValueError, match="a LayerNorm: it adapts "):
        get_peft_model(base, LoraConfig(target_modules=["c_attn", "ln_1"]))


def test_a_rank_that_was_set_to_nothing_afterwards(llama, untouched):
    base, config = llama(), LoraConfig()
    config.r = 0
    with untouched(base), pytest.raises(ValueError, match="r must be a positive integer, got 0"):
        get_peft_model(base, config)
    config.r, config.use_qalora = 4, True
    with untouched(base), pytest.raises(NotImplementedError, match="use_qalora"):
        get_peft_model(base, config)


def test_whole_modules_in_4_bits_cannot_be_trained(llama, untouched):
    base = quantize_linear_layers(llama())
    with untouched(base), pytest.raises(ValueError, match="its k-bit weight cannot be trained"):
        get_peft_model(base, LoraConfig(modules_to_save=["up_proj"]))


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a/b", "keys", "default", 3])
def test_adapter_names(llama, untouched, name):
    model = get_peft_model(llama(), LoraConfig())
    with untouched(model), pytest.raises(ValueError, match="adapter"):
        model.add_adapter(name, LoraConfig())


def test_adapters_that_do_not_exist(llama, untouched):
    model = get_peft_model(llama(), LoraConfig())
    with untouched(model):
        for call in (model.set_adapter, model.delete_adapter, model.set_requires_grad):
            with pytest.raises(ValueError, match=r"'absent' does not exist: there are \['default'\]"):
                call("absent")
        with pytest.raises(ValueError, match="'absent' does not exist"):
            model.merge_adapter(["absent"])
        with pytest.raises(TypeError, match="one name is needed"):
            model.set_adapter(["default"])
    biased = get_peft_model(llama(), LoraConfig(bias="all"))
    with untouched(biased), pytest.raises(ValueError, match="trains biases of the base model already"):
        biased.add_adapter("other", LoraConfig(bias="all"))


def test_wrong_dtypes_are_named(llama, tokens):
    model = get_peft_model(llama(torch.bfloat16), LoraConfig(task_type="CAUSAL_LM"))
    embeddings = model.get_input_embeddings()(tokens).float()
    with pytest.raises((TypeError, RuntimeError), match=r"float|BFloat16"):
        model(inputs_embeds=embeddings)
    with pytest.raises(TypeError, match=r"x is .*float32 but the weight is .*bfloat16: cast"):
        model.get_base_model().model.layers[0].self_attn.q_proj(embeddings)


class TestFiles:
    def refused(self, base, folder, untouched, message, error=ValueError, **options):
        """As the first adapter, as a further one, and as new weights of one that is there."""
        with untouched(base, folder), pytest.raises(error, match=message):
            PeftModel.from_pretrained(base, folder, **options)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        with untouched(model, folder), pytest.raises(error, match=message):
            model.load_adapter(folder, "other")
        assert list(model.peft_config) == ["default"]

    @pytest.mark.parametrize("keep", [0, 7, 100, -1])
    def test_truncated(self, llama, saved, untouched, keep):
        path = saved / WEIGHTS
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(llama(), saved, untouched, "damaged or truncated")

    @pytest.mark.parametrize("content", [b"", b"\x80\x04nonsense", b"PK\x03\x04broken"])
    def test_truncated_bin(self, llama, saved, untouched, content):
        (saved / WEIGHTS).unlink()
        (saved / "adapter_model.bin").write_bytes(content)
        self.refused(llama(), saved, untouched, "damaged or truncated")

    def test_code_in_a_bin(self, llama, saved, untouched):
        (saved / WEIGHTS).unlink()
        torch.save({"x": nn.Linear(1, 1)}, saved / "adapter_model.bin")
        self.refused(llama(), saved, untouched, "cannot be read")

    def test_missing(self, llama, saved, untouched):
        (saved / WEIGHTS).unlink()
        self.refused(llama(), saved, untouched, f"Can't find '{WEIGHTS}'")

    def test_empty(self, llama, saved, untouched):
        save_file({}, saved / WEIGHTS)
        self.refused(llama(), saved, untouched, "no adapter for this model")

    def test_another_models(self, llama, saved, untouched):
        save_file({"base_model.model.transformer.h.0.attn.lora_A.weight": torch.ones(4, 64)}, saved / WEIGHTS)
        self.refused(llama(), saved, untouched, "no adapter for this model")

    def test_a_deeper_models(self, llama, saved, untouched):
        self.refused(llama(num_hidden_layers=1), saved, untouched, "weights for layers that this model")

    def test_a_wider_models(self, llama, saved, untouched):
        base = llama(hidden_size=128)
        self.refused(base, saved, untouched, r"8 tensors of the file do not fit .*\(4, 64\).* for \(4, 128\)")

    def test_another_rank(self, llama, saved, untouched):
        change(saved, r=8)
        self.refused(llama(), saved, untouched, r"do not fit .*\(4, 64\) torch.float32 for \(8, 64\)")

    def test_numbers_that_are_not_floats(self, llama, saved, untouched):
        model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        state = {key: value.int() for key, value in get_peft_model_state_dict(model).items()}
        save_file(state, saved / WEIGHTS)
        self.refused(llama(), saved, untouched, "torch.int32")
        with untouched(model), pytest.raises(ValueError, match="a str for"):
            set_peft_model_state_dict(model, dict.fromkeys(state, "weights"))

    def test_base_weights_in_an_adapter_are_not_let_in(self, llama, saved, untouched):
        model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        state = get_peft_model_state_dict(model)
        extra = {"base_model.model.model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64)}
        save_file({**state, **extra}, saved / WEIGHTS)
        self.refused(llama(), saved, untouched, "weights for layers that this model")

    def test_unknown_keys_and_options(self, llama, saved, untouched):
        change(saved, rnak=4)
        self.refused(llama(), saved, untouched, "unknown config key .*'rnak'", TypeError)
        change(saved, rnak=None, use_qalora=True)
        self.refused(llama(), saved, untouched, "use_qalora", NotImplementedError)
        change(saved, use_qalora=False, r=0)
        self.refused(llama(), saved, untouched, "r must be a positive integer, got 0")
        change(saved, r=4, peft_type="POLY")
        self.refused(llama(), saved, untouched, "POLY is not built", NotImplementedError)

    def test_broken_config(self, llama, saved, untouched):
        (saved / CONFIG).write_text('{"r": 8,')
        self.refused(llama(), saved, untouched, "is not valid JSON")

    def test_tensors_missing_for_weights_on_meta(self, llama, saved, untouched):
        change(saved, target_modules=["q_proj", "v_proj", "k_proj"])
        base = llama()
        with untouched(base, saved), pytest.raises(ValueError, match="low_cpu_mem_usage needs every weight"):
            PeftModel.from_pretrained(base, saved, low_cpu_mem_usage=True)
        with pytest.warns(UserWarning, match="the file lacks weights"):
            PeftModel.from_pretrained(base, saved)

    def test_unknown_arguments(self, llama, saved, untouched):
        base = llama()
        with untouched(base), pytest.raises(TypeError, match=r"unknown keyword arguments .*revison"):
            PeftModel.from_pretrained(base, saved, revison="main")

    def test_a_file_where_a_directory_should_be(self, llama, tmp_path, untouched):
        (tmp_path / "file").write_text("mine")
        with untouched(None, tmp_path), pytest.raises(ValueError, match="must be a directory"):
            get_peft_model(llama(), LoraConfig()).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("build", ["llama", "llama_4bit"])
def test_safe_merge_of_a_broken_adapter_changes_no_layer(request, trained, untouched, build, value):
    """The last layer is the broken one: those before it must not be merged either."""
    model = trained(get_peft_model(request.getfixturevalue(build)(), LoraConfig(target_modules="all-linear")))
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.lora_B["default"].weight.data[0, 0] = value
    for merge in (model.merge_adapter, model.merge_and_unload):
        with untouched(model), pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: .*inf or NaN"):
            merge(safe_merge=True)


def test_a_bias_that_cannot_be_merged_changes_no_layer(llama, trained, untouched):
    base = llama(attention_bias=True)
    model = trained(get_peft_model(base, LoraConfig(target_modules="all-linear", lora_bias=True)))
    with untouched(model), pytest.raises(ValueError, match="the base layer has none to merge it into"):
        model.merge_adapter()


def test_a_broken_adapter_of_a_4bit_model_is_never_half_merged(llama_4bit, trained, untouched):
    model = trained(get_peft_model(llama_4bit(), LoraConfig(target_modules="all-linear")))
    model.get_base_model().model.layers[1].mlp.down_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with untouched(model), pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: .*the adapter is broken"):
            merge()


def test_a_string_is_no_list_of_names(llama, untouched, tmp_path):
    model = get_peft_model(llama(), LoraConfig())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with untouched(model), pytest.raises(TypeError, match="adapter_names must be a list of names, got the string"):
            merge(adapter_names="default")
    with untouched(model, tmp_path), pytest.raises(TypeError, match="selected_adapters must be a list of names"):
        model.save_pretrained(tmp_path, selected_adapters="default")


@pytest.mark.parametrize("content", [[torch.zeros(2)], {1: torch.zeros(2)}])
def test_a_bin_that_holds_no_dict_of_tensors(llama, saved, untouched, content):
    (saved / WEIGHTS).unlink()
    torch.save(content, saved / "adapter_model.bin")
    base = llama()
    with untouched(base), pytest.raises(ValueError, match="must hold a dict of tensors by name"):
        PeftModel.from_pretrained(base, saved)


def test_the_output_projection_of_torchs_attention_is_not_adapted(untouched):
    def model():
        return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})

    base = model()
    with untouched(base), pytest.raises(ValueError, match=r"attention\.out_proj: .*MultiheadAttention"):
        get_peft_model(base, LoraConfig(target_modules=["out_proj", "up"]))
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    assert adapted.base_model.targeted_module_names == ["up"]
