"""torch's FSDP2 (fully_shard) around our models: two processes train as one does, and write one whole adapter."""

import pytest
import torch
from safetensors.torch import load_file

import peft_fast

from .models import base, own, rows
from .processes import two

MIXED = ["half-nf4", "half-bitsandbytes"]
SLOW = {
    "units": ["parts", "adapted", "bases"],
    "recomputing": ["norms", "norms-nf4", "norms-alone"],
    "training": ["leaves", "accumulated", "checkpointed", "reentrant"],
    "adapters": ["dora", "dora-leaves-nf4", "modules-to-save", "embedding", "tied", "tokens"],
    "k-bit": ["int8", "bitsandbytes", "bitsandbytes-bf16", "bitsandbytes-fp32", *MIXED],
    "of-peft": ["accelerated"],
}


def loss_of(folder, model) -> float:
    read = peft_fast.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return float(read(input_ids=rows(4), labels=rows(4)).loss)


@pytest.mark.slow
def test_two_processes_train_as_one_and_write_one_adapter(tmp_path):
    """Dense, and our own 4-bit layer; batches of which the last is uneven."""
    one, other = two("fsdp2", tmp_path, "dense", "nf4")
    assert one == other
    for name, model in (("dense", base()), ("nf4", own())):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert len(tensors) == 28
        assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (4, 64)
        assert loss_of(tmp_path / name, model) == pytest.approx(one[name]["after"], abs=2e-5)
    # Sharding whole layers leaves the fused ops at work, and explain says so although the weights are shards then.
    for name in ("dense", "nf4"):
        said = {end.rpartition(".")[2]: route for end, (route, _) in one[name]["routes"].items()}
        assert said == {"self_attn": "group", "mlp": "mlp", "q_proj": "reference"}
        assert one[name]["calls"] == {"lora_mlp": 8, "lora_group": 8, "lora_linear": 8}  # 4 steps, 2 layers


@pytest.mark.slow
@pytest.mark.parametrize("cases", SLOW.values(), ids=SLOW.keys())
def test_every_kind_trains_as_in_one_process(tmp_path, cases):
    one, other = two("fsdp2", tmp_path, *cases)
    assert one == other
    said = {name: {end.rpartition(".")[2]: row for end, row in one[name]["routes"].items()} for name in cases}
    calls = {name: one[name]["calls"] for name in cases}
    fused = {"lora_mlp": 8, "lora_group": 8, "lora_linear": 8}
    if "parts" in cases:
        assert calls["parts"] == fused
        assert said["parts"]["mlp"][0] == "mlp"
        assert said["adapted"]["mlp"] == ["layers", "up_proj is a FSDPLinear; silu and the product are one op"]
        assert said["adapted"]["self_attn"][1].endswith("one op, without q_proj")
        assert calls["adapted"] == {"lora_mlp": 0, "lora_group": 8, "lora_linear": 40}  # all but k and v
        assert said["bases"]["q_proj"][0] == "added"
        assert "its base layer, a FSDPLinear, has hooks" in said["bases"]["mlp"][1]
        assert calls["bases"] == {"lora_mlp": 0, "lora_group": 8, "lora_linear": 24}
    if "norms" in cases:
        of_norm = {name: said[name]["input_layernorm"] for name in cases}
        assert of_norm["norms"][0] == of_norm["norms-nf4"][0] == "recompute"
        assert of_norm["norms-alone"][0] == "layers"
        assert "it was given to fully_shard itself" in of_norm["norms-alone"][1]
    if "leaves" in cases:
        assert calls["leaves"] == {"lora_mlp": 0, "lora_group": 0, "lora_linear": 0}
        assert {route for route, _ in said["leaves"].values()} == {"layers", "added"}
        assert all("a factor of 'default' is a FSDPLinear" in because for _, because in said["leaves"].values())


@pytest.mark.slow
def test_what_is_done_between_forwards(tmp_path):
    """Switching off, merging, loading; and codes that mixed precision casts."""
    one, other = two("fsdp2", tmp_path, "life", "cast")
    assert one == other
    assert one["life"]["dense"].keys() == {"merge_to_16bit"}
    assert one["life"]["nf4"].keys() == {"merge_to_16bit", "merge_adapter"}
    for refusals in one["life"].values():
        assert all("needs whole weights, and those of this model are sharded" in text for text in refusals.values())
    assert "must be 2048 bytes, got 1024, as torch.bfloat16" in one["cast"]
    assert "bnb_4bit_quant_storage" in one["cast"]
