"""Jobs that join, leave, stop early, fail and are resumed; their files; what JobTrainer refuses."""

import json
import re

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_fast import Job, JobTrainer, LoraConfig
from peft_fast.jobs.data import Batches

from .job_models import Stream, bad_rows, job, rows, trained, weights


def losses(trainer: JobTrainer, name: str) -> list[float]:
    return [loss for _, loss in trainer.results[name].losses]


def test_jobs_join_and_leave_while_others_run(llama, tmp_path):
    base = llama()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    trainer = JobTrainer(base, progress=False)
    trainer.add(job("a", tmp_path, max_steps=9))
    trainer.add(job("b", tmp_path, max_steps=100))
    seen = []

    def on_step(one: JobTrainer) -> None:
        seen.append(one.jobs)
        assert one.model.active_adapters == []  # without names the model is the base model
        if one.shared_steps == 2:
            one.add(job("c", tmp_path, max_steps=4))
        if one.shared_steps == 5:
            assert one.remove("b").state == "left"

    results = trainer.train(on_step=on_step)
    assert seen[1:7] == [["a", "b"], ["a", "b", "c"], ["a", "b", "c"], ["a", "b", "c"], ["a"], ["a"]]
    assert {name: (one.state, one.steps) for name, one in results.items()} == {
        "b": ("left", 5), "c": ("finished", 4), "a": ("finished", 9),
    }  # fmt: skip
    alone = trained(llama(), job("a", max_steps=9))
    assert losses(trainer, "a") == pytest.approx(losses(alone, "a"), rel=1e-5)
    alone = trained(llama(), job("c", max_steps=4))
    assert losses(trainer, "c") == pytest.approx(losses(alone, "c"), rel=1e-5)
    assert not any("lora_" in key for key, _ in trainer.model.named_parameters())
    trainer.add(job("d", max_steps=1))  # the first again
    trainer.train()
    base = trainer.unload()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert list(base.state_dict()) == list(before)


def test_adapters_load_in_peft_with_equal_outputs(llama, tokens, tmp_path):
    trainer = JobTrainer(llama(), progress=False, keep_adapters=True)
    for name in "abcd":
        trainer.add(job(name, tmp_path, max_steps=3))
    results = trainer.train()
    for name in "abcd":
        folder = tmp_path / name
        assert results[name].folder == folder
        assert {path.name for path in folder.iterdir()} == {
            "adapter_model.safetensors", "adapter_config.json", "README.md", "result.json",
        }  # fmt: skip
        theirs = peft.PeftModel.from_pretrained(llama(), folder).eval()
        trainer.model.set_adapter(name)
        with torch.no_grad():
            ours = trainer.model.eval()(tokens).logits
            torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(ours, llama()(tokens).logits, atol=1e-4)
        written = json.loads((folder / "result.json").read_text())
        assert (written["state"], written["steps"], len(written["losses"])) == ("finished", 3, 3)


def test_early_stop_keeps_the_best_weights(llama, tmp_path):
    """Too high a rate on few samples: the held-out loss rises."""
    options = dict(data=rows("b", 4), learning_rate=0.03, max_steps=200, eval_data=rows("d", 5), eval_every=2)
    trainer = JobTrainer(llama(), progress=False, keep_adapters=True)
    trainer.add(job("b", tmp_path, patience=3, min_delta=0.001, **options))
    trainer.add(job("a", max_steps=5))
    result = trainer.train()["b"]
    assert result.state == "stopped early"
    curve = dict(result.evaluations)
    assert result.steps == result.evaluations[-1][0] < 200
    assert result.weights_of in curve
    assert curve[result.weights_of] == min(curve.values()) < result.evaluations[-1][1]
    assert [step for step in curve if step > result.weights_of] == [result.steps - 4, result.steps - 2, result.steps]
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "b").eval()
    found = held_out(model, rows("d", 5))
    assert found == pytest.approx(curve[result.weights_of], rel=1e-5)
    last = JobTrainer(llama(), progress=False, keep_adapters=True)
    last.add(job("b", patience=3, min_delta=0.001, keep_best=False, **options))
    assert last.train()["b"].weights_of == result.steps
    assert not torch.equal(*(next(iter(weights(one, "b").values())) for one in (trainer, last)))


def held_out(model: nn.Module, samples: list[dict]) -> float:
    """The mean over all tokens with labels, sample by sample."""
    sums = count = 0.0
    with torch.no_grad():
        for row in samples:
            labels = torch.tensor([row["labels"]])
            tokens = (labels[:, 1:] != -100).sum().item()
            sums += model(torch.tensor([row["input_ids"]]), labels=labels).loss.item() * tokens
            count += tokens
    return sums / count


def test_patience_counts_from_what_was_better_by_min_delta(llama):
    """Each evaluation is better, but never by enough."""
    trainer = JobTrainer(llama(), progress=False)
    options = dict(eval_data=rows("b"), eval_every=1, patience=2, max_steps=50, learning_rate=1e-4)
    trainer.add(job("b", min_delta=5.0, **options))
    result = trainer.train()["b"]
    assert (result.state, result.steps, result.weights_of) == ("stopped early", 3, 1)


@pytest.mark.parametrize("is_stream", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["data set", "stream"])
def test_resumed_jobs_go_on_as_if_nothing_had_been(llama, tmp_path, is_stream):
    """In another process's model, within an epoch, between two forwards of a step, with a schedule and a best loss."""

    def jobs(folder=None) -> list[Job]:
        options = dict(scheduler="cosine", warmup_steps=2, max_steps=8)
        held = dict(eval_data=rows("d", 3), eval_every=1, learning_rate=0.02)
        source = Stream(rows("a")) if is_stream else rows("a")
        return [
            job("a", folder, data=source, accumulation=2, **options),
            job("c", folder, **held, **options),
        ]  # fmt: skip

    whole = trained(llama(), *jobs())
    first = JobTrainer(llama(), progress=False)
    for one in jobs():
        first.add(one)
    for _ in range(5):
        first.step()
    paths = first.save_checkpoints(tmp_path / "state")
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["a.pt", "c.pt"]
    torch.manual_seed(99)
    second = JobTrainer(llama(), progress=False, keep_adapters=True)
    late, early = jobs()
    second.add(early, resume_from=paths["c"])
    second.step()
    second.add(late, resume_from=paths["a"])
    results = second.train()
    for name in "ac":
        assert losses(second, name) == pytest.approx(losses(whole, name), rel=1e-6)
        assert dict(results[name].evaluations) == pytest.approx(dict(whole.results[name].evaluations), rel=1e-6)
        assert results[name].weights_of == whole.results[name].weights_of
        assert results[name].tokens == whole.results[name].tokens
        ours, theirs = weights(second, name), weights(whole, name)
        assert all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-6) for key in theirs)


def test_checkpoints_while_training(llama, tmp_path):
    trainer = JobTrainer(llama(), progress=False)
    trainer.add(job("a", max_steps=5))
    trainer.train(checkpoints=tmp_path, checkpoint_every=2)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert state["numbers"]["steps"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path, one: path.write_bytes(path.read_bytes()[:500]), "damaged or truncated"),
        (lambda path, one: torch.save({"x": nn.Linear(1, 1)}, path), "a pickle that would run code"),
        (lambda path, one: torch.save({"x": torch.ones(1)}, path), "no checkpoint of a job"),
        (lambda path, one: path.unlink(), "must be the file that a checkpoint of job 'a' is in"),
        (lambda path, one: setattr(one, "seed", 5), "a job with seed=97, got 5"),
        (lambda path, one: setattr(one, "batch_size", 7), "a job with batch_size=3, got 7"),
        (lambda path, one: setattr(one.config, "lora_alpha", 7), "another config: \"lora_alpha\": 4"),
        (lambda path, one: setattr(one, "scheduler", "linear"), "a schedule and this one has none, or the reverse"),
        (lambda path, one: setattr(one, "learning_rate", 1.0), "a job with learning_rate=0.001, got 1.0"),
        (lambda path, one: setattr(one, "optimizer", lambda p: torch.optim.SGD(p, lr=0.1)), "AdamW, got SGD"),
    ],
    ids=["cut", "code", "another file", "none", "seed", "batch size", "alpha", "schedule", "rate", "optimizer"],
)  # fmt: skip
def test_what_cannot_be_resumed_leaves_the_model_as_it_was(llama, untouched, tmp_path, change, message):
    trainer = JobTrainer(llama(), progress=False)
    trainer.add(job("a"))
    trainer.step()
    path, one = trainer.save_checkpoints(tmp_path)["a"], job("a")
    change(path, one)
    base = llama()
    other = JobTrainer(base, progress=False)
    with untouched(base), pytest.raises(ValueError, match=re.escape(message)):
        other.add(one, resume_from=path)
    assert other.jobs == []
    other.add(job("a", max_steps=1))
    assert other.train()["a"].state == "finished"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("raises", "OSError: the disk is gone"),
        ("id", "input_ids must be from 0 to 95, got 1 to 96"),
        ("labels", "labels must be -100 or from 0 to 95, got 1000"),
        ("no labels", "has no label to learn"),
        ("column", r"got \['text'\] too: remove these columns"),
        ("no sample", "samples must be dicts with input_ids"),
        ("floats", "input_ids must be integers"),
        ("lengths", "labels must be as many as input_ids, got 3 and 2"),
    ],
)
def test_a_job_whose_data_fail_ends_and_the_others_do_not(llama, tmp_path, kind, reason):
    trainer = JobTrainer(llama(), progress=False, keep_adapters=True)
    trainer.add(job("b", tmp_path, data=bad_rows(kind), batch_size=2, max_steps=9))
    trainer.add(job("a", max_steps=4))
    results = trainer.train()
    assert (results["b"].state, results["b"].steps) == ("failed", 2)
    assert re.search(reason, results["b"].reason)
    assert isinstance(results["b"].error, Exception)
    alone = trained(llama(), job("a", max_steps=4))
    assert losses(trainer, "a") == pytest.approx(losses(alone, "a"), rel=1e-6)
    good = trained(llama(), job("b", data=rows("b", 4), shuffle=False, batch_size=2, max_steps=2))
    assert losses(trainer, "b") == pytest.approx(losses(good, "b"), rel=1e-6)
    peft.PeftModel.from_pretrained(llama(), tmp_path / "b")  # the weights of its last good step


def poisoned(trainer: JobTrainer) -> None:
    if trainer.shared_steps == 2:
        next(iter(trainer._running["b"].parameters.values())).data[0, 0] = float("inf")


def test_a_job_whose_loss_is_not_finite_ends_and_the_others_do_not(llama, tmp_path):
    trainer = JobTrainer(llama(), progress=False, keep_adapters=True)
    for name in "abc":
        trainer.add(job(name, tmp_path, max_steps=4))
    results = trainer.train(on_step=poisoned)
    assert (results["b"].state, results["b"].steps, results["b"].folder) == ("failed", 2, None)
    assert re.search("loss after 2 steps is nan; the adapter was not written.*not finite", results["b"].reason)
    assert not (tmp_path / "b").exists()
    for name in "ac":
        alone = trained(llama(), job(name, max_steps=4))
        assert losses(trainer, name) == pytest.approx(losses(alone, name), rel=1e-6)


def test_gradients_that_are_not_finite_are_no_step(llama, tmp_path, monkeypatch):
    from peft_fast.jobs.running import Running

    def broken(running):
        return torch.tensor(float("inf") if running.name == "b" and running.steps == 1 else 1.0)

    monkeypatch.setattr(Running, "norm", broken)
    trainer = JobTrainer(llama(), progress=False)
    trainer.add(job("b", tmp_path))
    trainer.add(job("a"))
    results = trainer.train()
    assert "FloatingPointError: the norm of the gradients after 1 steps is inf" in results["b"].reason
    assert results["b"].folder == tmp_path / "b"
    assert results["a"].state == "finished"


def test_an_optimiser_that_raises_and_a_folder_that_cannot_be_written(llama, tmp_path):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no step")

    trainer = JobTrainer(llama(), progress=False)
    trainer.add(job("a", optimizer=lambda p: Failing(p, lr=0.1)))
    trainer.add(job("b", tmp_path, max_steps=3))
    trainer.add(job("c", max_steps=3))
    trainer.step()
    (tmp_path / "b").write_text("a file")
    results = trainer.train()
    assert results["a"].reason == "RuntimeError: no step"
    assert results["b"].state == "failed"
    assert "max_steps reached; the adapter was not written, and stays in the model" in results["b"].reason
    assert weights(trainer, "b")
    assert results["c"].state == "finished"


def test_a_batch_that_the_model_does_not_take_fails_its_job_alone():
    """GPT-2 has positions for 16 tokens. Dropout of the others goes on as if there had been one forward."""

    def base():
        torch.manual_seed(7)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=16, attn_pdrop=0.0, embd_pdrop=0.0,
                       resid_pdrop=0.0)
        )  # fmt: skip

    def one(name: str, data: list[dict]) -> Job:
        config = LoraConfig(r=2, lora_dropout=0.2, target_modules=["c_attn"], fan_in_fan_out=True)
        return Job(name, config, data, batch_size=2, max_steps=5, shuffle=False, learning_rate=0.02)

    long = [*rows("x", 4), {"input_ids": list(range(1, 30))}]
    trainer = trained(base(), one("long", long), one("y", rows("y")), one("z", rows("z")))
    assert (trainer.results["long"].state, trainer.results["long"].steps) == ("failed", 2)
    assert trainer.results["long"].error is not None
    for name in "yz":
        assert losses(trainer, name) == pytest.approx(losses(trained(base(), one(name, rows(name))), name), rel=1e-5)


def test_an_error_of_none_alone_is_raised_and_nothing_is_stepped(llama, monkeypatch):
    from peft_fast.jobs import groups, shared

    monkeypatch.setattr(groups, "PADDED", float("inf"))  # one forward for both
    trainer = JobTrainer(llama(), progress=False)
    for name in "ab":
        trainer.add(job(name))
    trainer.step()
    before = {name: weights(trainer, name) for name in "ab"}
    real = shared.forward

    def too_much(model, batch, autocast):
        if len(batch.parts) > 1:
            raise MemoryError("too much")
        return real(model, batch, autocast)

    monkeypatch.setattr(shared, "forward", too_much)
    with pytest.raises(MemoryError):
        trainer.step()
    assert trainer.jobs == ["a", "b"]
    assert all(torch.equal(v, before[name][key]) for name in "ab" for key, v in weights(trainer, name).items())
    assert trainer.model._mixed_training.counts == {"a": 1, "b": 1}


def test_epochs_orders_and_ends_of_data():
    def order(data, **options) -> list[list[int]]:
        batches = Batches(data, 3, **{"seed": 1, "shuffle": True, "epochs": 2, **options})
        return list(iter(batches.next, None))

    first, second = order(range(7))[:3], order(range(7))[3:]
    assert sorted(x for b in first for x in b) == sorted(x for b in second for x in b) == list(range(7))
    assert first != second
    assert order(range(7)) == first + second
    assert order(range(7), seed=5) != first + second
    assert order(range(7), shuffle=False) == order(Stream(range(7))) == [[0, 1, 2], [3, 4, 5], [6]] * 2
    assert order(iter(range(4)), epochs=None) == [[0, 1, 2], [3]]  # an iterator gives its values once
    with pytest.raises(ValueError, match="the data are empty"):
        order([])
    for data in (range(7), Stream(range(7))):
        batches = Batches(data, 3, seed=1, shuffle=True, epochs=2)
        batches.go_to(1, 1)
        whole = order(data)
        assert list(iter(batches.next, None)) == whole[4:]
