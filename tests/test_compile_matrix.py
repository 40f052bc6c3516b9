"""Every kernel compiles for every GPU generation, without a GPU, and stays within its budgets (bench/compile.py)."""

import re

import pytest
import torch
import triton
import triton.language as tl

from bench import compile as matrix
from bench.compile_cases import launches
from bench.launches import Launch, compile_for, record

KERNELS = {
    "dequantize_int8_kernel", "dequantize_kernel", "dequantize_merge_kernel", "glu_bwd_kernel", "glu_fwd_kernel",
    "lora_down_bwd_kernel", "lora_down_fwd_kernel", "lora_down_multi_kernel", "lora_embedding_add_kernel",
    "lora_glu_bwd_kernel", "lora_gram_multi_kernel", "lora_up_add_fwd_kernel", "lora_up_bwd_kernel",
    "lora_up_glu_kernel", "lora_up_multi_kernel", "pieces_kernel", "quant_gemv_kernel", "quant_matmul_dx_kernel",
    "quant_matmul_kernel", "scale_columns_bwd_kernel", "scale_columns_fwd_kernel", "segment_sum_kernel",
    "sum_both_kernel", "sum_partials_kernel",
}  # fmt: skip


def measured(quick: bool, targets: tuple[int, ...]) -> list[matrix.Row]:
    rows = matrix.run(matrix.jobs(quick, targets))
    assert {row.kernel for row in rows} == KERNELS
    assert [(row.kernel, row.target, row.variant, row.fault) for row in rows if row.fault] == []
    return rows


def test_a_part_of_the_matrix_for_the_commonest_card():
    measured(quick=True, targets=(89,))


@pytest.mark.slow
def test_the_whole_matrix_for_three_targets():
    """Within the budgets on any version of Triton; on those that the CSVs have rows of, not one number has changed.
    These three are the most unlike: no tensor cores, warp-group products, the least shared memory. All seven take two
    cores an hour, by `make compile ARGS=--diff`."""
    targets = (75, 90, 120)
    changes = matrix.difference(measured(quick=False, targets=targets), targets)
    if changes is not None:
        assert changes == []


@pytest.mark.slow
def test_the_rows_are_those_of_what_is_launched():
    """On all targets: nothing is launched whose numbers nobody has seen, and no row is of what is launched no more."""
    known = matrix.stored_here()
    if not known:
        pytest.skip(f"no rows of Triton {triton.__version__} under {matrix.FOLDER}")
    assert {matrix.key(job) for job in matrix.jobs(quick=False)} ^ set(known) == set()


def test_faults_are_noticed():
    row = dict(
        kernel="lora_x", spill_bytes=0, shared_kb=10, fp64=0, fma=3, tensor_core=2, async_copies=4, sass_per_weight=0.0
    )
    assert matrix.fault(row, "bf16", 80) == ""
    assert "spills 8 bytes" in matrix.fault({**row, "spill_bytes": 8}, "bf16", 80)
    assert "100 of 99 KB" in matrix.fault({**row, "shared_kb": 100}, "bf16", 86)
    assert matrix.fault({**row, "shared_kb": 100}, "bf16", 80) == ""
    assert "fp64" in matrix.fault({**row, "fp64": 1}, "bf16", 80)
    assert "tensor-core" in matrix.fault({**row, "tensor_core": 0}, "bf16", 80)
    assert "FMA" in matrix.fault({**row, "kernel": "dequantize_kernel"}, "bf16", 80)
    assert "FMA" in matrix.fault({**row, "kernel": "quant_matmul_kernel"}, "bf16", 80)
    product = {**row, "kernel": "quant_matmul_kernel", "fma": 0, "async_copies": 0}
    assert "asynchronously" in matrix.fault(product, "bf16", 80)
    assert matrix.fault(product, "bf16 odd", 80) == ""
    dequantize = {**row, "kernel": "dequantize_kernel", "fma": 0, "sass_per_weight": 10.1}
    assert "10.1 instructions per weight" in matrix.fault(dequantize, "fp32", 80)
    assert matrix.fault(dequantize, "fp32 odd", 80) == ""


def test_rows_of_other_versions_stay_and_changes_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "FOLDER", tmp_path / "compile")
    row = matrix.Row("3.7.1", "k", "sm_80", "bf16", 10, 0, 1.0, 1, 1, 0, 0, 100, 5.5, "")
    monkeypatch.setattr(matrix.triton, "__version__", "3.7.1")
    matrix.write([row])
    assert matrix.difference([row]) == []
    worse = matrix.Row(**{**matrix.asdict(row), "registers": 12})
    assert matrix.difference([worse]) == ["k sm_80 bf16: registers 10 -> 12"]
    assert matrix.difference([]) == ["k sm_80 bf16: gone"]
    assert matrix.difference([], targets=(90,)) == matrix.difference([], only="other") == []
    monkeypatch.setattr(matrix.triton, "__version__", "3.8.0")
    assert matrix.difference([row]) is None
    matrix.write([matrix.Row(**{**matrix.asdict(row), "triton": "3.8.0"})])
    monkeypatch.setattr(matrix.triton, "__version__", "3.7.1")
    assert matrix.difference([row]) == []
    other = matrix.Row(**{**matrix.asdict(row), "kernel": "other", "variant": "fp16"})
    matrix.write([other], only="other")
    assert matrix.difference([row, other]) == []
    matrix.write([worse], only="k bf16")
    assert matrix.difference([worse, other]) == []
    elsewhere = matrix.Row(**{**matrix.asdict(row), "target": "sm_120"})
    matrix.write([worse, other, elsewhere])
    assert matrix.difference([worse, other, elsewhere]) == []
    lines = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "compile").iterdir()}
    assert lines == {"sm_80.csv": 4, "sm_120.csv": 2}  # with the header, and 3.8.0's row
    matrix.write([worse, other])
    assert matrix.difference([worse, other]) == []  # what is gone from a target's file is gone


def overflows(launch: Launch) -> list[str]:
    """32-bit products of something that grows with the program's number and something that is only known at run time:
    an offset like program * K, which wraps above 2**31 elements."""
    ttir = compile_for(launch, 80).asm["ttir"]
    arguments = set(re.findall(r"(%\w+): i32", next(line for line in ttir.splitlines() if "tt.func" in line)))
    grows, found = set(), []
    for line in ttir.splitlines():
        loop = re.search(r"scf\.for (%\w+) = (%\w+) to", line)
        if loop and loop[2] in grows:
            grows.add(loop[1])
        assigned = re.match(r"\s*(%[\w.]+)(?::\d+)? = (\S+) (.*)", line)
        if not assigned:
            continue
        name, operation, rest = assigned.groups()
        operands = set(re.findall(r"%[\w.]+", rest.split(" loc(")[0]))
        if operation == "tt.get_program_id":
            grows.add(name)
        elif operation in ("tt.splat", "tt.broadcast", "tt.expand_dims") and operands & arguments:
            arguments.add(name)
        elif operands & grows and re.search(r": (tensor<\w*x)?i32", rest):
            if operation == "arith.muli" and operands & arguments:
                found.append(line.strip())
            grows.add(name)
    return found


@triton.jit
def _wraps_kernel(out_ptr, K, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + row * K, 1.0)


@triton.jit
def _does_not_wrap_kernel(out_ptr, K, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + row.to(tl.int64) * K, 1.0)


def test_offsets_that_wrap_are_found():
    for kernel, expected in ((_wraps_kernel, 1), (_does_not_wrap_kernel, 0)):
        with record() as calls:
            kernel[(1,)](torch.zeros(4), 32, BLOCK=16)
        assert len(overflows(calls[0])) == expected


def test_offsets_above_2_to_the_31_are_64_bits_wide():
    """Nobody has 8 GB to try it here: no kernel multiplies a program's number with a run-time size in 32 bits. Except
    by the steps per split, which are a share of such a size, and in A and B, whose elements are few: rank times K or N.
    """
    calls: dict[str, Launch] = {}
    of_fp32_first = sorted(launches(True, 80), key=lambda one: not one[0].startswith("fp32"))
    for _, launch in of_fp32_first:
        calls.setdefault(launch.name, launch)
    assert set(calls) == KERNELS
    few = re.compile(r"per_split|^%[ab](_[gu])?(_\d+)? =")
    found = {name: [line for line in overflows(launch) if not few.search(line)] for name, launch in calls.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_instructions_are_counted_without_the_padding():
    sass = "    /*0010*/    @P0 BRA 0x10 ;    /* 0x00 */\n    /* 0x0f */\n    /*10000*/    NOP ;    /* 0x00 */\n"
    assert len(matrix.INSTRUCTION.findall(sass)) == 1


def test_launches_are_recorded_as_triton_would_specialise_them():
    from peft_fast.kernels import lora_up_add

    y, s, B = torch.zeros(32, 48), torch.zeros(32, 1), torch.zeros(48, 1)
    with record() as calls:
        lora_up_add.lora_up_add_(y, s, B, 2.0)
    (call,) = calls
    assert call.name == "lora_up_add_fwd_kernel"
    signature, constants = dict(call.signature), dict(call.constexprs)
    assert signature["y0_ptr"] == "*fp32"
    assert signature["scale0"] == "fp32"
    assert signature["M"] == "i32"
    assert "M" not in call.divisible  # not specialised on: a new M never compiles anew
    assert "N0" in call.divisible
    assert constants["R0"] == 1  # Triton makes the integer 1 a constant
    assert constants["bias0_ptr"] is None
    assert constants["BLOCK_R"] == 16
    assert dict(call.options)["num_warps"] == 8  # B has rows of one element: unaligned (tiles.warps)


def test_grids_fit_a_gpu():
    """The second and third axis of a grid end at 65,535: heads of 128,256 tokens, a million tokens, 4 and 8 bits."""
    from peft_fast.kernels import triton_ops
    from peft_fast.quant.weight import QuantizedWeight

    N, K, M = 128_256, 4096, 1 << 20

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    fp32 = torch.float32
    codes, scales = tensor(N * K, dtype=torch.int8), tensor(N, dtype=fp32)
    int8 = QuantizedWeight(codes, scales, None, (N, K), K, "int8", torch.bfloat16)
    data, absmax = tensor(N * K // 2, dtype=torch.uint8), tensor(N * K // 64, dtype=fp32)
    nf4 = QuantizedWeight(data, absmax, tensor(16, dtype=fp32), (N, K), 64, "nf4", torch.bfloat16)
    A, B, x, s = tensor(16, K), tensor(N, 16), tensor(M, K), tensor(M, 16)
    with record() as calls:
        for weight in (int8, nf4):
            triton_ops.dequantize(weight)
            triton_ops.dequantize_merge(weight, A, B, 1.0, torch.bfloat16)
            triton_ops.quant_matmul(x[:512], weight, None, s[:512], B, 1.0)
            triton_ops.quant_matmul(x[:4], weight)
        triton_ops.lora_down(x, A)
        triton_ops.lora_down_backward(s, x, A, 0.0, None, x)
        triton_ops.lora_up_add_(x, s, tensor(K, 16), 1.0)
        triton_ops.glu(x, x, "silu")
    assert len({call.name for call in calls}) >= 9
    for call in calls:
        assert all(size <= 65_535 for size in call.grid[1:]), (call.name, call.grid)
