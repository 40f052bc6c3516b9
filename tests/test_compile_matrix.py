"""Every kernel compiles for every GPU generation, without a GPU, and stays within its budgets (bench/compile.py)."""

import pytest
import torch

from bench import compile as matrix
from bench.launches import record


def faults(quick: bool, targets: tuple[int, ...]) -> list[str]:
    rows = matrix.run(matrix.jobs(quick, targets))
    assert {row.kernel for row in rows} >= {"lora_down_fwd_kernel", "lora_up_bwd_kernel", "dequantize_kernel"}
    return [f"{row.kernel} {row.target} {row.variant}: {row.fault}" for row in rows if row.fault]


def test_a_tenth_of_the_matrix_for_the_commonest_cards():
    assert faults(quick=True, targets=(75, 89)) == []


@pytest.mark.slow
def test_the_whole_matrix():
    assert faults(quick=False, targets=matrix.TARGETS) == []


def test_faults_are_noticed():
    row = dict(kernel="lora_x", spill_bytes=0, shared_kb=10, fp64=0, fma=3, tensor_core=2)
    assert matrix.fault(row, "bf16", 80) == ""
    assert "spills 8 bytes" in matrix.fault({**row, "spill_bytes": 8}, "bf16", 80)
    assert "100 of 99 KB" in matrix.fault({**row, "shared_kb": 100}, "bf16", 86)
    assert matrix.fault({**row, "shared_kb": 100}, "bf16", 80) == ""
    assert "fp64" in matrix.fault({**row, "fp64": 1}, "bf16", 80)
    assert "tensor-core" in matrix.fault({**row, "tensor_core": 0}, "bf16", 80)
    assert "FMA" in matrix.fault({**row, "kernel": "dequantize_kernel"}, "bf16", 80)


def test_launches_are_recorded_as_triton_would_specialise_them():
    from peft_fast.kernels import lora_up_add

    y, s, B = torch.zeros(32, 48), torch.zeros(32, 1), torch.zeros(48, 1)
    with record() as calls:
        lora_up_add.lora_up_add_(y, s, B, 2.0)
    (call,) = calls
    assert call.name == "lora_up_add_fwd_kernel"
    signature, constants = dict(call.signature), dict(call.constexprs)
    assert signature["y_ptr"] == "*fp32"
    assert signature["scale"] == "fp32"
    assert signature["M"] == "i32"
    assert "M" not in call.divisible  # not specialised on: a new M never compiles anew
    assert "N" in call.divisible
    assert constants["R"] == 1  # Triton makes the integer 1 a constant
    assert constants["bias_ptr"] is None
    assert constants["BLOCK_R"] == 16
    assert dict(call.options)["num_warps"] == 8  # B has rows of one element: unaligned (tiles.warps)
