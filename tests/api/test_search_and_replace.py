"""`from peft.X import Y` as `from peft_fast.X import Y`: every public name of peft 0.21.2 is there, or in LACKING."""

import ast
import copy
import importlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
from peft.utils import integrations as their_integrations
from torch import nn
from transformers import DynamicCache

import peft_fast
from peft_fast.utils import integrations as our_integrations

PEFT = Path(peft.__file__).parent
# Modules whose imports from other modules of peft are asked for there, too, beside what each defines itself.
REEXPORTING = (
    "peft", "peft.functional", "peft.helpers", "peft.mapping", "peft.mapping_func", "peft.peft_model", "peft.tuners",
    "peft.tuners.lora", "peft.tuners.lora.layer", "peft.tuners.tuners_utils", "peft.utils", "peft.utils.constants",
    "peft.utils.other",
)  # fmt: skip
NOT_ASKED_FOR = (None, "peft.import_utils", "import_utils")  # flags, and modules themselves
NOT_BUILT = (
    "adamss|beft|c3a|deft|delora|frod|glora|gralora|hira|lily|miss|osf|peanut|poly|psoft|pvera|road|shadow|supertuning|"
    "tinylora|unilora|vblora|waveft|xlora"
)
# {why: regular expressions for whole names, "module.name"}.
LACKING = {
    "methods that are not built: their folders, configs, models, targets by architecture": (
        rf"peft\.tuners\.({NOT_BUILT})\..*",
        rf"(?i:.*\.({NOT_BUILT})\w*(Config|Model|Variant|Callback))",
        rf".*\.TRANSFORMERS_MODELS_TO_(?i:{NOT_BUILT})_\w*MAPPING",
        r".*\.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",  # empty in peft
    ),
    "how peft's layers of other methods are taken apart": (
        r"peft\.tuners\.(adalora|ia3|randlora)\.(bnb|gptq)\..*|peft\.tuners\.adalora\.(SVDQuantLinear|layer\.RankAllocator)",
        r"peft\.tuners\.adaption_prompt\.(config\.(?!Adaption)|utils\.).*",
        r".*\.(MultiplicativeDropoutLayer|get_fbd_cuda|patch_environment|FastBlockDiag|make_kron|UniqueBaseGrad)",
    ),
    "options of LoRA that are not built (arrow, VeLoRA, MonteCLoRA, ...)": (
        r"peft\.tuners\.lora\.(arrow|intruders|monteclora|variants|velora)\..*",
        r".*\.create_arrow_model",
        r".*\.(Montecl\w+|get_alora_offsets_for_\w+)",
        r".*\.(Arrow|BdLora|Kasa|Velora)Config",
        r".*\.LoraVariant|.*\.VARIANT_KWARG_KEYS|.*\.LoraEmbeddingATPHolder",
    ),
    "formats that layers are called for here (LinearLike, _register_custom_module), and parallel layers": (
        r"peft\.tuners\.lora\.(aqlm|awq|eetq|gptq|hqq|inc|te|torchao|tp_layer)\..*",
        r"peft\.utils\.quantization_utils\..*",
        r".*\.(GPTQLoraLinear|is_gptqmodel_(quant_linear|awq_layer)|get_gptqmodel_quant_linear|QuantizationBackend)",
        r".*\.(get_quantization_kwargs|quantization_extra_repr|resolve_quantization_backend|mlu_available)",
        r".*\.(TpInfo|dtensor_from_local_like|is_transformers_dtensor_tp|add_lora_tp_hooks_dtensor)",
        r".*\.get_tp_plan_and_mesh",
    ),
    "how the weights of single experts are joined while transformers' own load_adapter reads (PeftModel's does it)": (
        r"peft\.utils\.transformers_weight_conversion\.(?!build_peft_weight_mapping).*",
    ),
    "old versions of transformers": (r".*\.starcoder_model_postprocess_past_key_value",),
    "peft's own ways of choosing layers, registering methods, making weights": (
        r".*\.dispatch_\w+", r".*\.register_peft_method", r".*\.(init_empty_weights|skip_init_on_device|onload_layer)",
        r".*\.(set_additional_trainable_modules|create_attention_mask|id_tensor_storage|warn_msg_weight_tying)",
        r".*\.(DUMMY_TARGET_MODULES|MIN_TARGET_MODULES_FOR_OPTIMIZATION|ENABLE_DORA_CACHING|cache_decorator)",
        r".*\.loraga\.(get_target_modules|get_model_device|estimate_gradients)",
        r".*\.corda\.(?!preprocess|CordaEigens).*",
        r".*\.eva\.(find_equal_values|get_device_with_meta_params|move_inputs_to_device|HashHook|SVDHook|UNSUPPORTED_\w+)",
        r"peft\.utils\.incremental_pca\..*",
        r".*\.(HadaWeight|HadaWeightCP|make_weight|make_weight_cp|CONFIG_KEYS_TO_CHECK)",
        r".*\.(PREFIXES|Layers|Configs|helpers\.dora|logger)",
        r".*\.(has_valid_embedding_base_layer|get_embedding_layer_name|torch_load)",
    ),
}  # fmt: skip


def modules_of_peft():
    for path in sorted(PEFT.rglob("*.py")):
        parts = path.relative_to(PEFT.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def public_names(module, path):
    """What a module defines, and what it lists in __all__; what it imports from peft, where it is REEXPORTING."""
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                found |= set(ast.literal_eval(node.value))
        elif isinstance(node, ast.ImportFrom) and module in REEXPORTING and node.module not in NOT_ASKED_FOR:  # noqa: SIM102
            if node.level or node.module.startswith("peft"):
                found |= {alias.asname or alias.name for alias in node.names}
    return {name for name in found if not name.startswith("_")}


def statements(tree):
    for node in tree.body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from statements(node)


def lacking(full_name):
    return [why for why, patterns in LACKING.items() if any(re.fullmatch(p, full_name) for p in patterns)]


def all_names():
    for module, path in modules_of_peft():
        for name in public_names(module, path):
            yield module, name


def is_here(module, name):
    try:
        return hasattr(importlib.import_module("peft_fast" + module.removeprefix("peft")), name)
    except ModuleNotFoundError:
        return False


def test_every_public_name_of_peft_is_here_or_lacking_for_a_reason():
    names = sorted(all_names())
    assert len(names) > 1000
    silent = [
        f"{module}.{name}" for module, name in names if not lacking(f"{module}.{name}") and not is_here(module, name)
    ]
    assert not silent


def test_what_is_said_to_be_lacking_is():
    names = [(f"{module}.{name}", is_here(module, name)) for module, name in all_names()]
    for patterns in LACKING.values():
        for pattern in patterns:
            meant = [(name, here) for name, here in names if re.fullmatch(pattern, name)]
            assert meant, f"{pattern} means nothing any more"
            assert not [name for name, here in meant if here], pattern


BOTH = (peft, peft_fast)
UTILS = {library: importlib.import_module(f"{library.__name__}.tuners.tuners_utils") for library in BOTH}
OTHER = {library: importlib.import_module(f"{library.__name__}.utils.other") for library in BOTH}


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def kbit(request):
    torch.manual_seed(0)
    options = {"compute_dtype": torch.float32} if request.param == "4bit" else {"has_fp16_weights": False}
    layer = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[request.param](64, 32, **options)
    return request.param, nn.Sequential(nn.Linear(64, 64), layer.to("cpu"))


def test_layers_on_bitsandbytes_are_of_classes_that_code_asks_for(kbit):
    kind, model = kbit
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "8bit", kind == "4bit"
    name = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[kind]
    for library in BOTH:
        made = library.get_peft_model(copy.deepcopy(model), library.LoraConfig(target_modules=["0", "1"]))
        dense, layer = made.base_model.model
        bnb = importlib.import_module(f"{library.__name__}.tuners.lora.bnb")
        assert isinstance(layer, getattr(bnb, name))
        assert isinstance(layer, getattr(library.tuners.lora, name))
        assert not isinstance(dense, (bnb.Linear4bit, bnb.Linear8bitLt))
        assert repr(layer).startswith(f"lora.{name}(")
        assert type(layer).__name__ == name
        assert type(pickle.loads(pickle.dumps(layer))) is type(layer)


def test_weights_of_few_bits_in_floating_point(kbit):
    kind, model = kbit
    layer = model[1]
    kept = layer.weight.data.clone()
    for library in (our_integrations, their_integrations):
        assert library.get_bnb_param_type(layer.weight) == kind
        assert library.get_bnb_param_type(model[0].weight) is False
        assert library.dequantize_module_weight(model[0]) is model[0].weight
    ours = our_integrations.dequantize_module_weight(layer)
    again = our_integrations.dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    assert torch.equal(ours, again)
    assert torch.equal(layer.weight.data, kept)
    theirs = their_integrations.dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    torch.testing.assert_close(ours.float(), theirs.float(), atol=1e-3, rtol=1e-3)
    with pytest.raises(TypeError):
        our_integrations.dequantize_module_weight(nn.Dropout())
    if kind == "8bit":
        with pytest.raises(ValueError, match="state"):
            our_integrations.dequantize_bnb_weight(layer.weight)


def test_devices_of_layers(llama):
    for library, utils in UTILS.items():
        integrations = importlib.import_module(f"{library.__name__}.utils.integrations")
        model = llama()
        assert utils.get_device_map(model) == {"": torch.device("cpu")}
        cache = DynamicCache(config=model.config)
        model(torch.arange(4)[None], past_key_values=cache)
        integrations.map_cache_to_layer_device_map(model, cache)  # no hf_device_map: nothing to do
        model.hf_device_map = {"model.embed_tokens": "cpu", "model.layers.0": "meta", "model.layers.1": "cpu"}
        assert utils.get_device_map(model) is model.hf_device_map
        assert integrations.get_layer_device_map(model) == {0: "meta", 1: "meta"}
        integrations.map_cache_to_layer_device_map(model, cache)
        assert {layer.keys.device.type for layer in cache.layers} == {"meta"}
        del model.hf_device_map["model.layers.1"]
        with pytest.raises(RuntimeError, match="layer 1"):
            integrations.get_layer_device_map(model)
        assert not integrations.check_deepspeed_zero3_enabled()
        with integrations.gather_params_ctx(model.lm_head.weight):
            model.lm_head.weight.data.zero_()


CONFIGS = [
    {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    {"target_modules": r".*\.[qk]_proj"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    {"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": None, "target_parameters": ["q_proj.weight"]},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_names_that_a_config_means(llama, options):
    found = []
    paths = [path for path, _ in llama().named_modules()]
    for library, utils in UTILS.items():
        config = library.LoraConfig(**options)
        found.append([path for path in paths if utils.check_target_module_exists(config, path)])
    assert found[0] == found[1]


def test_parts_of_models(llama):
    for utils in UTILS.values():
        model = llama()
        assert utils.find_parameter_name_by_module(model, model.model.layers[1].mlp) == "model.layers.1.mlp"
        assert utils.find_parameter_name_by_module(model, nn.Linear(1, 1)) == ""
        own, shared = utils.clone_module(model.lm_head), utils.clone_module(model.lm_head, share_weights=True)
        assert own.weight is not model.lm_head.weight
        assert torch.equal(own.weight, model.lm_head.weight)
        assert shared is not model.lm_head
        assert shared.weight is model.lm_head.weight
        utils.replicate_layers(model, [(0, 2), (1, 2)])
        assert len(model.model.layers) == 3
        assert model.model.layers[2].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight
    for other in OTHER.values():
        assert (
            other.get_pattern_key(["k_proj", "layers.1.q_proj", "q_proj"], "model.layers.1.q_proj") == "layers.1.q_proj"
        )
        assert other.get_pattern_key(["k_proj"], "a.q_proj") == "a.q_proj"
        assert bool(other.match_target_against_key("a.*", "abc"))
        assert not other.match_target_against_key("b", "abc")
        assert [other.str_to_bool(word) for word in ("Yes", "off", "1")] == [1, 0, 1]
        with pytest.raises(ValueError, match="maybe"):
            other.str_to_bool("maybe")
        assert other.get_quantization_config(llama(), "gptq") is None


def adapters(library, llama):
    model = library.get_peft_model(llama(), library.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    model.add_adapter("other", library.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_of_one_class_alone(llama):
    found = []
    for library, utils in UTILS.items():
        model = adapters(library, llama)
        inner, classes = model.base_model.model, library.tuners.lora.layer
        utils.set_adapter(inner, "other", layer_cls=classes.Embedding)
        now = {name: m.active_adapters for name, m in inner.named_modules() if isinstance(m, classes.LoraLayer)}
        trained = [name for name, p in inner.named_parameters() if p.requires_grad]
        left = utils.delete_adapter(inner, "other", prefix="lora_", layer_cls=classes.Embedding)
        after = {name: m.active_adapters for name, m in inner.named_modules() if isinstance(m, classes.LoraLayer)}
        keys = sorted(inner.state_dict())
        found.append((now, trained, left, after, keys))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="does not exist"):
        UTILS[peft_fast].set_adapter(inner, "none", layer_cls=classes.Embedding)
    with pytest.raises(ValueError, match="no layers of the class"):
        UTILS[peft_fast].set_adapter(inner, "other", layer_cls=classes.Conv2d)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_are_not_merged_yet(llama):
    for library, utils in UTILS.items():
        model = adapters(library, llama)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert utils.check_adapters_to_merge(layer) == ["default"]
        assert utils.check_adapters_to_merge(layer, ["default", "other"]) == ["default", "other"]
        layer.merge()
        with pytest.warns(UserWarning, match="merged"):
            assert utils.check_adapters_to_merge(layer, ["default", "other"]) == ["other"]
        with pytest.raises(TypeError, match="list"):
            utils.check_adapters_to_merge(layer, "other")


def test_which_packages_a_config_may_import_from():
    for library in BOTH:
        auto = importlib.import_module(f"{library.__name__}.auto")
        allowed = auto.get_default_import_allowlist()
        assert "transformers" in allowed
        assert auto.check_import_allowlist(allowed, "transformers.models.bert")
        assert not auto.check_import_allowlist(allowed, "transformers_evil")
    assert issubclass(peft_fast.LoraConfig, importlib.import_module("peft_fast.config").PeftConfigMixin)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_of_a_weight(bits):
    from peft_fast.utils.loftq_utils import loftq_init

    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    dequantised, A, B = loftq_init(weight, bits, 4, num_iter=2)
    assert (A.shape, B.shape, dequantised.dtype) == ((4, 64), (32, 4), torch.float32)
    assert (weight - dequantised - B @ A).norm() < (weight - dequantised).norm() < 0.2 * weight.norm()
    assert not torch.equal(A, loftq_init(weight, bits, 4)[1])
    for wrong in ({"num_bits": 3}, {"num_iter": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            loftq_init(weight, **{"num_bits": bits, "reduced_rank": 4, **wrong})


def test_files_on_the_hub(monkeypatch):
    from huggingface_hub import constants

    from peft_fast.utils import other

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(other, "file_exists", lambda repo, name, **kwargs: (repo, name) == ("a/b", "c"))
    assert other.check_file_exists_on_hf_hub("a/b", "c") is True
    assert other.check_file_exists_on_hf_hub("a/b", "d") is False

    def down(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(other, "file_exists", down)
    with pytest.warns(UserWarning, match="no network"):
        assert other.check_file_exists_on_hf_hub("a/b", "c") is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert other.check_file_exists_on_hf_hub("a/b", "c") is None


@pytest.mark.slow
def test_modules_are_there_without_importing_them():
    program = "import {0}; {0}.tuners.tuners_utils, {0}.peft_model, {0}.utils.save_and_load, {0}.tuners.lora.layer"
    for library in BOTH:
        subprocess.run([sys.executable, "-c", program.format(library.__name__)], check=True)
