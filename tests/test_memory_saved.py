"""What is kept for the backward of a Llama layer, against HF PEFT on the same model (bench/memory_saved.py)."""

import peft
import pytest
import torch
from torch import nn

import peft_fast
from bench.memory_saved import Setting, kept, of_a_layer, total

HIDDEN, TOKENS = 128, 64
INNER = HIDDEN * 7 // 2

# (base, prepared, autocast): at most so much of HF PEFT's bytes at dropout 0 and 0.05
LIMITS = {
    ("4-bit", True, False): (0.55, 0.33),
    ("4-bit", True, True): (0.55, 0.36),
    ("4-bit", False, False): (0.45, 0.30),
    ("4-bit", False, True): (0.60, 0.36),
    ("dense", False, False): (0.45, 0.30),
    ("dense", False, True): (0.60, 0.36),
}


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("base", LIMITS, ids=str)
def test_bytes_against_peft(base, p):
    setting = Setting(*base, p)
    theirs, ours = (total(of_a_layer(library, setting, HIDDEN, TOKENS)) for library in (peft, peft_fast))
    assert ours <= LIMITS[base][p > 0] * theirs
    again = total(of_a_layer(peft_fast, setting, HIDDEN, TOKENS, mode="recompute"))
    assert again <= ours - 2 * 2 * INNER * TOKENS  # g and u, 2 bytes each


def test_a_fp32_stream_is_kept_once_and_the_inner_activations_in_bf16():
    setting = Setting("4-bit", True, False, 0.05)
    found = [(shape, dtype) for shape, dtype, _ in of_a_layer(peft_fast, setting, HIDDEN, TOKENS)]
    wide = [dtype for shape, dtype in found if shape[-1] == INNER]
    assert wide == [torch.bfloat16] * 2  # gate's and up's outputs
    stream = [shape for shape, dtype in found if dtype == torch.float32 and shape[-1] == HIDDEN]
    # The norms' inputs, as the norms keep them, and their outputs: one for q, k and v, one for gate and up.
    assert sorted(stream) == sorted([(2, TOKENS // 2, HIDDEN)] * 2 + [(TOKENS, HIDDEN)] * 2)


def test_a_gpus_masks_are_smaller():
    setting = Setting("dense", False, False, 0.05)
    cpu, gpu = (total(of_a_layer(peft, setting, HIDDEN, TOKENS, gpu=gpu)) for gpu in (False, True))
    assert gpu < cpu


def test_the_counter_on_known_cases():
    x, model = torch.randn(4, 8, requires_grad=True), nn.Linear(8, 2)
    assert [(shape, size) for shape, _, size in kept(lambda: model(x), model)] == [
        ((4, 8), 4 * 8 * 4)
    ]  # not the weight
    y = torch.randn(4, 8, requires_grad=True)
    assert total(kept(lambda: x * y, model)) == 2 * 4 * 8 * 4
    assert total(kept(lambda: x * x, model)) == 4 * 8 * 4  # once
    assert total(kept(lambda: x[:1] * y[:1], model)) == 2 * 4 * 8 * 4  # whole storages
    assert kept(lambda: x + y, model) == []
