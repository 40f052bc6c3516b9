"""Plans launch what Triton itself would, with its own code for CUDA on top of a driver that only takes notes."""

from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
import torch
import triton
from triton.runtime import driver

from bench.host_time import NoDriver
from peft_fast.kernels import (
    dequantize,
    dequantize_merge,
    glu,
    lora_down,
    lora_glu,
    lora_multi,
    lora_up_add,
    quant_gemv,
    quant_matmul,
    reduce,
    scale_columns,
)
from peft_fast.kernels.launch import Plan, forget_plans
from peft_fast.kernels.segments import Drop, of_rows
from peft_fast.quant import blockwise, int8

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret or torch.cuda.is_available(), reason="Triton's own launcher, and no GPU"
)
LAUNCHERS = (
    dequantize, dequantize_merge, glu, lora_down, lora_multi, lora_up_add, lora_glu, quant_gemv, quant_matmul,
    reduce, scale_columns,
)  # fmt: skip
BF16 = torch.bfloat16


class Notes(NoDriver):
    """What the driver is told: of the binary all that Triton decides it by, and the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple] = []
        self.launcher_cls = self.launcher

    def launcher(self, source, metadata):
        signature = str(source.signature), str(source.constants), str(source.attrs)
        options = metadata.num_warps, metadata.num_stages, metadata.maxnreg, metadata.enable_fp_fusion
        binary = metadata.name, *signature, *options

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


K, R, M = 64, 16, 32


def zeros(*shape, dtype=BF16):
    return torch.zeros(*shape, dtype=dtype)


def misaligned(*shape):
    return zeros(1 + torch.Size(shape).numel())[1:].view(shape)


def calls_of_one_adapter():
    """Such as need other binaries: a misaligned A, one of another dtype, a rank of 1, another M, no bias; at last the
    first again."""
    whole, A = zeros(40, K), zeros(R, K)
    for of_A in (A, A, misaligned(R, K), A.float(), A[:1], A):
        lora_down.lora_down(whole[:M], of_A)
    lora_down.lora_down(whole, A)
    y, s, B = zeros(M, K), zeros(M, R), zeros(K, R)
    for bias in (None, zeros(K), None, misaligned(K)):
        lora_up_add.lora_up_add_(y, s, B, 2.0, bias)
    lora_up_add.lora_up_add_(y, s, B, 0.5, zeros(K))


def calls_of_every_launcher():
    x, dy, s, A, B = zeros(M, K), zeros(M, K), zeros(M, 2 * R), [zeros(R, K)] * 2, [zeros(K, R)] * 2
    key, scale = zeros(2, dtype=torch.int32), [2.0, 0.5]
    lora_down.lora_down_group(x, A, [0.1, 0.0], [key, None])
    for dx in (None, zeros(M, K)):
        lora_down.lora_down_group_backward(s, x, A, [0.1, 0.0], [key, None], dx)
    lora_down.lora_down_backward(zeros(M, 80), x, zeros(80, K), 0.0, None, zeros(M, K))  # in two passes
    lora_up_add.lora_up_add_group_([x, dy], s, B, scale, [None, zeros(K)])
    wide = [zeros(2048, R)] * 2  # several programs along dy: partials of ds too
    for of_B in (B, wide):
        for needs_ds in (True, False):
            lora_up_add.lora_up_group_backward([zeros(M, len(b)) for b in of_B], s, of_B, scale, needs_ds)
    for update in (True, False):
        lora_glu.lora_up_glu(x, dy, s, B, scale, "silu", update)
    for needs_dA, p in ((True, 0.1), (False, 0.0)):
        drop = p, key if p else None
        lora_glu.lora_glu_backward_(zeros(M, K), x, dy, s, B, scale, s[:, :R], A[0], *drop, "silu", needs_dA)
    glu.glu(x, dy, "gelu")
    for needs_h in (True, False):
        glu.glu_backward_(x, dy, zeros(M, K), "gelu_tanh", needs_h)
    scale_columns.scale_columns(x, zeros(K, dtype=torch.float32), zeros(K))
    scale_columns.scale_columns_backward(dy, x, zeros(K, dtype=torch.float32))
    segments, drop = of_rows(torch.tensor([0, 1, -1, 1] * 8), 2), Drop((0.1, 0.0), zeros(2, 2, dtype=torch.int32))
    of_drop = lora_multi.lora_down_multi(x, A, segments, drop)
    lora_multi.lora_up_add_multi_(dy, of_drop, B, scale, segments)
    lora_multi.lora_up_multi_backward(dy, of_drop, B, scale, segments)
    lora_multi.lora_down_multi_backward(of_drop, x, A, segments, drop, zeros(M, K))
    dense = torch.randn(K, K)
    for weight in (blockwise.quantize(dense, "nf4", 64, True), int8.quantize(dense)):
        dequantize.dequantize(weight, BF16)
        dequantize_merge.dequantize_merge(weight, A[0], B[0], 2.0, BF16, needs_norms=True)
        for tokens in (2, M):
            quant_matmul.quant_matmul(x[:tokens], weight, zeros(K), s[:tokens, :R], B[0], 2.0)
            quant_matmul.quant_matmul(x[:tokens], weight)
        quant_matmul.quant_matmul_dx(dy, weight, s[:, :R], A[0], 0.1, key)
        quant_matmul.quant_matmul_dx(dy, weight)


def same_binaries_and_numbers(found, expected):
    """Tensors that the launchers allocate lie elsewhere each time."""
    assert len(found) == len(expected) > 8
    for (binary, grid, told), (by_binary, by_grid, by_told) in zip(found, expected):
        assert (binary, grid, len(told)) == (by_binary, by_grid, len(by_told))
        assert [a for a in told if not is_address(a)] == [a for a in by_told if not is_address(a)]


def is_address(argument) -> bool:
    return isinstance(argument, int) and argument > 1 << 32


def calls_of_triton(calls) -> int:
    with patch.object(Plan, "by_triton", autospec=True, side_effect=Plan.by_triton) as asked:
        calls()
    return asked.call_count


@pytest.mark.parametrize("calls", [calls_of_one_adapter, calls_of_every_launcher])
def test_plans_launch_what_triton_would(calls, notes):
    forget_plans()
    asked = calls_of_triton(calls)  # which makes the plans
    assert calls_of_triton(calls) < asked / 4  # misaligned tensors are left to it
    by_plan, notes.taken = notes.taken, []
    with patch.object(Plan, "__call__", Plan.by_triton):
        calls()
        calls()
    same_binaries_and_numbers(by_plan, notes.taken)


@pytest.mark.skipif(not hasattr(triton.FutureKernel, "__getattr__"), reason="cannot be launched yet")
def test_a_kernel_that_triton_compiles_elsewhere(notes):
    """In AsyncCompileMode the first call gives a future, which cannot be launched again."""
    x, A = zeros(M, 3 * K), zeros(5, 3 * K)
    forget_plans()
    for found in lora_down._lora_down_fwd_kernel.device_caches.values():
        found[0].clear()
    with ThreadPoolExecutor(1) as executor, triton.AsyncCompileMode(executor):
        assert calls_of_triton(lambda: [lora_down.lora_down(x, A) for _ in range(3)]) == 2
    binary, grid, _ = notes.taken[0]
    assert [(other, size) for other, size, _ in notes.taken] == [(binary, grid)] * 3
