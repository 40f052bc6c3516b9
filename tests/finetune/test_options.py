"""Options: each reaches the training, and what cannot be honoured is refused before anything heavy."""

import json
from pathlib import Path

import pytest

from peft_fast.finetune import run
from peft_fast.finetune.options import Options, parse

from .helpers import ROOT, finished, parse_output


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(["--bits", "16"], id="16-bit", marks=pytest.mark.slow),
        pytest.param(["--bits", "8"], id="8-bit"),
        pytest.param(["--precision", "bf16"], id="bf16", marks=pytest.mark.slow),
        pytest.param(["--packing"], id="packing"),
        pytest.param(["--optimizer", "adafactor"], id="adafactor", marks=pytest.mark.slow),
        pytest.param(["--warmup", "2", "--alpha", "4", "--seed", "3", "--backend", "torch"], id="the-rest"),
    ],
)
def test_options_reach_the_training(arguments, tmp_path, changed):
    plain = finished(arguments)
    metrics = finished([*arguments, *changed, "--output", str(tmp_path / "other")])
    assert metrics["train_losses"] != plain["train_losses"]
    assert metrics["heldout_loss"]["after"] < metrics["heldout_loss"]["before"]
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, metrics["options"]["alpha"])


def test_epochs(arguments):
    """38 rows of 40 are trained on, 4 a step: 10 steps make an epoch."""
    at = arguments.index("--steps")
    metrics = finished([*arguments[:at], *arguments[at + 2 :], "--epochs", "0.5"])
    assert len(metrics["train_losses"]) == 5


def test_refused_before_anything_is_loaded(arguments, capsys):
    refused = {
        ("--rank", "0"): "--rank must be at least 1, got 0",
        ("--dropout", "1.0"): "--dropout is a probability below 1",
        ("--precision", "fp16"): "needs a GPU",
        ("--optimizer", "paged_adamw_8bit"): "needs a GPU",
        ("--backend", "triton"): "needs a GPU",
        ("--epochs", "2"): "not allowed with argument",
        ("--learning-rate", "-1"): "--learning-rate must be above 0",
        ("--eval-fraction", "1"): "--eval-fraction must lie between 0 and 1",
        ("--target-modules", ","): "names no layer",
        ("--data", "missing.txt"): "does not exist",
        ("--data", str(ROOT / "README.md")): "end in .txt or .jsonl",
        ("--resume",): "found no checkpoint",
        ("--resume", "/nowhere"): "is not a checkpoint",
        ("--eval", "x"): "unrecognized arguments",
    }
    for changed, message in refused.items():
        with pytest.raises(SystemExit) as exited:
            parse([*arguments, *changed])
        assert exited.value.code == 2
        assert message in capsys.readouterr().err


def test_an_earlier_run_is_not_overwritten(arguments, capsys):
    (Path(parse_output(arguments)) / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "continue it with --resume" in capsys.readouterr().err


def test_masking_prompts_of_plain_text_is_refused(arguments, tmp_path, capsys):
    text = tmp_path / "notes.txt"
    text.write_text("plain")
    for given, message in (([], "the default data holds plain text"), ([*arguments, "--data", str(text)], str(text))):
        with pytest.raises(SystemExit):
            parse([*given, "--mask-prompt"])
        assert message in capsys.readouterr().err


def test_model_and_data_belong_together(data_file, capsys):
    with pytest.raises(SystemExit):
        parse(["--data", str(data_file)])
    assert "--data needs --model" in capsys.readouterr().err


def test_options_survive_json(arguments):
    options = parse([*arguments, "--target-modules", "q_proj,v_proj"])
    assert Options.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert options.target_modules == ("q_proj", "v_proj")
    assert options.alpha == 8


def test_what_the_user_can_change_ends_with_a_message(arguments, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"texts": 1}\n')
    for changed, message in (
        (["--data", str(bad)], f"{bad}:2: `text` must be a string"),
        (["--model", str(tmp_path)], "has no tokenizer"),
        (["--target-modules", "no_such_layer"], "no_such_layer"),
    ):
        assert run.main([*arguments, *changed]) == 1
        assert message in capsys.readouterr().err
