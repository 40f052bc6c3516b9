"""TRL's trainers, given a model of ours or an accelerated one of peft's, beside peft's own."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peft_fast

from .runs import SETTINGS, TARGETS, TEXTS, adapted, base, distance, losses, tensor_files, tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")
datasets = pytest.importorskip("datasets")

KINDS = ["peft_fast", "accelerated"]
PAIRS = {"prompt": [t[:8] for t in TEXTS], "chosen": [t[8:] for t in TEXTS], "rejected": [t[:7:-1] for t in TEXTS]}


def supervised(model: Any, folder: Path, **options: Any) -> Any:
    arguments = trl.SFTConfig(**{"output_dir": str(folder), "max_length": 32, "bf16": False, **SETTINGS, **options})
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer()
    )


def preferring(model: Any, folder: Path, **options: Any) -> Any:
    arguments = trl.DPOConfig(**{"output_dir": str(folder), "max_length": 32, "bf16": False, **SETTINGS, **options})
    rows = datasets.Dataset.from_dict(PAIRS)
    return trl.DPOTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer()
    )


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


def rewarded(model: Any, folder: Path, **options: Any) -> Any:
    arguments = trl.GRPOConfig(
        **{
            "output_dir": str(folder), "bf16": False, "num_generations": 2, "max_completion_length": 6, "beta": 0.1,
            **SETTINGS, **options,
        }
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"prompt": PAIRS["prompt"]})
    return trl.GRPOTrainer(
        model=model, args=arguments, reward_funcs=vowels, train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer(),
    )  # fmt: skip


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
}  # fmt: skip
TRAINERS = {"sft": supervised, "dpo": preferring, "grpo": rewarded}


def trained(kind: str, make: Any, folder: Path, resume: str | None = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = make(adapted(kind, base()), folder, **options)
        made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINERS)
def test_losses_are_pefts_to_five_digits(tmp_path, kind, name):
    runs = [losses(trained(one, TRAINERS[name], tmp_path / one)) for one in ("peft", kind)]
    assert distance(*runs) < 1e-5
    assert runs[0][0] != runs[0][-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_under_bf16_autocast_losses_differ_by_rounding(tmp_path, kind, name):
    make = TRAINERS[name]
    exact = losses(trained("peft", make, tmp_path / "a"))
    theirs, ours = (losses(trained(one, make, tmp_path / one, bf16=True)) for one in ("peft", kind))
    assert distance(theirs, exact) > 0
    assert distance(ours, exact) < 1.5 * distance(theirs, exact) + 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"packing": True},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1},
        {"assistant_only_loss": False, "completion_only_loss": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_supervised_training(tmp_path, kind, options):
    runs = [losses(trained(one, supervised, tmp_path / one, **options)) for one in ("peft", kind)]
    assert distance(*runs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINERS)
def test_checkpoints_hold_adapters_alone_and_resuming_is_not_noticed(tmp_path, kind, name):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(kind, TRAINERS[name], tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert "model.safetensors" not in tensor_files(checkpoint)
    assert all(".lora_" in key for key in load_file(checkpoint / "adapter_model.safetensors"))
    resumed = trained(kind, TRAINERS[name], tmp_path / "resumed", str(checkpoint), **options)
    assert distance(losses(resumed), losses(whole)) < 1e-5
    whole.save_model(str(tmp_path / "saved"))
    again = peft_fast.PeftModel.from_pretrained(base(), tmp_path / "saved")
    ids = torch.randint(4, 30, (2, 9))
    whole.model.eval()
    with torch.no_grad():
        expected = whole.model.get_base_model()(input_ids=ids).logits
        assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINERS)
def test_evaluating_in_between_and_the_best_model(tmp_path, kind, name):
    made = trained(kind, TRAINERS[name], tmp_path, **BEST)
    evaluated = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 2
    assert made.state.best_metric == min(evaluated)
    best = load_file(tmp_path / f"checkpoint-{2 + 2 * evaluated.index(min(evaluated))}" / "adapter_model.safetensors")
    mine = made.model.state_dict()
    assert all(torch.equal(mine[key.replace(".weight", ".default.weight")], tensor) for key, tensor in best.items())
    if name != "grpo":  # whose evaluations draw other answers each time
        assert made.evaluate()["eval_loss"] == pytest.approx(min(evaluated), abs=1e-4)


def test_an_adapter_on_the_head_is_refused_as_with_peft(tmp_path):
    """TRL multiplies by the head's weight itself: such an adapter would never be trained."""
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        supervised(adapted("peft_fast", base(), target_modules=["lm_head", "q_proj"]), tmp_path)


def test_dpo_keeps_the_starting_adapter_as_its_reference(tmp_path):
    made = trained("peft_fast", preferring, tmp_path)
    tensors = made.model.state_dict()
    copies = [name for name in tensors if ".ref." in name]
    assert len(copies) == 28
    fresh = adapted("peft_fast", base()).state_dict()
    assert all(torch.equal(tensors[name], fresh[name.replace(".ref.", ".default.")]) for name in copies)


def test_a_model_that_the_trainer_made_is_accelerated_in_place(tmp_path):
    import peft

    runs = []
    for accelerates in (False, True):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
        arguments = trl.SFTConfig(output_dir=str(tmp_path), max_length=32, bf16=False, **SETTINGS)
        rows = datasets.Dataset.from_dict({"text": TEXTS})
        made = trl.SFTTrainer(
            model=base(), args=arguments, train_dataset=rows, processing_class=tokenizer(), peft_config=config
        )
        if accelerates:
            routes = {row.route for row in peft_fast.accelerate(made.model).rows}
            assert routes == {"reference", "group", "mlp"}
        made.train()
        runs.append(losses(made))
    assert distance(*runs) < 1e-5
    peft_fast.restore(made.model)
    assert {row.route for row in peft_fast.explain(made.model, show=False).rows} == {"peft"}


@pytest.mark.slow
def test_a_model_that_the_trainer_made_has_all_of_a_trainers_life_accelerated(tmp_path):
    """SFTTrainer(peft_config=) where peft is installed: checkpoints, resuming, evaluating, the best model, saving."""
    import peft

    def run(accelerates, resume=None):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
        folder = tmp_path / str(accelerates)
        arguments = trl.SFTConfig(output_dir=str(folder), max_length=32, bf16=False, **{**SETTINGS, **BEST})
        rows = datasets.Dataset.from_dict({"text": TEXTS})
        made = trl.SFTTrainer(
            model=base(), args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer(),
            peft_config=config,
        )  # fmt: skip
        if accelerates:
            peft_fast.accelerate(made.model)
        made.train(resume_from_checkpoint=resume)
        evaluated = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row]
        assert made.evaluate()["eval_loss"] == pytest.approx(min(evaluated), abs=1e-5)
        return made, losses(made) + evaluated

    theirs, ours = run(False), run(True)
    assert distance(theirs[1], ours[1]) < 1e-5
    checkpoint = tmp_path / "True" / "checkpoint-2"
    assert "model.safetensors" not in tensor_files(checkpoint)
    assert all(".lora_" in key for key in load_file(checkpoint / "adapter_model.safetensors"))
    assert distance(run(True, str(checkpoint))[1], ours[1]) < 1e-5
    ours[0].save_model(str(tmp_path / "saved"))
    ids = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        expected = ours[0].model.eval()(input_ids=ids).logits
        for library in (peft, peft_fast):
            read = library.PeftModel.from_pretrained(base(), tmp_path / "saved").eval()
            assert torch.allclose(read(input_ids=ids).logits, expected, atol=1e-5)
