"""JobTrainer: jobs in shared batches beside each job alone, and beside a loop with HF PEFT."""

import copy
import math

import peft
import pytest
import torch
from torch import nn

from peft_fast import Job, JobResult, JobTrainer, LoraConfig
from peft_fast.jobs import data, groups, shared
from peft_fast.jobs import trainer as trainer_module

from .job_models import OPTIONS, VOCABULARY, job, rows, trained, weights


@pytest.fixture(autouse=True)
def _one_forward(monkeypatch) -> None:
    """All jobs share it, whatever their lengths: that this changes nothing is to be seen."""
    monkeypatch.setattr(groups, "PADDED", float("inf"))


def assert_same(one: dict, other: dict, rtol: float = 1e-3, atol: float = 2e-6) -> None:
    assert set(one) == set(other)
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def gradients(base: nn.Module, names: str, **options) -> dict[str, torch.Tensor]:
    """Of two forwards: B is zero in the first, and A gets none."""
    trainer = JobTrainer(base, progress=False)
    for name in names:
        trainer.add(job(name, accumulation=3, max_grad_norm=None, **options))
    with torch.no_grad():
        for name in names:
            generator = torch.Generator().manual_seed(1)
            for key, p in trainer._parameters(name).items():
                if "lora_B" in key:
                    p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    for _ in range(2):
        trainer.step()
    return {key: p.grad for name in names for key, p in trainer._parameters(name).items() if p.grad is not None}


@pytest.mark.parametrize("kind", ["dense", "4-bit", "checkpointing"])
def test_gradients_are_those_of_each_job_alone(llama, llama_4bit, kind):
    """Dropout included, though the others' longer samples pad this one's."""

    def base():
        model = (llama_4bit if kind == "4-bit" else llama)()
        if kind == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    together = gradients(base(), "abcd")
    plain = gradients(llama(), "abcd") if kind == "checkpointing" else None
    alone = {key: value for name in "abcd" for key, value in gradients(base(), name).items()}
    assert all(f".{name}." in " ".join(alone) for name in "abcd")
    assert_same(together, alone, rtol=1e-4, atol=1e-6)
    if plain is not None:
        assert_same(together, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [16, pytest.param(4, marks=pytest.mark.slow)])
def test_fifty_steps_together_are_fifty_steps_alone(llama, llama_4bit, bits):
    base = (llama_4bit if bits == 4 else llama)(num_hidden_layers=1)
    together = trained(copy.deepcopy(base), *(job(name, max_steps=50) for name in "abcd"))
    for name in "abcd":
        alone = trained(copy.deepcopy(base), job(name, max_steps=50))
        ours, theirs = together.results[name], alone.results[name]
        assert ours.steps == theirs.steps == 50
        assert values(ours) == pytest.approx(values(theirs), rel=2e-6)
        assert_same(weights(together, name), weights(alone, name), rtol=0.0, atol=1e-6)
        moved = [value.abs().max() for key, value in weights(alone, name).items() if "lora_B" in key]
        assert min(moved) > 5 * OPTIONS[name]["lr"]


def values(result: JobResult) -> list[float]:
    return [loss for _, loss in result.losses]


def test_losses_and_weights_are_those_of_a_loop_with_peft(llama):
    """Without dropout, from the same seed: the start, and ten steps of AdamW with clipping and a schedule."""
    names = "abcd"

    def half(step: int) -> float:
        return 0.5**step

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, half)

    jobs = [job(name, max_steps=10, shuffle=False, max_grad_norm=0.5, scheduler=schedule) for name in names]
    for one in jobs:
        one.config.lora_dropout = 0.0
    trainer = trained(llama(), *jobs)
    for one in jobs:
        own = {k: v for k, v in OPTIONS[one.name].items() if k not in ("lr", "lengths", "lora_dropout")}
        torch.manual_seed(one.seed)
        model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **own), one.name).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=one.learning_rate, weight_decay=0.0)
        scheduler, losses = schedule(optimizer), []
        chunks = [one.data[i : i + one.batch_size] for i in range(0, len(one.data), one.batch_size)]
        for step in range(10):
            loss = model(**padded(chunks[step % len(chunks)])).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert values(trainer.results[one.name]) == pytest.approx(losses, rel=1e-5)
        theirs = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
        assert_same(weights(trainer, one.name), theirs, atol=2e-5)


def padded(batch: list[dict]) -> dict[str, torch.Tensor]:
    def column(key: str, padding: int) -> torch.Tensor:
        values = [torch.tensor(row[key]) for row in batch]
        return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)

    mask = column("input_ids", -1) != -1
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": mask.long()}


def test_accumulation_counts_forwards_alike_and_makes_a_step_of_what_is_left(llama):
    """Seven batches of two in threes: two steps of three, and one of what is left, weighed as a whole."""
    one = job("a", epochs=1, max_steps=None, batch_size=2, accumulation=3, shuffle=False, max_grad_norm=None)
    one.config.lora_dropout = 0.0
    trainer = trained(llama(), one)
    own = {k: v for k, v in OPTIONS["a"].items() if k not in ("lr", "lengths", "lora_dropout")}
    torch.manual_seed(one.seed)
    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **own), "a").train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=one.learning_rate, weight_decay=0.0)
    batches = [one.data[i : i + 2] for i in range(0, 13, 2)]
    for group in (batches[:3], batches[3:6], batches[6:]):
        for batch in group:
            (model(**padded(batch)).loss / len(group)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trainer.results["a"].steps == 3
    theirs = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    assert_same(weights(trainer, "a"), theirs, atol=2e-5)


def test_jobs_of_other_lengths_have_a_forward_of_their_own(llama, monkeypatch):
    """Where more than a fifth of one would be padding."""
    monkeypatch.setattr(groups, "PADDED", 1.25)
    lengths, met = {"a": 30, "b": 24, "c": 8, "d": 29}, []
    trainer = JobTrainer(llama(), progress=False)
    for name, length in lengths.items():
        trainer.add(job(name, data=[{"input_ids": list(range(1, length + 1))}] * 5, batch_size=2))
    real = shared.forward

    def noted(model, batch, autocast):
        met.append((set(batch.adapters.adapters), tuple(batch.ids.shape)))
        return real(model, batch, autocast)

    monkeypatch.setattr(shared, "forward", noted)
    trainer.step()
    assert met == [({"a", "b", "d"}, (6, 30)), ({"c"}, (2, 8))]


def test_room_for_fewer_tokens_changes_no_result(llama, monkeypatch):
    """Jobs of like lengths share a forward, as many as there is room for; one that is too long has its own."""
    sizes, real = [], shared.forward

    def noted(model, batch, autocast):
        sizes.append((batch.adapters.adapters, batch.ids.numel()))
        return real(model, batch, autocast)

    whole = trained(llama(), *(job(name) for name in "abcd"))
    monkeypatch.setattr(shared, "forward", noted)
    divided = trained(llama(), *(job(name) for name in "abcd"), max_tokens=90)
    assert {len(names) for names, _ in sizes} >= {1, 2}
    assert all(size <= 90 for names, size in sizes if len(names) > 1)
    assert divided.shared_steps == whole.shared_steps == 5
    for name in "abcd":
        assert values(divided.results[name]) == pytest.approx(values(whole.results[name]), rel=2e-6)
        assert_same(weights(divided, name), weights(whole, name), rtol=0.0, atol=1e-6)
    with pytest.raises(ValueError, match="max_tokens must be a positive integer, None or 'auto', got 0"):
        JobTrainer(llama(), max_tokens=0)


def test_by_itself_a_cpu_gets_forwards_that_its_caches_hold(llama, monkeypatch):
    assert JobTrainer(llama(), max_tokens=None).max_tokens is None
    assert JobTrainer(llama()).max_tokens == 512
    monkeypatch.setattr(trainer_module, "CPU_TOKENS", 90)
    sizes, real = [], shared.forward

    def noted(model, batch, autocast):
        sizes.append((len(batch.adapters.adapters), batch.ids.numel()))
        return real(model, batch, autocast)

    monkeypatch.setattr(shared, "forward", noted)
    trained(llama(), *(job(name) for name in "abcd"))
    assert {jobs for jobs, _ in sizes} >= {1, 2}
    assert all(size <= 90 for jobs, size in sizes if jobs > 1)


def test_the_loss_is_transformers_own(llama):
    """The logits' gradient too; and a job whose loss is not finite leaves the others' alone."""
    model = llama()
    own = {name: rows(name, 3) for name in "ab"}
    batch = shared.join([(name, data.batch_of(own[name], VOCABULARY)) for name in "ab"], 0)
    theirs = torch.stack([model(**padded(own[name])).loss for name in "ab"])
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(shared.losses(logits, batch), theirs, rtol=1e-6, atol=1e-6)
    leaf = logits.detach().requires_grad_()
    found = shared.backward(leaf, batch, [1.0, 0.25])
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-6)
    again = logits.detach().requires_grad_()
    first = nn.functional.cross_entropy(again[:3, :-1].flatten(0, 1), labels_of(batch, 0), ignore_index=-100)
    second = nn.functional.cross_entropy(again[3:, :-1].flatten(0, 1), labels_of(batch, 1), ignore_index=-100)
    (first + 0.25 * second).backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-5, atol=1e-8)
    broken = logits.detach().clone()
    broken[:3] = float("nan")
    broken.requires_grad_()
    found = shared.backward(broken, batch, [1.0, 0.25])
    assert found.isnan().tolist() == [True, False]
    assert not broken.grad[:3].any()
    torch.testing.assert_close(broken.grad[3:], leaf.grad[3:])


def labels_of(batch: shared.SharedBatch, number: int) -> torch.Tensor:
    targets = torch.full((batch.ids.numel(),), -100)
    targets[batch.parts[number].places] = batch.parts[number].targets
    return targets.view(batch.ids.shape)[3 * number : 3 * number + 3, :-1].flatten()


def test_memory_beside_the_logits_is_of_one_job_at_a_time():
    """bf16 logits of eight jobs: their gradient in bf16, and what one job's softmax needs, but no fp32 copy of all."""
    from bench.memory_peak import peak

    jobs, tokens, vocabulary = 8, 64, 2000
    sample = data.sample_of({"input_ids": list(range(1, tokens + 1))}, vocabulary)
    batch = shared.join([(f"j{i}", [sample]) for i in range(jobs)], 0)
    logits = torch.randn(jobs, tokens, vocabulary, dtype=torch.bfloat16).requires_grad_()
    logits.grad = torch.zeros_like(logits)
    all_of_them = logits.numel() * 2
    one = all_of_them // jobs
    assert peak(lambda: shared.backward(logits, batch, [1.0] * jobs)) < all_of_them + 9 * one


def test_bf16_autocast(llama):
    """Losses near those in fp32, though not equal; the adapters stay fp32."""
    exact = trained(llama(), *(job(name, max_steps=6) for name in "ab"))
    rounded = trained(llama(), *(job(name, max_steps=6) for name in "ab"), autocast=torch.bfloat16)
    for name in "ab":
        pairs = zip(values(exact.results[name]), values(rounded.results[name]))
        assert 0 < max(abs(one - other) for one, other in pairs) < 0.03
        assert {p.dtype for p in weights(rounded, name).values()} == {torch.float32}


def test_dora_and_trained_copies_take_part(llama):
    """Layers that run one adapter after the other draw dropout from each adapter's own keys as well."""

    def jobs() -> list[Job]:
        options = {"task_type": "CAUSAL_LM", "lora_dropout": 0.2}
        dora = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"], **options)
        copies = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], **options)
        tokens = LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[1, 5, 7], **options)
        return [
            Job(name, config, rows(name), batch_size=3, max_steps=4, seed=3)
            for name, config in (("x", dora), ("y", copies), ("z", tokens))
        ]

    together = trained(llama(), *jobs())
    for one in jobs():
        alone = trained(llama(), one)
        ours, theirs = values(together.results[one.name]), values(alone.results[one.name])
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert_same(weights(together, one.name), weights(alone, one.name), atol=2e-6)
    kinds = {"lora_magnitude_vector": "x", "modules_to_save": "y", "trainable_tokens_delta": "z"}
    for kind, name in kinds.items():
        assert any(f"{kind}.{name}" in key for key in weights(together, name))


def test_a_jobs_own_seed_decides(llama):
    """Not torch's generator, nor who else is there: start, order and dropout; another seed gives something else."""
    torch.manual_seed(1)
    one = trained(llama(), job("c"))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    other = trained(llama(), job("c"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.results["c"].losses == other.results["c"].losses
    changed = job("c")
    changed.seed = 5
    third = trained(llama(), changed)
    assert third.results["c"].losses != one.results["c"].losses
    assert all(math.isfinite(loss) for _, loss in third.results["c"].losses)
