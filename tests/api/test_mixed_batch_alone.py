"""Batches of one adapter, which run as that adapter does when it is active; what is kept of a batch, and what a refused
one leaves."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_fast
from peft_fast import LoraConfig, get_peft_model
from peft_fast.tuners.mixed_batch import MixedBatch, TokenAdapters, assigned

from .test_mixed_batch import MODELS, ids, llama, with_adapters


def test_stacks_are_kept_from_a_batchs_second_forward_on():
    """One forward takes no memory for them; the steps of generating share them."""
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, "a")
    model.add_adapter("b", config)
    layer = model.eval().base_model.model[0]
    batch, x, outputs, kept = MixedBatch(["a", "b"]), torch.randn(2, 8), [], []
    with torch.no_grad(), assigned([layer], batch):
        for _ in range(3):
            outputs.append(layer(x))
            call = batch.kept[layer]
            kept.append(call is not None and len(call.adapters.A.kept) > 0)
    assert kept == [False, True, True]
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[1], rtol=0, atol=0)


class OpNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def test_a_batch_of_one_adapter_is_that_adapter_active():
    """Bit for bit, with the ops that take an MLP's layers and an attention's together; not so with another in it."""
    config = {"r": 4, "target_modules": "all-linear"}
    model = with_adapters(peft_fast, llama(), config, config)
    model.set_adapter("a")
    with torch.no_grad():
        expected = model(input_ids=ids()).logits
        model.set_adapter("b")
        for adapters in (["a"] * 4, TokenAdapters(["a"], torch.zeros(4, 6, dtype=torch.int64)), ["a", "a", "a", "b"]):
            with OpNames() as found:
                y = model(input_ids=ids(), adapter_names=adapters).logits
            torch.testing.assert_close(y[:3], expected[:3], rtol=1e-5, atol=1e-5)
            if adapters != ["a", "a", "a", "b"]:
                assert torch.equal(y, expected)
                assert {"lora_mlp", "lora_group", "lora_linear"} <= found.names
                assert "lora_linear_multi" not in found.names
    assert {"lora_linear_multi"} <= found.names
    assert not {"lora_mlp", "lora_group"} & found.names


def test_one_adapter_for_another_number_of_samples_is_refused():
    model = with_adapters(peft_fast, llama(), *MODELS["linear"])
    for adapters in (["a"], TokenAdapters(["a"], torch.zeros(4, 5, dtype=torch.int64))):
        with torch.no_grad(), pytest.raises(ValueError, match="name"):
            model(input_ids=ids(), adapter_names=adapters)


@pytest.mark.parametrize("dora", [False, True])
def test_one_adapter_drops_what_it_drops_beside_others(dora):
    """Its masks are functions of its own generator: which op computes them does not matter."""
    config = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.3, "use_dora": dora}
    grads = []
    for others in (0, 2):
        model = with_adapters(peft_fast, llama(), config, config)
        model.enable_mixed_batch_training(seeds={"a": 5, "b": 6})
        model.train()
        batch = ids(2 + others)
        y = model(input_ids=batch, adapter_names=["a"] * 2 + ["b"] * others).logits
        y[:2].square().sum().backward()
        grads.append([p.grad for n, p in model.named_parameters() if ".a." in n])
    assert all(g is not None for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_a_refused_forward_draws_no_dropout():
    config = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.3}
    outputs = []
    for refused in (False, True):
        model = with_adapters(peft_fast, llama(), config, config)
        model.enable_mixed_batch_training(seeds={"a": 5, "b": 6})
        model.train()
        if refused:
            with pytest.raises(ValueError, match="one name a sample"):
                model(input_ids=ids(), adapter_names=["a", "b"])
        outputs.append(model(input_ids=ids(), adapter_names=["a", "b", "a", "b"]).logits)
    assert torch.equal(*outputs)
