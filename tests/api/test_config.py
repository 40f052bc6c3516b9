import dataclasses
import json
import warnings

import peft
import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

import peft_fast
from peft_fast import LoraConfig, PeftConfig, PeftType, TaskType, get_peft_config
from peft_fast.tuners.lora.config import NOT_BUILT
from peft_fast.tuners.targets import LORA_TARGETS

FILE = "adapter_config.json"
USED = {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some/model",
    "revision": "abc",
    "r": 4,
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["up_proj"],
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [1, 2],
    "layers_pattern": ["layers"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 3},
}


def write(folder, **values):
    (folder / FILE).write_text(json.dumps(values))
    return folder


def test_the_options_and_their_defaults_are_pefts():
    ours, theirs = LoraConfig(), peft.LoraConfig()
    names = [field.name for field in dataclasses.fields(ours)]
    assert names == [field.name for field in dataclasses.fields(theirs)]
    for name in names:
        if name != "runtime_config":
            assert getattr(ours, name) == getattr(theirs, name), name
    assert dataclasses.asdict(ours.runtime_config) == dataclasses.asdict(theirs.runtime_config)


def test_the_targets_by_architecture_are_pefts():
    def sets(table):
        return {kind: names if isinstance(names, str) else set(names) for kind, names in table.items()}

    assert sets(LORA_TARGETS) == sets(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)


def test_the_type_names_are_pefts():
    assert {t.value for t in PeftType} == {t.value for t in peft.PeftType}
    assert {t.value for t in TaskType} == {t.value for t in peft.TaskType}


@pytest.mark.parametrize("options", [{}, USED], ids=["defaults", "used"])
def test_files_are_pefts_but_for_the_order_of_names(tmp_path, options):
    files = []
    for library in (peft_fast, peft):
        library.LoraConfig(**options).save_pretrained(tmp_path / library.__name__)
        files.append(json.loads((tmp_path / library.__name__ / FILE).read_text()))
    for values in files:
        values["target_modules"] = sorted(values["target_modules"] or [])
    assert files[0] == files[1]
    text = (tmp_path / "peft_fast" / FILE).read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert json.loads(text)["target_modules"] == (sorted(options["target_modules"]) if options else None)


def test_each_reads_what_the_other_wrote(tmp_path):
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        config = writer.LoraConfig(**USED)
        config.save_pretrained(tmp_path)
        read = reader.PeftConfig.from_pretrained(tmp_path)
        assert type(read) is reader.LoraConfig
        for name in USED:
            assert getattr(read, name) == getattr(config, name), name


def test_subfolder_and_dict(tmp_path):
    LoraConfig(r=3).save_pretrained(tmp_path / "inner")
    assert PeftConfig.from_pretrained(tmp_path, subfolder="inner").r == 3
    config = get_peft_config({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 5, "enable_lora": None})
    assert (type(config), config.r, config.task_type) == (LoraConfig, 5, TaskType.CAUSAL_LM)


def test_a_hub_id_is_asked_for_with_the_callers_arguments(tmp_path, monkeypatch):
    LoraConfig(r=3).save_pretrained(tmp_path)
    asked = {}

    def download(repo_id, filename, **arguments):
        asked.update(arguments, repo_id=repo_id, filename=filename)
        return str(tmp_path / FILE)

    monkeypatch.setattr("peft_fast.files.hf_hub_download", download)
    config = PeftConfig.from_pretrained("user/adapter", subfolder="a", revision="main", token="t", cache_dir="c")
    assert config.r == 3
    given = {"subfolder": "a", "revision": "main", "token": "t", "cache_dir": "c"}
    assert asked == {"repo_id": "user/adapter", "filename": FILE, **given}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("megatron_config", {"x": 1}),
        ("megatron_core", "other"),
        ("velora_config", {"x": 1}),
        ("use_qalora", True),
        ("qalora_group_size", 8),
        ("monteclora_config", {"x": 1}),
        ("use_bdlora", {"x": 1}),
        ("arrow_config", {"x": 1}),
        ("kasa_config", {"x": 1}),
        ("init_lora_weights", "mica"),
    ],
)
def test_options_that_are_not_built_are_refused_by_name(name, value):
    with pytest.raises(NotImplementedError, match=name):
        LoraConfig(**{name: value})


def test_every_option_is_either_built_or_in_the_list():
    built = set(USED) | {
        "auto_mapping",
        "peft_type",
        "peft_version",
        "inference_mode",
        "fan_in_fan_out",
        "lora_bias",
        "use_dora",
        "trainable_token_indices",
        "ensure_weight_tying",
        "runtime_config",
        "target_parameters",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
        "eva_config",
        "alora_invocation_tokens",
        "layer_replication",
    }
    assert {field.name for field in dataclasses.fields(LoraConfig)} == built | set(NOT_BUILT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": -1}, "r must be a positive integer, got -1"),
        ({"r": 2.5}, "r must be a positive integer, got 2.5"),
        ({"r": True}, "r must be a positive integer"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern.* must be a finite number, got inf"),
        ({"lora_dropout": 1.5}, "lora_dropout must be a probability"),
        ({"lora_dropout": -0.1}, "lora_dropout must be a probability"),
        ({"bias": "some"}, "bias must be"),
        ({"task_type": "CHAT"}, "task_type must be one of"),
        ({"init_lora_weights": "zeros"}, "init_lora_weights must be"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "layers_to_transform needs target_modules as a list"),
        ({"target_modules": "[unclosed"}, "target_modules must be a regular expression, got '.unclosed'"),
        ({"rank_pattern": {"*": 3}}, "rank_pattern must be a regular expression"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias needs"),
    ],
)
def test_bad_values_are_refused_with_the_rule_and_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": 5},
        {"modules_to_save": "lm_head"},
        {"exclude_modules": [1]},
        {"alpha_pattern": ["q"]},
        {"use_rslora": "no"},
        {"base_model_name_or_path": 3},
        {"target_modules": [["q_proj"]]},
        {"exclude_modules": [{}]},
        {"modules_to_save": [""]},
        {"layers_to_transform": "1"},
        {"layers_to_transform": [True]},
        {"layers_to_transform": [[1]]},
        {"layers_pattern": 3},
        {"layers_pattern": [3]},
        {"rank_pattern": [1]},
        {"inference_mode": 1},
        {"auto_mapping": "LlamaForCausalLM"},
        {"peft_version": 0.21},
    ],
)
def test_bad_types_are_refused(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        LoraConfig(**options)


def test_an_unknown_option_is_named_with_one_that_comes_close():
    with pytest.raises(TypeError, match=r"unknown config key .*'lora_alfa' \(did you mean 'lora_alpha'"):
        LoraConfig(lora_alfa=8)


def test_unknown_keys_in_files(tmp_path):
    known = json.loads(LoraConfig(r=3).to_json())
    with pytest.raises(TypeError, match="unknown config key for LoraConfig: 'rnak'"):
        PeftConfig.from_pretrained(write(tmp_path, **known, rnak=5))
    assert PeftConfig.from_pretrained(write(tmp_path, **known, enable_lora=None, merge_weights=False)).r == 3
    newer = {**known, "peft_version": "0.99.0.dev0@abc", "use_hydra": True}
    with pytest.warns(UserWarning, match="use_hydra"):
        assert PeftConfig.from_pretrained(write(tmp_path, **newer)).r == 3
    old = {name: value for name, value in known.items() if name != "peft_version"}
    with pytest.warns(UserWarning, match="does not name.*merge_weights"):  # files did not say it once
        assert PeftConfig.from_pretrained(write(tmp_path, **old, merge_weights=True)).r == 3
    with pytest.raises(NotImplementedError, match="use_qalora"):
        PeftConfig.from_pretrained(write(tmp_path, **{**known, "use_qalora": True}))


def test_arguments_of_base_models_are_taken_and_do_nothing(tmp_path):
    LoraConfig(r=3).save_pretrained(tmp_path)
    for library in (peft, peft_fast):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            config = library.PeftConfig.from_pretrained(tmp_path, trust_remote_code=True, device_map=None)
        assert config.r == 3
    assert [("trust_remote_code" in str(one.message), "device_map" in str(one.message)) for one in said] == [
        (True, False)
    ]
    with pytest.raises(TypeError, match="reviison"):
        PeftConfig.from_pretrained(tmp_path, reviison="x")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ValueError, "not valid JSON"),
        ("[1]", ValueError, "must hold a JSON object"),
        ("{}", ValueError, "no key 'peft_type'"),
        ('{"peft_type": "POLY"}', NotImplementedError, "POLY is not built"),
        ('{"peft_type": "NEW"}', ValueError, "unknown peft_type 'NEW'"),
        ('{"peft_type": ["LORA"]}', ValueError, "unknown peft_type"),
        ('{"peft_type": "LORA", "r": "8"}', ValueError, "r must be"),
        ('{"peft_type": "LORA", "rank_pattern": 3}', TypeError, "rank_pattern"),
    ],
)
def test_broken_files(tmp_path, text, error, message):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(error, match=message):
        PeftConfig.from_pretrained(tmp_path)


def test_a_runtime_config_in_a_file_is_left_out_with_a_warning(tmp_path):
    write(tmp_path, peft_type="LORA", r=3, runtime_config={"ephemeral_gpu_offload": True})
    for library in (peft_fast, peft):
        with pytest.warns(UserWarning, match="runtime_config"):
            config = library.PeftConfig.from_pretrained(tmp_path)
        assert (config.r, config.runtime_config.ephemeral_gpu_offload) == (3, False)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=f"Can't find '{FILE}'"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="revison"):
        PeftConfig.from_pretrained(tmp_path, revison="main")
    with pytest.raises(ValueError, match="neither a directory nor an adapter on the Hub"):
        PeftConfig.from_pretrained(tmp_path / "nowhere")
