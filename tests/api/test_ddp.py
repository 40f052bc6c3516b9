"""A PeftModel in several processes: what DistributedDataParallel makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_fast import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

ROOT = Path(__file__).parents[2]
WORKER = """
import json, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from peft_fast import LoraConfig, get_peft_model, get_peft_model_state_dict
rank, world, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
torch.manual_seed(7)
sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
model.add_adapter("idle", LoraConfig(r=2, target_modules=["q_proj"]))
single = {}
tokens = torch.randint(1, 96, (world, 10), generator=torch.Generator().manual_seed(3))
for one in tokens.split(1):  # what the average over processes has to be
    model(input_ids=one, labels=one).loss.backward()
single = {n: p.grad / world for n, p in model.named_parameters() if p.grad is not None}
model.zero_grad(set_to_none=True)
wrapped = DistributedDataParallel(model, find_unused_parameters=False, static_graph=%STATIC%)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
mine = tokens[rank : rank + 1]
for number in range(3):
    optimizer.zero_grad()
    wrapped(input_ids=mine, labels=mine).loss.backward()
    if number == 0:
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert got.keys() == single.keys(), got.keys() ^ single.keys()
        for name, gradient in single.items():
            torch.testing.assert_close(got[name], gradient, msg=lambda m: f"{name}: {m}")
    optimizer.step()
try:
    get_peft_model_state_dict(wrapped)
except ValueError as error:
    assert "pass the PeftModel itself (of DDP `module`" in str(error), error
else:
    raise AssertionError("a wrapper was taken for a model with adapters")
wrapped.module.save_pretrained(folder, is_main_process=rank == 0)
total = sum(float(p.double().sum()) for p in wrapped.parameters() if p.requires_grad)
dist.barrier()
print(json.dumps({"total": total, "gradients": len(single)}))
"""


@pytest.mark.parametrize("static", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_one_adapter(llama, tmp_path, static):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    code = WORKER.replace("%STATIC%", str(static))
    command = [sys.executable, "-W", "ignore", "-c", code]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store"), str(tmp_path / "adapter")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=180) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs
    one, two = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert one == two
    assert one["gradients"] == 28
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "idle",
    ]  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        read = PeftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True)
    total = sum(float(p.double().sum()) for p in read.parameters() if p.requires_grad)
    assert total == pytest.approx(one["total"], rel=1e-12)


def test_ddp_around_a_model_with_buffers_and_whole_modules(tmp_path):
    """One process: DDP's own checks of parameters and buffers take our modules."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        model = get_peft_model(base, LoraConfig(target_modules=["0"], modules_to_save=["1", "2"]))
        wrapped = DistributedDataParallel(model)
        wrapped(torch.randn(5, 8)).sum().backward()
        assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
        model.save_pretrained(tmp_path / "adapter")
        keys = get_peft_model_state_dict(model)
        assert any("running_mean" in key for key in keys)
        assert any("num_batches_tracked" in key for key in keys)
        for low_cpu_mem_usage in (False, True):  # the running statistics too, which are no parameters
            twin = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
            read = PeftModel.from_pretrained(twin, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
            assert all(torch.equal(get_peft_model_state_dict(read)[key], value) for key, value in keys.items())
    finally:
        dist.destroy_process_group()
