"""LoRA+ beside peft's."""

import bitsandbytes
import peft
import peft.optimizers
import pytest
import torch

import peft_fast
from peft_fast.optimizers import create_loraplus_optimizer

CREATE = {peft: peft.optimizers.create_loraplus_optimizer, peft_fast: create_loraplus_optimizer}
KINDS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["norm"], "use_dora": True},
}


def models(llama, **options):
    for library in (peft, peft_fast):
        torch.manual_seed(0)
        yield library, library.get_peft_model(llama(attention_bias=True), library.LoraConfig(**options))


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_pefts(kind, llama):
    found = []
    for library, model in models(llama, **KINDS[kind]):
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizer = CREATE[library](
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1,
            loraplus_lr_embedding=1e-5, betas=(0.8, 0.9),
        )  # fmt: skip
        assert isinstance(optimizer, torch.optim.AdamW)
        found.append([{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups])
    assert found[0] == found[1]
    named = [name for group in found[1] for name in group["params"]]
    assert sorted(named) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    rates = {"A": 1e-3, "embedding": 1e-5, "B": 1.6e-2}
    assert [group["lr"] for group in found[1]] == [rates["A"], rates["embedding"], rates["B"], rates["B"]]


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_pefts_weights(kind, llama, tokens):
    results = []
    for library, model in models(llama, **KINDS[kind]):
        optimizer = CREATE[library](model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4, momentum=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        results.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_of_8_bits_embeddings_keep_32(llama):
    overridden = []
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for library, model in models(llama, **KINDS["plain"]):
        before = len(manager.module_weight_config_triple)
        optimizer = CREATE[library](model, bitsandbytes.optim.AdamW8bit, lr=1e-3, loraplus_lr_ratio=2)
        assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
        overridden.append(manager.module_weight_config_triple[before:])
        assert [(name, options) for _, name, options in overridden[-1]] == [("weight", {"optim_bits": 32})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0}, "lr must be a positive number, got 0"),
        ({"lr": "1e-3"}, "lr must be a positive number, got '1e-3'"),
        ({"loraplus_lr_ratio": float("nan")}, "loraplus_lr_ratio must be a positive number, got nan"),
        ({"loraplus_lr_embedding": -1}, "loraplus_lr_embedding must be a positive number, got -1"),
    ],
)
def test_bad_rates(arguments, message, llama):
    _, model = next(models(llama, **KINDS["plain"]))
    with pytest.raises(ValueError, match=message):
        create_loraplus_optimizer(model, torch.optim.SGD, **{"lr": 1e-3, "loraplus_lr_ratio": 2, **arguments})


def test_nothing_to_train(llama):
    *_, (_, model) = models(llama, **KINDS["plain"])
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ValueError, match="no trainable parameters"):
        create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=2)
