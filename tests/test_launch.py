"""Plans launch what Triton itself would, with its own code for CUDA on top of a driver that only takes notes."""

from unittest.mock import patch

import pytest
import torch
import triton
from triton.runtime import driver

from bench.host_time import NoDriver
from peft_fast.kernels import lora_down, lora_up_add
from peft_fast.kernels.launch import Plan

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret or torch.cuda.is_available(), reason="Triton's own launcher, and no GPU"
)
BF16 = torch.bfloat16


class Notes(NoDriver):
    """What the driver is told: of the binary all that Triton decides it by, and the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple] = []
        self.launcher_cls = self.launcher

    def launcher(self, source, metadata):
        binary = metadata.name, str(source.signature), str(source.constants), str(source.attrs), metadata.num_warps

        def run(*args):
            grid, arguments = args[:3], args[9:]
            told = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            self.taken.append((binary, grid, told))

        return run


@pytest.fixture(scope="module")
def driver_of_all():
    """One: what Triton has compiled keeps its launcher."""
    found, before = Notes(), driver._active
    driver.set_active(found)
    yield found
    driver._active = before


@pytest.fixture
def notes(driver_of_all):
    driver_of_all.taken = []
    return driver_of_all


def calls():
    """Twice the same, then such as need another binary: a misaligned A, an A of another dtype, no rows to add, a rank
    of 1, another M; at last the first again."""
    K, R = 64, 16
    whole = torch.zeros(40, K, dtype=BF16)
    x, A = whole[:32], torch.zeros(R, K, dtype=BF16)
    odd = torch.zeros(R * K + 1, dtype=BF16)[1:].view(R, K)
    y, B, bias = torch.zeros(32, K, dtype=BF16), torch.zeros(K, R, dtype=BF16), torch.zeros(K, dtype=BF16)
    s = torch.zeros(32, R, dtype=BF16)
    for of_A in (A, A, odd, A.float(), A[:1], A):
        lora_down.lora_down(x, of_A)
    lora_down.lora_down(whole, A)
    for of_bias in (None, bias, None, torch.zeros(K + 1, dtype=BF16)[1:]):
        lora_up_add.lora_up_add_(y, s, B, 2.0, of_bias)
    lora_up_add.lora_up_add_(y, s, B, 0.5, bias)


def same_binaries_and_numbers(found, expected):
    """Tensors that the launchers allocate lie elsewhere each time."""
    assert len(found) == len(expected) > 8
    for (binary, grid, told), (by_binary, by_grid, by_told) in zip(found, expected):
        assert (binary, grid, len(told)) == (by_binary, by_grid, len(by_told))
        assert [a for a in told if not is_address(a)] == [a for a in by_told if not is_address(a)]


def is_address(argument) -> bool:
    return isinstance(argument, int) and argument > 1 << 32


def test_plans_launch_what_triton_would(notes):
    for cached in (lora_down._forward_plan, lora_up_add._forward_plan):
        cached.cache_clear()
    calls()
    calls()
    by_plan, notes.taken = notes.taken, []
    with patch.object(Plan, "__call__", Plan.by_triton):
        calls()
        calls()
    same_binaries_and_numbers(by_plan, notes.taken)
    assert len({binary for binary, _, _ in by_plan}) >= 5


def test_triton_is_asked_once(notes, monkeypatch):
    asked = []
    ask = Plan.by_triton
    monkeypatch.setattr(Plan, "by_triton", lambda plan, *tensors: asked.append(plan) or ask(plan, *tensors))
    lora_down._forward_plan.cache_clear()
    x, A = torch.zeros(32, 64, dtype=BF16), torch.zeros(16, 64, dtype=BF16)
    for _ in range(3):
        lora_down.lora_down(x, A)
    assert (len(asked), len(notes.taken)) == (1, 3)
    for _ in range(2):
        lora_down.lora_down(x, torch.zeros(16 * 64 + 1, dtype=BF16)[1:].view(16, 64))
    assert (len(asked), len(notes.taken)) == (3, 5)
