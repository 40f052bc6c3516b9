"""python -m peft_fast.finetune: the whole command on a tiny model, its checkpoints and its ends."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_fast
from peft_fast.finetune import base_model, report, run, verify
from peft_fast.finetune.options import Options, UserError, parse
from peft_fast.finetune.trainer import make_trainer

from .helpers import CHECKPOINT, ROOT, adapter, finished

find = importlib.util.find_spec


def test_the_command(model_folder, data_file, tmp_path):
    """The real entry point, in a process of its own, where any attempt to reach a hub fails."""
    output = tmp_path / "run"
    command = [
        sys.executable, "-m", "peft_fast.finetune", "--model", str(model_folder), "--data", str(data_file),
        "--output", str(output), "--steps", "8", "--batch-size", "4", "--sequence-length", "32", "--rank", "4",
        "--learning-rate", "1e-2", "--eval-every", "4", "--save-every", "4", "--sample-tokens", "8", "--mask-prompt",
        "--verify",
    ]  # fmt: skip
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    metrics = json.loads((output / "metrics.json").read_text())
    losses = metrics["heldout_loss"]
    assert losses["after"] < losses["before"] - 0.05
    assert losses["adapter_disabled"] == losses["before"]
    assert losses["reloaded"] == losses["after"]
    assert [step for step, _ in metrics["train_losses"]] == list(range(1, 9))
    assert [step for step, _ in metrics["heldout_losses"]] == [0, 4, 8]
    assert metrics["tokens_per_second"] > 0
    assert metrics["peak_memory_mib"] > 100
    assert set(metrics["options"]) == {field.name for field in fields(Options)}

    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("adapter_model.safetensors", "loss.png", "metrics.json"):
        assert f"{output / name}" in done.stdout
    for shown in (
        "q_proj",
        "trainable parameters: 8,192 of",
        "memory (estimate)",
        "there is",
        "held-out loss",
        "tokens/s",
    ):
        assert shown in done.stdout
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        assert {path.name for path in (output / checkpoint).iterdir()} == CHECKPOINT


def test_resuming_continues_exactly(arguments, tmp_path):
    """Six steps, or three and then three more from the checkpoint: the same losses, the same adapter, bit for bit."""
    changed = ["--steps", "6", "--save-every", "3", "--dropout", "0.2"]
    through = finished([*arguments, *changed])
    second = tmp_path / "second"
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    resumed = finished([*arguments, *changed, "--output", str(second), "--resume", checkpoint])

    assert resumed["train_losses"] == through["train_losses"]
    assert resumed["heldout_loss"] == through["heldout_loss"]
    expected = adapter(tmp_path / "run")
    for name, weight in adapter(second).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.slow
def test_resume_alone_takes_the_newest_checkpoint(arguments, tmp_path):
    finished([*arguments, "--save-every", "2"])
    resumed = finished([*arguments, "--save-every", "2", "--steps", "6", "--resume"])
    assert [step for step, _ in resumed["train_losses"]] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / "checkpoint-2").exists()  # the newest two are kept


def test_resuming_another_adapter_is_refused_before_anything_is_loaded(arguments, capsys):
    finished([*arguments, "--save-every", "4", "--target-modules", "q_proj", "--alpha", "64"])
    for changed, message in (
        (["q_proj,v_proj", "--alpha", "64"], "pass --target-modules q_proj (now --target-modules q_proj,v_proj)"),
        (["q_proj", "--rank", "8", "--alpha", "64"], "pass --rank 4 (now --rank 8)"),
        (["q_proj", "--alpha", "16"], "pass --alpha 64 (now --alpha 16)"),
        (["q_proj"], "pass --alpha 64 (now --alpha 8)"),
        (["v_proj"], "pass --alpha 64 --target-modules q_proj (now"),
    ):
        with pytest.raises(SystemExit) as exited:
            parse([*arguments, "--resume", "--target-modules", *changed])
        assert exited.value.code == 2
        assert message in capsys.readouterr().err
    # Which layers all-linear means is known only once the model is there.
    assert run.main([*arguments, "--resume", "--alpha", "64"]) == 1
    assert "--target-modules" in capsys.readouterr().err


@pytest.mark.parametrize("changed", [{"rank": 8}, {"alpha": 64}], ids=["rank", "alpha"])
def test_what_the_model_refuses_to_load_ends_with_a_message(arguments, model_folder, tmp_path, changed):
    """Past the options' check, as when a script drives the trainer: the model compares the adapters again."""
    finished([*arguments, "--save-every", "4"])
    options = replace(parse([*arguments, "--resume"]), bits=16, **changed)
    model = base_model.add_adapter(base_model.load_base(options), options)
    corpus = run.data.load(options, base_model.load_tokenizer(str(model_folder)))
    trainer, _ = make_trainer(model, corpus, options, 256)
    with pytest.raises(UserError, match="cannot resume from .*checkpoint-4"):
        trainer._load_from_checkpoint(str(options.checkpoint))


def test_the_newest_checkpoint_has_the_highest_step(arguments, tmp_path, capsys):
    for step in (20, 100, 3):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
    (tmp_path / "run" / "checkpoint-old").mkdir()
    for content, message in ((None, "checkpoint-100 is not a checkpoint of this command"), ("{", "is damaged")):
        if content:
            (tmp_path / "run" / "checkpoint-100" / "adapter_config.json").write_text(content)
        with pytest.raises(SystemExit):
            parse([*arguments, "--resume"])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_subset_of_the_layers_learns_on_a_cpu(arguments, tmp_path, bits):
    """The other layers run bitsandbytes' own forward, which would repack weights in eval mode and lose gradients."""
    metrics = finished([*arguments, "--target-modules", "q_proj,v_proj", "--steps", "8", "--bits", bits])
    names = adapter(tmp_path / "run")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}
    assert all(weight.abs().max() > 0 for weight in names.values())
    assert metrics["heldout_loss"]["after"] < metrics["heldout_loss"]["before"]
    assert metrics["heldout_loss"]["adapter_disabled"] == metrics["heldout_loss"]["before"]


@pytest.mark.slow
def test_8_bits(arguments, tmp_path, monkeypatch):
    """The adapter on a reloaded base, and the same training with bitsandbytes' layers and without bitsandbytes."""
    with_it = finished([*arguments, "--bits", "8"])
    losses = with_it["heldout_loss"]
    assert losses["after"] < losses["before"] - 0.05
    assert losses["adapter_disabled"] == losses["before"]
    assert verify.heldout_loss(tmp_path / "run") == losses["after"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "bitsandbytes" else find(name))
    without = finished([*arguments, "--bits", "8", "--output", str(tmp_path / "ours")])
    assert without["train_losses"] == with_it["train_losses"]
    assert without["heldout_loss"] == losses


@pytest.mark.slow
def test_verifying_8_bits_in_a_fresh_process(arguments, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    losses = finished([*arguments, "--bits", "8", "--verify"])["heldout_loss"]
    assert losses["reloaded"] == losses["after"]


def test_which_layers_a_base_has(arguments, model_folder, tmp_path, monkeypatch):
    """bitsandbytes' where it is installed; ours where not, and where bitsandbytes would run and be wrong on a CPU."""

    def classes(folder, *changed):
        base = base_model.load_base(parse([*arguments, "--model", str(folder), *changed]))
        return {type(m).__name__ for name, m in base.named_modules() if name.endswith("_proj")}

    uneven = LlamaConfig.from_pretrained(model_folder, hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    LlamaForCausalLM(uneven).save_pretrained(tmp_path / "uneven")
    some = ("--target-modules", "q_proj")
    assert classes(model_folder, *some) == classes(tmp_path / "uneven") == {"Linear4bit"}
    assert classes(tmp_path / "uneven", *some) == {"QuantizedLinear"}
    assert classes(tmp_path / "uneven", *some, "--bits", "8") == {"Linear8bitLt"}
    assert classes(tmp_path / "uneven", *some, "--bits", "16") == {"Linear"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "bitsandbytes" else find(name))
    assert classes(model_folder) == classes(model_folder, "--bits", "8") == {"QuantizedLinear"}


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_model_that_is_stored_quantised(arguments, tmp_path, bits, capsys):
    stored = tmp_path / "stored"
    base_model.load_base(parse([*arguments, "--bits", str(bits)])).save_pretrained(stored)
    base_model.load_tokenizer(arguments[1]).save_pretrained(stored)
    fresh = finished([*arguments, "--bits", str(bits), "--output", str(tmp_path / "fresh")])
    assert finished([*arguments, "--model", str(stored), "--bits", str(bits)])["train_losses"] == fresh["train_losses"]
    again = [*arguments, "--model", str(stored), "--output", str(tmp_path / "again")]
    for other in {4, 8, 16} - {bits}:
        assert run.main([*again, "--bits", str(other)]) == 1
        assert f"is stored in {bits} bits: use --bits {bits}; --bits {other} needs" in capsys.readouterr().err


def test_gradient_checkpointing_changes_memory_and_nothing_else(arguments, tmp_path):
    plain = finished(arguments)
    checkpointed = finished([*arguments, "--gradient-checkpointing", "--output", str(tmp_path / "other")])
    assert checkpointed["train_losses"] == plain["train_losses"]
    estimates = [metrics["memory_estimate_bytes"]["activations"] for metrics in (checkpointed, plain)]
    assert estimates[0] < estimates[1]


@pytest.mark.slow
def test_recomputing_changes_memory_and_nothing_else(arguments, tmp_path):
    plain = finished(arguments)
    recomputed = finished([*arguments, "--recompute", "norms", "mlps", "--output", str(tmp_path / "other")])
    for (_, a), (_, b) in zip(plain["train_losses"], recomputed["train_losses"]):
        assert a == pytest.approx(b, abs=1e-5)
    of_plain, of_recomputed = (metrics["memory_estimate_bytes"]["activations"] for metrics in (plain, recomputed))
    assert of_recomputed < 0.8 * of_plain


@pytest.mark.slow
def test_accumulation_equals_a_larger_batch(arguments, tmp_path):
    whole = finished(arguments)
    parts = [*arguments, "--batch-size", "2", "--gradient-accumulation", "2", "--output", str(tmp_path / "parts")]
    for (_, a), (_, b) in zip(whole["train_losses"], finished(parts)["train_losses"]):
        assert a == pytest.approx(b, abs=1e-5)


def test_packing_is_refused_where_documents_would_see_each_other(arguments, model_folder):
    options = replace(parse(arguments), bits=16, packing=True)
    model = base_model.add_adapter(base_model.load_base(options), options)
    corpus = run.data.load(options, base_model.load_tokenizer(str(model_folder)))
    trainer, _ = make_trainer(model, corpus, options, 256)
    base_model.refuse_leaky_packing(model, trainer.data_collator)

    def without_positions(rows):
        batch = trainer.data_collator(rows)
        del batch["position_ids"]
        return batch

    with pytest.raises(UserError, match="leave out --packing"):
        base_model.refuse_leaky_packing(model, without_positions)


def test_a_check_that_fails_ends_the_run():
    run._check({"before": 2.0, "after": 1.0, "adapter_disabled": 2.0, "reloaded": 1.00001})
    with pytest.raises(run.CheckFailed, match=r"adapter disabled is 2\.1"):
        run._check({"before": 2.0, "after": 1.0, "adapter_disabled": 2.1})
    with pytest.raises(run.CheckFailed, match="adapter reloaded is nan"):
        run._check({"before": 2.0, "after": 1.0, "adapter_disabled": 2.0, "reloaded": float("nan")})


@pytest.mark.slow
def test_a_verification_that_breaks_ends_with_the_summary_and_a_message(arguments, tmp_path, monkeypatch, capsys):
    """The reload fails in its own process (the data is gone by then): what was trained is still shown and found."""
    gone = tmp_path / "gone.jsonl"
    gone.write_text(Path(arguments[3]).read_text())
    figure = report.loss_figure

    def lose_the_data(*args):
        gone.unlink()
        figure(*args)

    monkeypatch.setattr(report, "loss_figure", lose_the_data)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run.main([*arguments, "--data", str(gone), "--verify"]) == 1
    shown = capsys.readouterr()
    assert f"{tmp_path / 'run' / 'adapter_model.safetensors'}" in shown.out
    assert "adapter disabled (must equal before)" in shown.out
    assert "reloading it in a fresh process failed" in shown.err
    assert "gone.jsonl" in shown.err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["heldout_loss"]["after"] > 0


def test_metrics_are_strict_json(arguments, tmp_path):
    report.write_metrics(tmp_path / "metrics.json", parse(arguments), {"a": float("nan"), "b": [(1, float("inf"))]})
    document = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert (document["a"], document["b"]) == (None, [[1, None]])


@pytest.mark.parametrize("bits", ["4", pytest.param("8", marks=pytest.mark.slow)])
def test_peft_and_bitsandbytes_reach_the_same_loss(arguments, bits):
    from bench import finetune_parity

    options = parse([*arguments, "--steps", "20", "--bits", bits])
    result = finetune_parity.compare(options)
    assert result["peft_fast"]["after"] < result["peft_fast"]["before"] - 0.3
    assert result["relative_difference_after"] < 1e-5
    assert result["largest_difference_of_a_step"] < 1e-5


def test_parity_refuses_what_would_make_it_unfair(arguments):
    from bench import finetune_parity

    with pytest.raises(ValueError, match="--dropout"):
        finetune_parity.compare(parse([*arguments, "--dropout", "0.1"]))


@pytest.mark.slow
def test_the_default_run(tmp_path):
    """No options, no network, nothing cached: under five minutes on two cores, and the loss falls clearly."""
    environment = {
        **os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path),
        "OMP_WAIT_POLICY": "passive",  # threads that spin at barriers make a shared machine five times slower
    }  # fmt: skip
    command = [sys.executable, "-m", "peft_fast.finetune", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((tmp_path / "run" / "metrics.json").read_text())["heldout_loss"]
    assert losses["after"] < 0.9 * losses["before"]
    assert losses["adapter_disabled"] == losses["before"]
    assert losses["reloaded"] == losses["after"]


@pytest.mark.slow
def test_two_processes_train_as_one(arguments, tmp_path):
    """torchrun with gloo, two rows each, against one process with four: one adapter is written, and it is the same."""
    alone = finished(arguments)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    changed = ["--batch-size", "2", "--output", str(tmp_path / "two"), "--save-every", "2", "--verify"]
    done = subprocess.run(
        [*torchrun, "-m", "peft_fast.finetune", *arguments, *changed],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("memory (estimate)") == 1
    together = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert together["heldout_loss"]["reloaded"] == pytest.approx(together["heldout_loss"]["after"], rel=1e-6)
    assert together["heldout_loss"]["after"] == pytest.approx(alone["heldout_loss"]["after"], rel=1e-3)


def test_the_adapter_written_loads_as_any_other(arguments, model_folder, tmp_path):
    finished([*arguments, "--bits", "16"])
    base = AutoModelForCausalLM.from_pretrained(model_folder, local_files_only=True)
    model = peft_fast.PeftModel.from_pretrained(base, str(tmp_path / "run"))
    for name, weight in peft_fast.get_peft_model_state_dict(model).items():
        assert torch.equal(weight, adapter(tmp_path / "run")[name])
