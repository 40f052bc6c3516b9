"""Where code written for peft looks for what: the same paths, here for what is built so far."""

import importlib
import re
from pathlib import Path

import pytest

import peft_fast

MODELS = [name for name in peft_fast.__all__ if name.startswith(("PeftModel", "AutoPeftModel"))]
NAMES = {
    "": [
        *MODELS, "LoraConfig", "LoraModel", "PeftConfig", "PeftType", "TaskType", "cast_mixed_precision_params",
        "get_layer_status", "get_model_status", "get_peft_config", "get_peft_model", "get_peft_model_state_dict",
        "inject_adapter_in_model", "load_peft_weights", "prepare_model_for_kbit_training", "set_peft_model_state_dict",
    ],
    ".auto": [name for name in MODELS if name.startswith("Auto")] + ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING"],
    ".config": ["PeftConfig"],
    ".functional": [
        "cast_adapter_dtype", "delete_adapter", "get_peft_model_state_dict", "inject_adapter_in_model", "set_adapter",
        "set_peft_model_state_dict", "set_requires_grad",
    ],
    ".helpers": [
        "check_if_peft_model", "rescale_adapter_scale", "update_forward_signature", "update_generate_signature",
        "update_signature",
    ],
    ".mapping": ["get_peft_config", "inject_adapter_in_model"],
    ".peft_model": [
        *(name for name in MODELS if name.startswith("Peft")), "TunerLayerStatus", "TunerModelStatus",
        "get_layer_status", "get_model_status",
    ],
    ".tuners": ["LoraConfig", "LoraModel"],
    ".tuners.lora": ["LoraConfig", "LoraLayer", "LoraModel", "Linear"],
    ".tuners.tuners_utils": ["BaseTuner", "BaseTunerLayer"],
    ".utils": [
        "CONFIG_NAME", "ModulesToSaveWrapper", "PeftType", "SAFETENSORS_WEIGHTS_NAME", "TaskType", "WEIGHTS_NAME",
        "_get_submodules", "cast_mixed_precision_params", "get_peft_model_state_dict", "load_peft_weights",
        "prepare_model_for_kbit_training", "set_peft_model_state_dict",
    ],
    ".utils.other": [
        "EMBEDDING_LAYER_NAMES", "ModulesToSaveWrapper", "_get_submodules", "cast_mixed_precision_params",
        "prepare_model_for_kbit_training",
    ],
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
