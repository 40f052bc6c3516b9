"""The estimate of memory, and what happens when it runs out."""

from dataclasses import replace

import pytest
import torch

from peft_fast.finetune import base_model, memory, run
from peft_fast.finetune.options import parse


@pytest.mark.parametrize("bits", [4, 8])
def test_memory_estimate(arguments, model_folder, bits):
    options = parse([*arguments, "--bits", str(bits)])
    base = base_model.load_base(options)
    model = base_model.add_adapter(base, options)
    estimate = memory.estimate(model, options, 32)
    trainable, _ = model.get_nb_trainable_parameters()
    assert estimate.adapter == estimate.gradients == 4 * trainable
    assert estimate.optimizer_states == 8 * trainable
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)  # q and o, k and v, the MLP; two layers
    rest = 4 * (257 * 64 + 5 * 64)  # embedding and norms in fp32
    if bits == 4:
        quantised = 0.516 * linear + 14 * 4 * (256 + 16)  # the codebooks of each of the 14 layers
    else:
        quantised = linear + 2 * 4 * (3 * 64 + 2 * 32 + 2 * 128)  # a scale a row: q, o and down, k and v, gate and up
    assert estimate.base_weights == pytest.approx(quantised + rest, rel=0.01 if bits == 4 else 1e-3)
    twice = memory.estimate(model, replace(options, batch_size=8), 32)
    assert twice.activations == pytest.approx(2 * estimate.activations, rel=0.02)  # casts of weights are kept once
    assert vars(memory._measured(model, options, 32)).keys() == vars(estimate).keys() - {"available"}
    assert 2**28 < estimate.available < 2**50


def test_the_measured_activations_are_what_backward_keeps():
    """One linear layer and a tanh: x for the adapter, its product with A, and tanh's output."""

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.randn(64, 4)), torch.nn.Parameter(torch.randn(4, 64))

        def forward(self, input_ids, labels):
            x = torch.ones(input_ids.shape[1], 64)
            return type("Output", (), {"loss": (x @ self.a @ self.b).tanh().sum()})

    assert memory.kept_for_backward(Model(), 16, torch.float32) == 4 * 16 * (64 + 4 + 64)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ...")])
@pytest.mark.parametrize(("bits", "saved"), [(16, 560), (8, 320)])
def test_running_out_of_memory_gives_advice(arguments, error, bits, saved):
    options = replace(parse(arguments), bits=bits, sequence_length=512)
    estimate = memory.Estimate(800 * 2**20, 1, 1, 1, 400 * 2**20, 0, 0, available=2**20)
    with pytest.raises(memory.OutOfMemory) as raised, memory.advice_when_exhausted(options, estimate):
        raise error
    lines = str(raised.value).splitlines()
    assert f"  --bits 4: about {saved} MiB less" in lines
    assert any("--batch-size 2 --gradient-accumulation 2 (the same training): about 200 MiB" in line for line in lines)
    assert any("--gradient-checkpointing" in line for line in lines)


def test_only_running_out_of_memory_is_taken_for_it(arguments):
    options = parse(arguments)
    with pytest.raises(memory.OutOfMemory), memory.advice_when_exhausted(options):
        torch.empty(2**60, dtype=torch.uint8)  # the CPU allocator's own error
    with pytest.raises(RuntimeError, match="size of tensor"), memory.advice_when_exhausted(options):
        torch.ones(2) + torch.ones(3)


def test_out_of_memory_ends_the_command_without_a_traceback(arguments, monkeypatch, capsys):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base_model, "load_base", exhausted)
    assert run.main(arguments) == 1
    assert "to need less, in this order:" in capsys.readouterr().err


def test_memory_that_runs_out_in_the_check_of_packing_gives_advice(arguments, monkeypatch, capsys):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base_model, "refuse_leaky_packing", exhausted)
    assert run.main([*arguments, "--packing"]) == 1
    assert "to need less, in this order:" in capsys.readouterr().err
