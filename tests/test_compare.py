"""`make compare`: what it asks for, the base model, and a run of it on a small scale."""

import csv
import dataclasses
import sys
import threading

import pytest
import torch

from bench.compare import __main__ as command
from bench.compare import models, options, report, worker

SMALL = ["--seq-len", "16", "--batch-size", "1", "--steps", "2", "--rank", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model must be a directory or one of small"),
        (["--seq-len", "1"], "--seq-len is too small: 1"),
        (["--steps", "0"], "--steps is too small: 0"),
        (["--only", "peft,other"], "--only must name some of peft, unsloth, peft_fast, got 'other'"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        options.parse(arguments)
    assert message in capsys.readouterr().err


def test_defaults():
    given, providers, _ = options.parse([])
    assert ("peft" in providers, "peft_fast" in providers) == (True, True)
    assert options.Options(**given.as_dict()) == given
    assert "batch 2 x" in str(given)
    assert options.why_not("peft", given) is None
    assert options.why_not("unsloth", given) in (
        "not installed",
        "needs a GPU",
        "takes a model's directory: give --model",
    )


@pytest.mark.parametrize("shape", options.SHAPES)
def test_shapes_are_the_published_ones(shape):
    """By their numbers of parameters, in millions."""
    with torch.device("meta"):
        model = models.AutoModelForCausalLM.from_config(models.config_of(shape))
    millions = {"llama-3-8b": 8030, "llama-3.2-1b": 1236, "qwen3-4b": 4022, "small": 13.4}[shape]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("bits", [4, 16])
def test_the_model_is_the_same_for_all(bits, monkeypatch):
    """Of the same weights in every process, nothing left on meta, four bits where asked for."""
    given, _, _ = options.parse([*SMALL, "--bits", str(bits)])
    monkeypatch.setattr(models, "config_of", lambda shape: _tiny())
    first, second = (models.load(given, torch.device("cpu")) for _ in range(2))
    tensors = [dict(model.state_dict()) for model in (first, second)]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert not any(t.is_meta for t in [*first.parameters(), *first.buffers()])
    kinds = {type(module).__name__ for module in first.model.modules()}
    assert ("Linear4bit" in kinds) == (bits == 4)
    assert torch.isfinite(first(torch.tensor([[1, 2, 3]])).logits).all()


def _tiny():
    return models.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip


def test_text_is_bytes_of_python_files():
    ids = worker.text_ids(256, 1000)
    assert ids.shape == (1000,)
    assert bytes(ids.tolist()).decode(errors="ignore").isprintable() is False  # lines of code
    assert torch.equal(ids, worker.text_ids(256, 1000))
    assert worker.text_ids(50, 100).max() < 50


def test_table_and_rows():
    given, _, _ = options.parse(SMALL)
    found = {
        "peft": dict(seconds=[2.0, 4.0, 2.0], losses=[3.0, 2.5, 2.0], peak_mib=10.0, saved_mib=8.0, resident_mib=5.0),
        "peft_fast": dict(
            seconds=[1.0, 2.0, 1.0], losses=[3.0, 2.4, 2.0], peak_mib=5.0, saved_mib=2.0, resident_mib=5.0
        ),
    }
    rows = report.rows(given, found)
    assert [row.speedup for row in rows] == [1.0, 2.0]
    assert [row.tokens_per_s for row in rows] == [8.0, 16.0]
    assert rows[1].loss_distance == pytest.approx(0.1)
    text = report.table(rows)
    assert "peft_fast beside peft: 100 % faster; 50 % less memory at the peak of a step, 75 % less" in text
    noisy = report.in_words([rows[0], dataclasses.replace(rows[1], speedup=0.97, p20=14.0, p80=18.0)])
    assert "as fast, as far as steps that differ by 25 % among themselves can tell" in noisy
    assert report.in_words(rows[:1]) == ""
    for part in ("2.00x", "5 (0.50x)", "2 (0.25x)", "3.0000 -> 2.0000", "1.0e-01"):
        assert part in text, part


def _program(tmp_path, text):
    path = tmp_path / "program"
    path.write_text(f"#!{sys.executable}\nimport sys\n{text}")
    path.chmod(0o755)
    return str(path)


def test_a_library_that_says_much_is_not_stopped(tmp_path, monkeypatch):
    """More than a pipe holds."""
    text = "sys.stderr.write('warning ' * 30_000)\nprint('{\"trained\": 1}', flush=True)\n"
    monkeypatch.setattr(command.sys, "executable", _program(tmp_path, text))
    made, answers = command.Worker("peft", options.parse(SMALL)[0]), []
    thread = threading.Thread(target=lambda: answers.append(made.answer()), daemon=True)
    thread.start()
    thread.join(20)
    made.stop()
    assert answers == [{"trained": 1}]


def test_a_library_that_ends_before_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(command.sys, "executable", _program(tmp_path, "sys.exit('no such package')\n"))
    made = command.Worker("peft", options.parse(SMALL)[0])
    made.process.wait()
    with pytest.raises(RuntimeError, match="peft ended with an error:\nno such package"):
        made.ask("load")
    made.stop()


@pytest.mark.slow
def test_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare", *SMALL, "--results", str(tmp_path)])
    assert command.main() == 0
    (rows,) = tmp_path.glob("*/compare.csv")
    with rows.open(newline="") as file:
        theirs, ours = csv.DictReader(file)
    assert (theirs["provider"], ours["provider"]) == ("peft", "peft_fast")
    assert float(ours["loss_distance"]) < 1e-2
    assert float(ours["saved_mib"]) < float(theirs["saved_mib"])
    assert rows.with_suffix(".png").stat().st_size > 1000
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_an_error_of_a_library_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare", *SMALL, "--results", str(tmp_path), "--model", str(tmp_path)])
    assert command.main() == 1
    assert "peft ended with an error" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/compare.csv"))
