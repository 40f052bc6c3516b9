"""save_pretrained(vllm_compatible=True): read as vLLM reads it, by a reader written from its source, and by its own
code where that is at hand: vLLM installed, or VLLM_WHEEL, the path of a wheel (pip download vllm --no-deps), which
needs no GPU. Its server and kernels are not run here."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import peft_fast

from .runs import TARGETS, base

ENDS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2}},
    "alphas": {"alpha_pattern": {"v_proj": 32, "down_proj": 3}},
    "both-rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 32}},
    "other-everywhere": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}},
    "fraction": {"lora_alpha": 2.5},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"q_proj": 6}},
}


def make(**options):
    torch.manual_seed(5)
    config = peft_fast.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_fast.get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def served(folder):
    """The base model with an adapter added as vLLM does it: one rank and one scale for all."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)
    assert isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") and key.endswith(ENDS) for key in tensors)
    model = base()
    paths = {key.removeprefix("base_model.model.").rpartition(".lora_")[0]: key for key in tensors}
    for path in paths:
        weight = model.get_submodule(path).weight
        for a, b in (ENDS[:2], ENDS[2:]):
            if (A := tensors.get(f"base_model.model.{path}.{a}")) is not None:
                B = tensors[f"base_model.model.{path}.{b}"]
                assert A.shape[0] == B.shape[1] == config["r"]
                weight.data += scale * ((B @ A) if a == ENDS[0] else (B @ A).t())
    return model.eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_served_with_one_scale_for_all_it_computes_the_same(tmp_path, options):
    model = make(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.peft_config["default"].to_dict()
    model.save_pretrained(tmp_path, vllm_compatible=True)
    ids = torch.randint(4, 30, (2, 9))
    expected = model(input_ids=ids).logits
    for other in (
        served(tmp_path),
        peft.PeftModel.from_pretrained(base(), tmp_path).eval(),
        peft_fast.PeftModel.from_pretrained(base(), tmp_path).eval(),
    ):
        assert torch.allclose(other(input_ids=ids).logits, expected, atol=2e-5)
    assert not torch.allclose(base().eval()(input_ids=ids).logits, expected, atol=1e-2)
    assert model.peft_config["default"].to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_the_option_such_an_adapter_would_be_served_wrongly(tmp_path):
    make(alpha_pattern={"v_proj": 32}).save_pretrained(tmp_path)
    with pytest.raises(AssertionError):
        served(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "has bias='all': train with bias='none'"),
        ({"lora_bias": True}, "has lora_bias=True"),
        ({"use_dora": True}, "has use_dora=True: merge it instead"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\]"),
        ({"trainable_token_indices": [3, 4]}, r"has trainable_token_indices=\[3, 4\]"),
        ({"rank_pattern": {"q_proj": 600}}, "ranks up to 512, got 600"),
    ],
)
def test_what_vllm_has_no_place_for_is_refused_and_nothing_is_written(tmp_path, options, message):
    folder = tmp_path / "adapter"
    model = make()
    model.add_adapter("other", peft_fast.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(folder, vllm_compatible=True)
    assert not folder.exists()
    model.save_pretrained(folder)
    assert (folder / "other" / "adapter_config.json").exists()


def test_convolutions_and_embeddings_of_the_base_model_are_refused(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4)

    net = peft_fast.get_peft_model(Net(), peft_fast.LoraConfig(r=4, target_modules=["conv", "out"]))
    with pytest.raises(ValueError, match="matrices on linear layers and embeddings only, got .*conv.lora_A.weight"):
        net.save_pretrained(tmp_path / "a", vllm_compatible=True)
    model = make()
    with pytest.raises(ValueError, match="leave save_embedding_layers out"):
        model.save_pretrained(tmp_path / "a", vllm_compatible=True, save_embedding_layers=True)
    plain = base(tmp_path / "base")
    plain.resize_token_embeddings(64)
    plain.name_or_path = str(tmp_path / "base")
    resized = peft_fast.get_peft_model(plain, peft_fast.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the vocabulary was resized"):
        resized.save_pretrained(tmp_path / "a", vllm_compatible=True)
    assert not (tmp_path / "a").exists()


def of_vllm():
    """The wheel or the installed folder, or None."""
    if wheel := os.environ.get("VLLM_WHEEL"):
        return Path(wheel).resolve()
    spec = importlib.util.find_spec("vllm")
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


with_vllm = pytest.mark.skipif(
    of_vllm() is None, reason="no vLLM: pip download vllm --no-deps, and VLLM_WHEEL=its path"
)


def read_by_vllm(tmp_path, *folders):
    results = tmp_path / "results"
    results.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("vllm_reader.py")), str(of_vllm()), str(results)]
    done = subprocess.run([*command, *map(str, folders)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((results / "found.json").read_text()), results


@with_vllm
def test_vllms_own_loader_reads_what_the_model_computes(tmp_path):
    models, ids = {}, torch.randint(4, 30, (2, 9))
    for name, options in OPTIONS.items():
        models[name] = make(**options)
        models[name].save_pretrained(tmp_path / name, vllm_compatible=True)
    # As they are, with what vLLM cannot serve: it sees so itself.
    make(use_dora=True).save_pretrained(tmp_path / "dora")
    found, results = read_by_vllm(tmp_path, *(tmp_path / name for name in (*OPTIONS, "dora")))
    assert "DoRA" in found["dora"]["error"]
    for name, model in models.items():
        assert "error" not in found[name], found[name]
        assert found[name]["rank"] == max(layer.r["default"] for _, layer in model.base_model.layers())
        served = base().eval()
        deltas = load_file(results / f"{name}.safetensors")
        assert len(deltas) == sum(1 for _ in model.base_model.layers())
        for path, delta in deltas.items():
            served.get_submodule(path).weight.data += delta
        with torch.no_grad():
            assert torch.allclose(served(input_ids=ids).logits, model(input_ids=ids).logits, atol=2e-5), name


@with_vllm
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_vllms_own_checks_take_the_starts_that_ours_take(tmp_path, init):
    """Starts that change the base weights are refused by both; after the conversion to plain LoRA both take them."""
    model = make(init_lora_weights=init)
    if init in ("pissa", "olora"):
        with pytest.raises(ValueError, match="changed the base weights"):
            model.save_pretrained(tmp_path / "saved", vllm_compatible=True)
        torch.manual_seed(5)
        fresh = peft_fast.get_peft_model(
            base(), peft_fast.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=init)
        )
        fresh.peft_config["default"].init_lora_weights = True
        fresh.save_pretrained(tmp_path / "start")
        fresh.peft_config["default"].init_lora_weights = init
        fresh.save_pretrained(tmp_path / "saved", path_initial_model_for_weight_conversion=tmp_path / "start")
        converted = peft_fast.PeftModel.from_pretrained(base(), tmp_path / "saved")
        converted.save_pretrained(tmp_path / "served", vllm_compatible=True)
        folder = tmp_path / "served"
    else:
        model.save_pretrained(tmp_path / "saved", vllm_compatible=True)
        folder = tmp_path / "saved"
    found, _ = read_by_vllm(tmp_path, folder)
    assert "error" not in found[folder.name], found
