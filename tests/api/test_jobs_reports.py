"""JobTrainer: what it shows while it runs, what it leaves alone, and what it refuses."""

import re

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import peft_fast
from peft_fast import Job, JobTrainer, LoraConfig, get_peft_model

from .job_models import Stream, bad_rows, job, rows, weights


def test_bars_table_and_picture(llama, tmp_path, capsys):
    trainer = JobTrainer(llama())
    trainer.add(job("a", tmp_path, eval_data=rows("d", 3), eval_every=2, max_steps=4))
    trainer.add(job("b", data=bad_rows("raises"), batch_size=2, max_steps=9))
    trainer.train(plot=tmp_path / "plots" / "losses.png")
    printed = capsys.readouterr()
    assert re.search(r"a: .*4/4.*loss \d\.\d{3} nats/token, lr 1.00e-03, held out \d\.\d{3}", printed.err)
    assert "b: failed after 2 steps, OSError: the disk is gone" in printed.out
    lines = printed.out.splitlines()[-4:]
    assert re.split(r"\s{2,}", lines[0])[:5] == ["job", "state", "steps", "tokens", "seconds"]
    assert "nats/token" in lines[1]
    assert lines[3].startswith("a  ")
    best = min(loss for _, loss in trainer.results["a"].evaluations)
    assert f"{best:.4f}" in lines[3]
    assert (tmp_path / "plots" / "losses.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_there_is_a_line_and_no_picture(llama, tmp_path, capsys, monkeypatch):
    from peft_fast.jobs import report

    monkeypatch.setattr(report, "find_spec", lambda name: None)
    trainer = JobTrainer(llama())
    trainer.add(job("a", max_steps=1))
    trainer.train(plot=tmp_path / "losses.png")
    assert "there is no matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "losses.png").exists()


def test_a_peft_models_own_adapters_are_left_alone(llama, tokens):
    model = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer = JobTrainer(model, progress=False)
    trainer.add(job("a", max_steps=2))
    trainer.train()
    assert model.active_adapters == ["default"]
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters() if key in before)
    assert model(tokens, labels=tokens).loss.requires_grad
    assert weights(trainer, "a")  # without a folder it stays


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": LoraConfig(init_lora_weights="pissa")}, "changes the base weights, which all jobs share"),
        ({"config": LoraConfig(bias="all")}, "trains biases of the base model"),
        ({"config": LoraConfig(layer_replication=[(0, 2)])}, "layer_replication changes the base model"),
        ({"config": peft_fast.LoHaConfig()}, "only LoRA adapters.*got a LoHaConfig"),
        ({"config": None}, "give a LoraConfig, got a NoneType"),
        ({"name": "__base__"}, "cannot be called '__base__'"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"epochs": 1.5}, "epochs must be a positive integer, got 1.5"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a positive number"),
        ({"seed": -1}, "seed must be an integer from 0 on"),
        ({"eval_every": 3}, "eval_data and eval_every belong together"),
        ({"patience": 3}, "patience counts evaluations"),
        ({"min_delta": float("nan")}, "min_delta must be a number from 0 on"),
        ({"warmup_steps": 3}, "warmup_steps belongs to a scheduler by name"),
        ({"data": 5}, "data must be an iterable of dicts"),
        ({"data": {"input_ids": [1]}}, "data must be an iterable of dicts"),
    ],
)
def test_jobs_that_make_no_sense(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Job(**{"name": "a", "config": LoraConfig(), "data": rows("a"), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a"}, "job 'a' is under way already"),
        ({"output_dir": "first/../same"}, "job 'a' writes to"),
        ({"output_dir": "file"}, "output_dir must be a directory, got the file"),
        ({"config": LoraConfig(target_modules=["nowhere"])}, "nowhere"),
        ({"optimizer": lambda p: 5}, "optimizer must make one of torch's, got int"),
        ({"optimizer": lambda p: 1 / 0}, "division by zero"),
        ({"scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o)}, "stepped without a metric"),
        ({"scheduler": "linear", "data": Stream([]), "epochs": 2}, "needs to know the number of steps"),
        ({"scheduler": "zigzag"}, "zigzag"),
    ],
)
def test_what_cannot_be_added_leaves_all_as_it_was(llama, untouched, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    (tmp_path / "file").write_text("x")
    trainer = JobTrainer(llama(), progress=False)
    trainer.add(job("a", max_steps=2))
    trainer._running["a"].folder = (tmp_path / "same").resolve()
    one = Job(**{"name": "b", "config": LoraConfig(), "data": rows("b"), **options})
    with untouched(trainer.model), pytest.raises((ValueError, TypeError, ArithmeticError), match=message):
        trainer.add(one)
    assert trainer.jobs == ["a"]
    assert trainer.model._mixed_training.adapters == ["a"]


def test_models_that_jobs_cannot_train(llama):
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(ValueError, match="causal language model's head and loss, got BertForSequenceClassification"):
        JobTrainer(bert)
    with pytest.raises(ValueError, match="causal language models of transformers, got a Linear"):
        JobTrainer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="float16 needs a loss scaler"):
        JobTrainer(llama(), autocast=torch.float16)
    loha = get_peft_model(llama(), peft_fast.LoHaConfig(target_modules=["q_proj"]))
    trainer = JobTrainer(loha, progress=False)
    with pytest.raises(ValueError, match="must be of one type"):
        trainer.add(job("a"))
    with pytest.raises(ValueError, match="job 'x' is not under way"):
        trainer.remove("x")
    trainer = JobTrainer(llama(), progress=False)
    trainer.add(job("a"))
    with pytest.raises(ValueError, match="jobs are under way"):
        trainer.unload()
    with pytest.raises(ValueError, match="has no eval_data"):
        trainer.evaluate("a")
    with pytest.raises(ValueError, match="trains mixed batches already"):
        JobTrainer(trainer.model)
