"""The peak of a QLoRA step, against HF PEFT + bitsandbytes on the same model (bench/memory_peak.py)."""

import peft
import pytest
import torch

import peft_fast
from bench.memory_peak import of_a_step, peak
from bench.memory_saved import Setting


def test_the_peak_of_known_allocations():
    def run() -> None:
        a, b = torch.empty(1 << 20), torch.empty(1 << 20)
        del a
        c = torch.empty(1 << 21)
        del b, c

    assert peak(run) == 4 * ((1 << 20) + (1 << 21))


@pytest.mark.parametrize(("p", "most"), [(0.0, 0.75), (0.05, 0.5)])
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_on_a_prepared_model(autocast, p, most):
    setting = Setting("4-bit", True, autocast, p)
    with torch.compiler.set_stance("force_eager"):
        theirs, ours = (of_a_step(library, setting, 256, 6, 512) for library in (peft, peft_fast))
    assert ours <= most * theirs
