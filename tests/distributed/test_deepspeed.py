"""DeepSpeed's ZeRO-3 around our models, in two processes on CPUs: trains as one process does, saves and loads.

DeepSpeed is no dependency of the tests. Where it is installed (0.19.8: DS_BUILD_OPS=0 pip install deepspeed
--no-build-isolation, which takes a minute and no GPU) this runs.
"""

import importlib.util

import pytest
import torch

import peft_fast

from .models import base, own, rows
from .processes import two

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
