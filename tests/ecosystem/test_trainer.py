"""transformers' Trainer with our models, and with peft's that are accelerated, beside peft's own."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peft_fast

from .runs import adapted, base, distance, losses, tensor_files, trainer

KINDS = ["peft_fast", "accelerated"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"label_smoothing_factor": 0.1}, marks=pytest.mark.slow),
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_losses_are_pefts_to_five_digits(tmp_path, kind, options):
    runs = []
    for one in ("peft", kind):
        made = trainer(adapted(one, base()), tmp_path / one, **options)
        made.train()
        runs.append(losses(made))
    assert distance(*runs) < 1e-5
    assert runs[0][0] != runs[0][-1]


@pytest.mark.parametrize("kind", KINDS)
def test_under_bf16_autocast_losses_differ_by_rounding(tmp_path, kind):
    runs = []
    for one, options in (("peft", {}), ("peft", {"bf16": True}), (kind, {"bf16": True})):
        made = trainer(adapted(one, base()), tmp_path / one, **options)
        made.train()
        runs.append(losses(made))
    exact, theirs, ours = runs
    assert distance(theirs, exact) > 0
    assert distance(ours, exact) < 1.5 * distance(theirs, exact) + 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_hold_the_adapter_alone_and_resuming_is_not_noticed(tmp_path, kind):
    whole = trainer(adapted(kind, base()), tmp_path / "whole", max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert tensor_files(checkpoint) == [
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "training_args.bin",
    ]
    assert all(".lora_" in key for key in load_file(checkpoint / "adapter_model.safetensors"))
    resumed = trainer(adapted(kind, base()), tmp_path / "resumed", max_steps=6)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert distance(losses(resumed), losses(whole)) < 1e-6
    (tmp_path / "bare").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "bare" / name).write_bytes((checkpoint / name).read_bytes())
    other = trainer(adapted(kind, base()), tmp_path / "other", max_steps=1)
    other._load_from_checkpoint(str(tmp_path / "bare"))
    for name, tensor in load_file(checkpoint / "adapter_model.safetensors").items():
        mine = other.model.state_dict()[name.replace(".weight", ".default.weight")]
        assert torch.equal(mine, tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_at_the_end(tmp_path, kind):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    made = trainer(
        adapted(kind, base()), tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        learning_rate=0.3, **options,
    )  # fmt: skip
    made.train()
    evaluated = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 3
    assert made.state.best_metric == min(evaluated) < max(evaluated)
    assert made.evaluate()["eval_loss"] == pytest.approx(min(evaluated), abs=1e-5)
    assert made.predict(made.eval_dataset).label_ids is not None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_in_peft_and_gives_the_same_loss(tmp_path, kind):
    made = trainer(adapted(kind, base()), tmp_path)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    made.create_model_card()
    expected = made.evaluate()["eval_loss"]
    for library in (peft, peft_fast):
        again = library.PeftModel.from_pretrained(base(), tmp_path / "saved")
        assert trainer(again, tmp_path).evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert "library_name: peft" in (tmp_path / "saved" / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_qlora_keeps_its_gradients_through_evaluations(tmp_path, kind):
    """On CPUs with bf16 instructions bitsandbytes rewrites a 4-bit layer in eval mode, and its gradients end."""
    base(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    runs = []
    for one, evaluates in (("peft", False), (kind, False), (kind, True)):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=nf4, device_map="cpu", dtype=torch.float32
        )
        options = {"eval_strategy": "steps", "eval_steps": 2} if evaluates else {}
        made = trainer(adapted(one, model), tmp_path / "run", **options)
        made.train()
        runs.append(losses(made))
        norms = [row["grad_norm"] for row in made.state.log_history if "grad_norm" in row]
        assert min(norms) > 1e-3
    assert distance(runs[0], runs[1]) < 1e-5
    assert distance(runs[1], runs[2]) < 1e-5
