"""Where code written for peft looks for what: the same paths, here for what is built so far."""

import importlib
import re
from pathlib import Path

import peft
import pytest
import torch

import peft_fast
import peft_fast.mapping

MODELS = [name for name in peft_fast.__all__ if name.startswith(("PeftModel", "AutoPeftModel"))]
PROMPTS = [
    "CartridgeConfig", "CartridgeEncoder", "CPTConfig", "CPTEmbedding", "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit", "PrefixEncoder",
    "PrefixTuningConfig", "PromptEmbedding", "PromptEncoder", "PromptEncoderConfig",
    "PromptEncoderReparameterizationType", "PromptTuningConfig", "PromptTuningInit",
]  # fmt: skip
METHODS = ["AdaLora", "IA3", "LNTuning", "LoKr", "Shira", "TrainableTokens", "Vera"]
TUNERS = [f"{method}{end}" for method in METHODS for end in ("Config", "Model")]
OTHERS = [
    f"{method}{end}"
    for method in ("AdaptionPrompt", "BOFT", "FourierFT", "HRA", "OFT", "RandLora")
    for end in ("Config", "Model")
]
NAMES = {
    "": [
        *MODELS, "LoraConfig", "LoraModel", "PeftConfig", "PeftType", "TaskType", "cast_mixed_precision_params",
        "get_layer_status", "get_model_status", "get_peft_config", "get_peft_model", "get_peft_model_state_dict",
        "inject_adapter_in_model", "load_peft_weights", "prepare_model_for_kbit_training", "set_peft_model_state_dict",
        "LoftQConfig", "LoraGAConfig", "LoraRuntimeConfig", "preprocess_loraga", "replace_lora_weights_loftq",
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "NoMatchingPeftModuleError",
        "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "bloom_model_postprocess_past_key_value",
        "shift_tokens_right", "LoHaConfig", "LoHaModel", *OTHERS, "PeftMixedModel", *TUNERS, "PromptLearningConfig",
        *PROMPTS,
    ],
    ".auto": [name for name in MODELS if name.startswith("Auto")] + ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING"],
    ".config": ["PeftConfig", "PromptLearningConfig"],
    ".functional": [
        "cast_adapter_dtype", "delete_adapter", "get_peft_model_state_dict", "inject_adapter_in_model", "set_adapter",
        "set_peft_model_state_dict", "set_requires_grad",
    ],
    ".helpers": [
        "check_if_peft_model", "rescale_adapter_scale", "update_forward_signature", "update_generate_signature",
        "update_signature",
    ],
    ".import_utils": [
        "is_aqlm_available", "is_bnb_4bit_available", "is_bnb_available", "is_diffusers_available", "is_eetq_available",
        "is_gptqmodel_available", "is_hqq_available", "is_inc_available", "is_optimum_available", "is_te_available",
        "is_torchao_available", "is_transformers_ge_v5", "is_xpu_available",
    ],
    ".mapping": [
        "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING", "get_peft_config",
        "inject_adapter_in_model",
    ],
    ".mapping_func": ["get_peft_model"],
    ".optimizers": ["create_loraplus_optimizer"],
    ".mixed_model": ["PeftMixedModel"],
    ".peft_model": [
        *(name for name in MODELS if name.startswith("Peft")), "TunerLayerStatus", "TunerModelStatus",
        "get_layer_status", "get_model_status",
    ],
    ".tuners.lora.loraga": ["preprocess_loraga"],
    ".tuners": [*OTHERS, "LoraConfig", "LoraModel", "MultitaskPromptEmbedding", *PROMPTS],
    ".tuners.cartridge": ["CartridgeConfig", "CartridgeEncoder"],
    ".tuners.cartridge.utils": [
        "compose_cartridge_adapters", "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ],
    ".tuners.cpt": ["CPTConfig", "CPTEmbedding"],
    ".tuners.multitask_prompt_tuning": [
        "MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit",
    ],
    ".tuners.p_tuning": ["PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"],
    ".tuners.prefix_tuning": ["PrefixEncoder", "PrefixTuningConfig"],
    ".tuners.prompt_tuning": ["PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"],
    ".tuners.loha": ["Conv2d", "Linear", "LoHaConfig", "LoHaLayer", "LoHaModel"],
    ".tuners.adaption_prompt": ["AdaptionPromptConfig", "AdaptionPromptModel"],
    ".tuners.adaption_prompt.layer": ["AdaptedAttention", "AdaptedAttentionGPT"],
    ".tuners.hra": ["HRAConfig", "HRAConv2d", "HRALayer", "HRALinear", "HRAModel"],
    ".tuners.boft": ["BOFTConfig", "BOFTLayer", "BOFTModel"],
    ".tuners.randlora": ["Linear", "RandLoraConfig", "RandLoraLayer", "RandLoraModel"],
    ".tuners.fourierft": ["FourierFTConfig", "FourierFTLayer", "FourierFTLinear", "FourierFTModel"],
    ".tuners.oft": ["Conv2d", "Linear", "OFTConfig", "OFTLayer", "OFTModel"],
    ".tuners.ia3": ["Conv2d", "Conv3d", "IA3Config", "IA3Layer", "IA3Model", "Linear"],
    ".tuners.adalora": [
        "AdaLoraConfig", "AdaLoraLayer", "AdaLoraModel", "RankAllocator", "SVDConv2d", "SVDLinear",
    ],
    ".tuners.ln_tuning": ["LNTuningConfig", "LNTuningModel"],
    ".tuners.ln_tuning.layer": ["LNTuningLayer"],
    ".tuners.lokr": ["Conv2d", "Linear", "LoKrConfig", "LoKrLayer", "LoKrModel"],
    ".tuners.shira": ["Linear", "ShiraConfig", "ShiraLayer", "ShiraModel"],
    ".tuners.vera": ["Linear", "VeraConfig", "VeraLayer", "VeraModel"],
    ".tuners.lora": ["LoftQConfig", "LoraGAConfig", "LoraConfig", "LoraLayer", "LoraModel", "Linear"],
    ".tuners._buffer_dict": ["BufferDict"],
    ".tuners.trainable_tokens": ["TrainableTokensConfig", "TrainableTokensLayer", "TrainableTokensModel"],
    ".tuners.tuners_utils": ["BasePromptEncoder", "BaseTuner", "BaseTunerLayer", "inspect_matched_modules"],
    ".utils": [
        "CONFIG_NAME", "ModulesToSaveWrapper", "PeftType", "SAFETENSORS_WEIGHTS_NAME", "TaskType", "WEIGHTS_NAME",
        "_get_submodules", "cast_mixed_precision_params", "get_peft_model_state_dict", "load_peft_weights",
        "prepare_model_for_kbit_training", "set_peft_model_state_dict", "AuxiliaryTrainingWrapper",
        "INCLUDE_LINEAR_LAYERS_SHORTHAND", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "TrainableTokensWrapper", "_get_input_embeddings_name", "bloom_model_postprocess_past_key_value",
        "infer_device", "shift_tokens_right", "transpose",
    ],
    ".utils.constants": [
        "CONFIG_NAME", "EMBEDDING_LAYER_NAMES", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME",
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "WEIGHTS_NAME", "bloom_model_postprocess_past_key_value",
    ],
    ".utils.error": ["NoMatchingPeftModuleError", "PeftError"],
    ".utils.other": [
        "EMBEDDING_LAYER_NAMES", "ModulesToSaveWrapper", "_get_submodules", "cast_mixed_precision_params",
        "prepare_model_for_kbit_training", "AuxiliaryTrainingWrapper", "TrainableTokensWrapper",
        "fsdp_auto_wrap_policy", "infer_device", "shift_tokens_right", "transpose",
    ],
    ".utils.hotswap": [
        "check_hotswap_configs_compatible", "hotswap_adapter", "hotswap_adapter_from_state_dict",
        "prepare_model_for_compiled_hotswap",
    ],
    ".utils.loftq_utils": ["replace_lora_weights_loftq"],
    ".utils.merge_utils": [
        "calculate_majority_sign_mask", "dare_linear", "dare_ties", "disjoint_merge", "magnitude_based_pruning",
        "magnitude_prune", "prune", "random_pruning", "reshape_weight_task_tensors", "task_arithmetic", "ties",
    ],
    ".utils.peft_types": ["PeftType", "TaskType"],
    ".utils.warning": ["PeftWarning"],
    ".utils.save_and_load": ["get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"],
}  # fmt: skip


@pytest.mark.parametrize("path", NAMES)
def test_what_peft_has_there_is_here(path):
    ours, theirs = (importlib.import_module(library + path) for library in ("peft_fast", "peft"))
    for name in NAMES[path]:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert type(mine) is type(other) or callable(mine) == callable(other), name
        if isinstance(mine, (str, list)):
            assert mine == other


def test_what_is_installed_is_what_peft_says():
    ours, theirs = (importlib.import_module(f"{library}.import_utils") for library in ("peft_fast", "peft"))
    for name in NAMES[".import_utils"]:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine() if callable(mine) else mine) == (other() if callable(other) else other), name


def test_the_tables_of_methods_are_part_of_pefts():
    import peft.mapping
    from peft.tuners.mixed.model import COMPATIBLE_TUNER_TYPES

    for name in ("CONFIG", "TUNER", "PREFIX", "MIXED_MODEL"):
        mine, other = (getattr(library.mapping, f"PEFT_TYPE_TO_{name}_MAPPING") for library in (peft_fast, peft))
        for kind, made in mine.items():
            theirs = other.get(peft.PeftType(kind.value))
            if theirs is None:  # peft mixes OFT, and has it in its mixed model's own list only
                assert (name, kind) == ("MIXED_MODEL", peft_fast.PeftType.OFT)
                assert peft.PeftType.OFT in COMPATIBLE_TUNER_TYPES
                continue
            if (name, kind) == ("PREFIX", peft_fast.PeftType.ADAPTION_PROMPT):  # adaption_gate does not begin so
                assert (made, theirs) == ("adaption_", "adaption_prompt_")
                continue
            assert made == theirs or made.__name__ == theirs.__name__
        assert "LORA" in {kind.value for kind in mine}
    assert peft_fast.LoraModel.uses_shared_state is peft.LoraModel.uses_shared_state is False


def test_helpers_give_what_pefts_give():
    from peft import utils as theirs

    from peft_fast import utils as ours

    assert ours.infer_device() == theirs.infer_device()
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert torch.equal(ours.shift_tokens_right(labels, 0, 2), theirs.shift_tokens_right(labels, 0, 2))
    for library in (ours, theirs):
        with pytest.raises(ValueError, match="pad_token_id"):
            library.shift_tokens_right(labels, None, 2)
    weight = torch.nn.Parameter(torch.randn(2, 3))
    for value in (weight, weight.data):
        for flag in (False, True):
            mine, other = (library.transpose(value, flag) for library in (ours, theirs))
            assert type(mine) is type(other)
            assert torch.equal(mine, other)
    prefixes = tuple(torch.randn(4, 2, 3, 5, 6) for _ in range(2))  # two pairs of layers
    mine, other = (library.bloom_model_postprocess_past_key_value(prefixes) for library in (ours, theirs))
    assert len(mine) == len(other) == 4
    assert all(torch.equal(a, b) for pairs in zip(mine, other) for a, b in zip(*pairs))


def test_matched_modules_and_the_names_of_adapters(llama):
    from peft.tuners.tuners_utils import inspect_matched_modules as theirs

    from peft_fast.tuners.tuners_utils import inspect_matched_modules as ours

    found = []
    for library, inspect in ((peft_fast, ours), (peft, theirs)):
        model = library.get_peft_model(llama(), library.LoraConfig(target_modules=["q_proj"]))
        found.append(inspect(model.base_model)["matched"])
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer._get_available_adapters() == {"default"}
        assert layer._all_available_adapter_names() == ["default"]
    assert found[0] == found[1] != []
    with pytest.raises(peft_fast.NoMatchingPeftModuleError, match="not found"):
        peft_fast.get_peft_model(llama(), peft_fast.LoraConfig(target_modules=["zzz"]))
    assert issubclass(peft_fast.NoMatchingPeftModuleError, ValueError)


def test_fsdp_policy_takes_what_pefts_takes(llama, monkeypatch):
    from peft.utils.other import fsdp_auto_wrap_policy as theirs

    from peft_fast.utils.other import fsdp_auto_wrap_policy as ours

    taken = []
    for library, policy in ((peft_fast, ours), (peft, theirs)):
        model = library.get_peft_model(llama(), library.LoraConfig(target_modules=["q_proj"]))
        decide = policy(model)
        taken.append([name for name, m in model.named_modules() if decide(m, recurse=False, nonwrapped_numel=0)])
    assert taken[0] == taken[1]
    assert {name.rpartition(".")[2] for name in taken[0]} == {"default", "0", "1"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchLayer")
    with pytest.raises(ValueError, match="NoSuchLayer"):
        ours(model)


def test_buffers_by_name():
    from peft.tuners._buffer_dict import BufferDict as Theirs

    from peft_fast.tuners._buffer_dict import BufferDict as Ours

    for cls in (Ours, Theirs):
        buffers = cls({"a": torch.zeros(2)})
        buffers["b"] = torch.ones(3)
        buffers.update({"a": torch.full((2,), 5.0)})
        assert list(buffers) == list(buffers.keys()) == ["a", "b"]
        assert "a" in buffers
        assert len(buffers) == 2
        assert buffers.to(torch.float64)["a"].tolist() == [5, 5]
        assert not buffers.state_dict()
        del buffers["a"]
        assert [name for name, _ in buffers.items()] == ["b"]
        assert sum(1 for _ in buffers.values()) == 1


def test_submodules(llama):
    from peft.utils import _get_submodules as theirs

    from peft_fast.utils import _get_submodules as ours

    model = llama()
    for key in ("model.layers.1.mlp.up_proj", "lm_head", "model"):
        assert ours(model, key) == theirs(model, key)


def test_the_wheel_has_every_package():
    root = Path(peft_fast.__file__).parents[1]
    packages = re.findall(r'"(peft_fast[.\w]*)"', (root / "pyproject.toml").read_text())
    found = {".".join(path.parent.relative_to(root).parts) for path in (root / "peft_fast").rglob("__init__.py")}
    assert found <= set(packages)
