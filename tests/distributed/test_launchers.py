"""torchrun and `accelerate launch`, with accelerate's DDP and FSDP2 plugins and transformers' Trainer: two processes
train as one, resume, and write adapters alone."""

import json
import socket
import subprocess
import sys

import pytest

from .processes import HERE, environment, two

pytestmark = pytest.mark.slow
CHECKPOINT = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "scheduler.pt", "trainer_state.json",
    "training_args.bin", "rng_state_0.pth", "rng_state_1.pth",
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_two(folder, *cases, launcher="torchrun"):
    one, other = two("accelerate", folder, *cases, launcher=launcher, port=free_port())
    assert one == other
    return one


def distance(some, others):
    assert len(some) == len(others) > 0
    return max(abs(a - b) for a, b in zip(some, others))


@pytest.fixture(autouse=True)
def _on_cpus(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.parametrize(
    ("launcher", "cases"),
    [
        ("torchrun", ["ddp-loop", "fsdp-loop"]),
        ("accelerate", ["ddp-loop"]),
        ("accelerate-fsdp", ["fsdp-loop"]),  # its plugin comes from the launcher's options
    ],
)
def test_a_loop_with_accelerate(tmp_path, launcher, cases):
    """Gradient accumulation included; that losses and adapters are those of one process is asserted there."""
    found = in_two(tmp_path, *cases, launcher=launcher)
    assert all(found[case]["routes"] == ["group", "mlp", "reference"] for case in cases)


def test_other_models_sharded_by_accelerate(tmp_path):
    in_two(tmp_path, "fsdp-nf4", "fsdp-bitsandbytes", "fsdp-dora")
    found = in_two(tmp_path, "fsdp-loop-efficient", "nf4-efficient")
    assert "leave cpu_ram_efficient_loading off" in found["nf4-efficient"]


def test_trainer_trains_resumes_and_saves(tmp_path):
    command = [sys.executable, str(HERE / "accelerate_worker.py"), str(tmp_path), "alone", "alone-nf4"]
    done = subprocess.run(command, env=environment(RANK="9"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = json.loads((tmp_path / "rank9.json").read_text())
    found = in_two(tmp_path, "ddp-trainer", "fsdp-trainer", "fsdp-trainer-nf4")
    for name, of_one in (("ddp-trainer", "alone"), ("fsdp-trainer", "alone"), ("fsdp-trainer-nf4", "alone-nf4")):
        run, expected = found[name], alone[of_one]["first"]
        # The last batch is filled up by accelerate, and only then.
        assert distance(run["first"]["loss"][:3], expected["loss"][:3]) < 1e-5
        assert distance(run["first"]["eval_loss"][:1], expected["eval_loss"][:1]) < 1e-5
        assert distance(run["second"]["loss"], run["first"]["loss"]) < 1e-6
        assert set(run["saved"]) >= {"adapter_config.json", "adapter_model.safetensors"}
        assert "model.safetensors" not in {*run["saved"], *run["checkpoint"]}
        of_fsdp = {"optimizer.bin", "pytorch_model_fsdp.bin"} if name.startswith("fsdp") else {"optimizer.pt"}
        assert set(run["checkpoint"]) == CHECKPOINT | of_fsdp
    assert distance(found["fsdp-trainer"]["first"]["loss"], found["ddp-trainer"]["first"]["loss"]) < 1e-5
