"""Beside other libraries' ways of saving time and memory: what they replace or hook leaves our models right, and the
layers that cannot run as before say so in explain."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from transformers import TrainerCallback

import peft_fast

from .runs import adapted, base, distance, losses, trainer

HERE = Path(__file__).parent
KINDS = ["peft_fast", "accelerated"]
IDS = torch.randint(4, 30, (2, 12), generator=torch.Generator().manual_seed(3))


def quantised(**options: Any) -> Any:
    return adapted("peft_fast", peft_fast.quantize_linear_layers(base()), init_lora_weights=False, **options)


def step(model: Any, **inputs: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, {name: gradient}); the same dropout at every call."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(**{"input_ids": IDS, "labels": IDS, **inputs}).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    assert abs(one[0] - other[0]) < tolerance
    assert one[1].keys() == other[1].keys() != set()
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() <= 5 * tolerance * gradient.norm() + 1e-9, name


LIGER = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import torch
import torch.nn.functional as F
from liger_kernel.transformers import rms_norm, swiglu
from transformers.integrations.liger import apply_liger_kernel
import peft_fast, runs
# What Liger's kernels compute, in torch: Triton's interpreter (3.7.1) cannot run them, and there is no GPU.
calls = []
class SiLUMul:
    apply = staticmethod(lambda a, b, *rest: (calls.append("swiglu"), F.silu(a) * b)[1])
class RMSNorm:
    @staticmethod
    def apply(x, weight, eps, *rest):
        calls.append("norm")
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
swiglu.LigerSiLUMulFunction, rms_norm.LigerRMSNormFunction = SiLUMul, RMSNorm
ids = torch.randint(4, 30, (2, 12), generator=torch.Generator().manual_seed(0))
def step(model):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
def routes(model):
    rows = {row.name.rpartition("layers.0.")[2]: row for row in peft_fast.explain(model, show=False).rows}
    return rows["mlp"], rows["self_attn"]
# Both before Liger comes: it replaces the class of the MLPs that are made from then on, too.
kinds = ("peft_fast", "accelerated")
for model in [runs.adapted(kind, runs.base(), init_lora_weights=False).train() for kind in kinds]:
    (loss, gradients), (mlp, attention) = step(model), routes(model)
    assert (mlp.route, attention.route) == ("mlp", "group")
    apply_liger_kernel(model, {"rope": False, "fused_linear_cross_entropy": False})
    mlp, attention = routes(model)
    assert (mlp.route, attention.route) == ("layers", "group"), (mlp, attention)
    assert "its forward was replaced (by Liger" in mlp.because, mlp
    calls.clear()
    after, again = step(model)
    assert calls.count("swiglu") == 2 and calls.count("norm") == 5, calls
    assert abs(after - loss) < 1e-5 and len(again) == 28
    assert all((again[n] - g).norm() < 1e-4 * g.norm() for n, g in gradients.items())
print("beside Liger")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="pip install liger-kernel")
def test_ligers_modules_in_the_place_of_norms_and_mlps():
    """As Trainer's use_liger_kernel puts them there, in a process of its own: Liger replaces classes too."""
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LIGER, str(HERE)], env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("beside Liger\n")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_see_each_other(kind):
    """A row of two documents without padding, as TRL's padding_free and packing make it: position_ids that start anew,
    and the lengths that flash attention takes, which go through to the model."""
    model = adapted(kind, base(), init_lora_weights=False).eval()
    first, second = IDS[:1, :7], IDS[1:, :5]
    lengths = torch.tensor([0, 7, 12], dtype=torch.int32)
    packed = {
        "input_ids": torch.cat([first, second], 1), "position_ids": torch.tensor([[*range(7), *range(5)]]),
        "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7, "use_cache": False,
    }  # fmt: skip
    with torch.no_grad():
        together = model(**packed).logits
        alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in (first, second)], 1)
        wrong = model(input_ids=packed["input_ids"], use_cache=False).logits
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(wrong, alone, atol=1e-2)
    routes = {row.route for row in peft_fast.explain(model, show=False).rows}
    assert {"group", "mlp"} <= routes


MODELS = {
    "dense": lambda: adapted("peft_fast", base(), init_lora_weights=False),
    "accelerated": lambda: adapted("accelerated", base(), init_lora_weights=False),
    "nf4": quantised,
    "dropout": lambda: quantised(lora_dropout=0.3),
    "dora": lambda: quantised(use_dora=True),
}


class Elsewhere:
    """Where a saved tensor is kept meanwhile: a copy of its bytes, as offloading to the host has it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.values = tensor.detach().clone()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "recomputed"])
def test_activations_that_are_kept_elsewhere(make, checkpoints):
    """torch's save_on_cpu, and hooks that give back other tensors than were saved, as TRL's activation_offloading."""
    model = make().train()
    expected = step(model)
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    kept = []

    def pack(tensor: torch.Tensor) -> Elsewhere:
        kept.append(tensor.shape)
        return Elsewhere(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.values):
        assert_same(step(model), expected)
    assert kept
    with torch.autograd.graph.save_on_cpu():
        assert_same(step(model), expected)


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "AdamW8bit", "PagedAdamW32bit"])
def test_optimizers_of_bitsandbytes(name):
    """Their states on A and B; beside torch's AdamW, from which 8-bit states keep off by a few steps' rounding."""
    runs = []
    for make in (getattr(bitsandbytes.optim, name), torch.optim.AdamW):
        model = quantised()
        optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        run = []
        for _ in range(4):
            loss, _ = step(model)
            run.append(loss)
            try:
                optimizer.step()
            except (NotImplementedError, RuntimeError) as error:
                pytest.skip(f"bitsandbytes {bitsandbytes.__version__} has no {name} on this machine: {error}")
        runs.append(run)
    assert distance(*runs) < 2e-2
    assert runs[0][0] - runs[0][-1] > 0.05


class Reads(TrainerCallback):
    """What the callbacks for W&B, MLflow, ... take of a model, and put into JSON."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert hasattr(model, "peft_config")
        assert model.peft_config is not None
        self.found = {name: config.to_dict() for name, config in model.peft_config.items()}
        self.found["model"] = model.config.to_dict()["model_type"]
        self.found["parameters"] = model.num_parameters() if hasattr(model, "num_parameters") else None


def test_callbacks_that_log_the_adapters_config(tmp_path):
    found = []
    for kind in ("peft", *KINDS):
        reads = Reads()
        made = trainer(adapted(kind, base()), tmp_path, max_steps=1)
        made.add_callback(reads)
        made.train()
        found.append(json.loads(json.dumps(reads.found, default=sorted)))
    for one in found:
        for key in ("peft_type", "task_type"):
            one["default"][key] = str(one["default"][key])
        one["default"]["target_modules"] = sorted(one["default"]["target_modules"])
    theirs, ours, accelerated = found
    assert theirs == accelerated
    shared = theirs["default"].keys() & ours["default"].keys()
    assert shared >= {"r", "lora_alpha", "target_modules", "lora_dropout", "task_type", "peft_type", "use_dora"}
    assert theirs["default"].keys() - ours["default"].keys() == set()
    assert {key: theirs["default"][key] for key in shared} == {key: ours["default"][key] for key in shared}
    assert theirs["parameters"] == ours["parameters"]
    assert isinstance(peft.LoraConfig(), peft.PeftConfig)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiling_in_trainer(tmp_path, kind):
    """torch_compile=True as it is, with inductor; see test_trainer.py for aot_eager."""
    runs = []
    for one, options in ((kind, {}), (kind, {"torch_compile": True})):
        made = trainer(adapted(one, base()), tmp_path / one, max_steps=2, **options)
        made.train()
        runs.append(losses(made))
    assert distance(*runs) < 1e-4
