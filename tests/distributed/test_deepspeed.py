"""DeepSpeed's ZeRO-3 around our models, in two processes on CPUs: trains as one process does, saves and loads.

DeepSpeed is no dependency of the tests. Where it is installed this runs, without a GPU (0.19.8, which beside torch
takes a minute: DS_BUILD_OPS=0 pip install --no-deps --no-build-isolation --target FOLDER deepspeed hjson py-cpuinfo
ninja einops msgpack, and FOLDER in PYTHONPATH).
"""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

import peft_fast

from .models import base, own, rows
from .processes import HERE, environment, two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
    ),
]


def test_zero_3_trains_saves_and_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    main, other = two("deepspeed", tmp_path, "dense", "dora", "nf4", launcher="torchrun")
    for name, model in (("dense", base()), ("dora", base()), ("nf4", own())):
        assert main[name]["losses"] == other[name]["losses"]
        # Its hooks on A and B gather their weights: they are called.
        assert "added" in main[name]["routes"]
        assert "tensors of the adapter are empty" in main[name]["refused"]
        assert "GatheredParameters" in main[name]["refused"]
        read = peft_fast.PeftModel.from_pretrained(model, tmp_path / name).eval()
        with torch.no_grad():
            loss = float(read(input_ids=rows(4), labels=rows(4)).loss)
        assert loss == pytest.approx(main[name]["after"], abs=2e-5)
    assert not (tmp_path / "without-gathering").exists()


def test_trainer_with_zero_3_trains_resumes_and_saves(tmp_path, monkeypatch):
    """Losses and evaluations are those of one process without DeepSpeed; see the worker for what accelerate is told."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    command = [sys.executable, str(HERE / "accelerate_worker.py"), str(tmp_path), "alone"]
    done = subprocess.run(command, env=environment(RANK="9"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = json.loads((tmp_path / "rank9.json").read_text())["alone"]["first"]
    main, other = (one["trainer"] for one in two("deepspeed", tmp_path, "trainer", launcher="torchrun"))
    assert main == other
    first = main["first"]
    assert len(first["loss"]) == 4
    # Of 14 rows the last batch is filled up by accelerate, and only then.
    assert first["loss"][:3] == pytest.approx(alone["loss"][:3], abs=1e-5)
    assert first["eval_loss"][:1] == pytest.approx(alone["eval_loss"][:1], abs=1e-5)
    assert main["second"]["loss"] == pytest.approx(first["loss"], abs=1e-6)
    assert {"global_step2", "zero_to_fp32.py", "adapter_model.safetensors"} <= set(main["checkpoint"])
    assert "model.safetensors" not in {*main["saved"], *main["checkpoint"]}
    read = peft_fast.PeftModel.from_pretrained(base(), tmp_path / "trainer" / "saved").eval()
    with torch.no_grad():
        loss = float(read(input_ids=rows(6), labels=rows(6)).loss)
    assert loss == pytest.approx(main["second"]["eval_loss"][-1], abs=2e-5)
