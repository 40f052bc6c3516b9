"""Steps of JobTrainer that are broken off, in the backward too; and what an optimiser or held-out data leave out."""

import pytest
import torch

from peft_fast import JobTrainer
from peft_fast.jobs import groups

from .job_models import job, rows, trained, weights


class Breaking(torch.autograd.Function):
    """The identity, whose backward raises `error`, once."""

    error: BaseException | None = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        error, Breaking.error = Breaking.error, None
        if error is not None:
            raise error
        return gradient


def breaking(llama):
    """Half of its layers have gradients when it raises."""
    model = llama()
    model.model.layers[-1].input_layernorm.register_forward_hook(lambda module, args, out: Breaking.apply(out))
    return model


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def plain(name, data, **options):
    return job(
        name, data=data, shuffle=False, batch_size=2, max_steps=3, optimizer=sgd, max_grad_norm=None, **options
    )  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_a_backward_that_is_broken_off_leaves_no_gradients(llama, monkeypatch, error, accumulation):
    """The step begins anew with the next batch: as if those of it that had been taken were not among the data."""
    monkeypatch.setattr(groups, "PADDED", float("inf"))  # one forward for both
    data = {name: rows(name, 16) for name in "bd"}
    trainer = JobTrainer(breaking(llama), progress=False, keep_adapters=True, max_tokens=None)
    for name, samples in data.items():
        trainer.add(plain(name, samples, accumulation=accumulation))
    for _ in range(2 * accumulation - 1):
        trainer.step()
    Breaking.error = error
    with pytest.raises(type(error)):
        trainer.train()
    assert trainer.jobs == ["b", "d"]
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.train()
    first, last = 2 * accumulation, 4 * accumulation
    left = data["b"][:first] + data["b"][last:]
    alone = weights(trained(llama(), plain("b", left, accumulation=accumulation)), "b")
    for key, value in weights(trainer, "b").items():
        torch.testing.assert_close(value, alone[key], rtol=1e-5, atol=1e-6)


def test_a_backward_of_one_job_that_raises_is_its_failure(llama):
    trainer = JobTrainer(breaking(llama), progress=False, keep_adapters=True, max_tokens=1)
    trainer.add(plain("d", rows("d", 16)))  # the longer one, and so the first
    trainer.add(plain("b", rows("b", 16)))
    trainer.step()
    Breaking.error = MemoryError("no more")
    with pytest.warns(UserWarning, match="failed, the others go on"):
        results = trainer.train()
    failed = [name for name in "bd" if results[name].state == "failed"]
    assert len(failed) == 1
    assert (results[failed[0]].reason, results[failed[0]].steps) == ("MemoryError: no more", 1)
    other = "db"[failed[0] == "d"]
    assert (results[other].state, results[other].steps) == ("finished", 3)


def test_gradients_of_parameters_that_the_optimiser_was_not_given_do_not_pile_up(llama):
    """They would count in the norm, and so the others would be scaled down more in each step."""
    trainer = JobTrainer(llama(), progress=False)
    trainer.add(job("b", optimizer=lambda parameters: sgd(parameters[1::2])))
    trainer.step()
    assert all(p.grad is None for p in trainer.model.parameters())


def test_held_out_samples_without_labels_count_nothing(llama):
    empty = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    found = []
    for samples in (rows("d", 3), [empty, *rows("d", 3), empty]):
        trainer = JobTrainer(llama(), progress=False)
        trainer.add(job("b", eval_data=samples, eval_every=1, eval_batch_size=1))
        found.append(trainer.evaluate("b"))
    assert found[0] == found[1]
    trainer.add(job("a", eval_data=[empty], eval_every=1))
    with pytest.raises(ValueError, match="eval_data of job 'a' have no label"):
        trainer.evaluate("a")


def test_a_job_that_is_resumed_with_no_steps_left_makes_none(llama, tmp_path):
    trainer = JobTrainer(llama(), progress=False)
    trainer.add(job("b"))
    trainer.step()
    trainer.step()
    path = trainer.save_checkpoints(tmp_path)["b"]
    other = JobTrainer(llama(), progress=False)
    other.add(job("b", max_steps=2), resume_from=path)
    result = other.train()["b"]
    assert (result.state, result.steps, result.reason) == ("finished", 2, "max_steps reached")


def test_a_schedule_by_name_that_needs_a_metric(llama):
    with pytest.raises(TypeError, match="stepped without a metric, got ReduceLROnPlateau"):
        JobTrainer(llama(), progress=False).add(job("b", scheduler="reduce_lr_on_plateau"))
