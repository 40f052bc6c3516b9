"""The k-bit kernels: bits where bits are promised, elsewhere values against fp64.

In the interpreter and on a GPU, as in test_kernels.py; what the interpreter cannot run (the table across the lanes of a
warp) is checked as algebra at the end."""

import re

import pytest
import torch

from peft_fast.kernels import (
    autotune,
    configs,
    decode,
    dropout,
    quant_gemv,
    quant_matmul,
    reduce,
    reference,
    triton_ops,
)
from peft_fast.quant import blockwise, int8
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.testing import assert_as_accurate_as_torch

from .conftest import INTERPRETING

pytestmark = pytest.mark.kernel

# (x, A and B)
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float32)]
if not INTERPRETING:
    DTYPES += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
KINDS = ("nf4 nested", "fp4 plain", "int8")


def make_weight(kind: str, N: int, K: int, blocksize: int = 64, device: str = "cpu") -> QuantizedWeight:
    W = torch.randn(N, K) / K**0.5
    quant_type, _, scales = kind.partition(" ")
    weight = int8.quantize(W) if kind == "int8" else blockwise.quantize(W, quant_type, blocksize, scales == "nested")
    return weight.to(device)


def unaligned(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight, its bytes at an odd address."""
    tensors = weight.tensors()
    data = torch.empty(tensors[0].numel() + 1, dtype=tensors[0].dtype, device=weight.device)[1:]
    return QuantizedWeight.from_tensors([data.copy_(tensors[0]), *tensors[1:]], weight.format)


# --- dequantize: bits, what test_kernels.py does not have


@pytest.mark.parametrize("kind", ["nf4 nested", "fp4 plain"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_dequantize_with_the_programs_of_newer_gpus(kind, blocksize, device):
    """sm_90 takes longer programs than the 4096 elements of test_kernels.py: half full, full, more than one."""
    with configs.target(90):
        for N, K in [(33, 131), (64, 128), (9, 1000), (2, 8192)]:
            weight = make_weight(kind, N, K, blocksize, device)
            assert torch.equal(triton_ops.dequantize(weight), reference.dequantize(weight))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 131), (5, 4097), (64, 128), (0, 8), (8, 0)], ids=str)
def test_dequantize_int8(shape, device):
    weight = make_weight("int8", *shape, device=device)
    for dtype, _ in DTYPES:
        assert torch.equal(triton_ops.dequantize(weight, dtype), reference.dequantize(weight, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_into_a_slice_of_a_buffer_and_from_odd_addresses(kind, device):
    """A group's weights in one buffer, the second at an odd element; its neighbours keep their values."""
    first, second = make_weight(kind, 5, 7, device=device), make_weight(kind, 64, 72, device=device)
    buffer = torch.full((5 * 7 + 64 * 72 + 9,), 7.0, device=device)
    for weight, start in ((first, 0), (unaligned(second), 35)):
        N, K = weight.shape
        out = buffer[start : start + N * K].view(N, K)
        assert triton_ops.dequantize(weight, out=out) is out
        assert torch.equal(out, reference.dequantize(weight, torch.float32))
    assert (buffer[-9:] == 7).all()


# --- dequantize_merge


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (33, 131, 17), (64, 128, 8), (70, 72, 100)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_rounds_the_exact_sum_once(kind, shape, device):
    N, K, R = shape
    weight = make_weight(kind, N, K, device=device)
    for dtype, adapter in DTYPES:
        A, B = torch.randn(R, K, device=device, dtype=adapter), torch.randn(N, R, device=device, dtype=adapter)
        mine, norms = triton_ops.dequantize_merge(weight, A, B, 0.3, dtype, needs_norms=True)
        by_torch, norms_by_torch = reference.dequantize_merge(weight, A, B, 0.3, dtype, needs_norms=True)
        truth, true_norms = reference.dequantize_merge(weight, A.to(dtype), B.to(dtype), 0.3, torch.float64, True)
        assert_as_accurate_as_torch("W'", mine, by_torch, truth)
        assert_as_accurate_as_torch("norms", norms, norms_by_torch, true_norms)
        # Nothing to add: the bits of dequantize, also where the bytes lie at an odd address.
        zero = triton_ops.dequantize_merge(unaligned(weight), A, torch.zeros_like(B), 0.3, dtype)[0]
        assert torch.equal(zero, reference.dequantize(weight, dtype))


def test_merge_keeps_updates_below_half_an_ulp_of_the_weight(device):
    """Weights that lie just below the middle of two fp16 numbers: an update of a hundredth of an ulp moves some of them
    up. Rounding the weight before the sum would move none."""
    weight = make_weight("nf4 nested", 64, 128, device=device)
    before = triton_ops.dequantize(weight, torch.float16)
    A, B = torch.ones(1, 128, device=device), torch.ones(64, 1, device=device)
    ulp = 2.0**-10 * 0.088  # of a typical weight, 1 / sqrt(128)
    after = triton_ops.dequantize_merge(weight, A, B, ulp / 100, torch.float16)[0]
    moved = (after != before).float().mean().item()
    assert 0.005 < moved < 0.2


def test_merge_of_nothing(device):
    weight = make_weight("nf4 nested", 0, 8, device=device)
    merged, norms = triton_ops.dequantize_merge(
        weight, torch.ones(2, 8, device=device), torch.ones(0, 2, device=device), 1.0, torch.float16, True
    )
    assert merged.shape == (0, 8)
    assert norms is not None
    assert norms.shape == (0,)


# --- quant_matmul and its dx

# (M, N, K, R): GEMV of every width, tiles of every class of M, K below and above a tile, split sums (the last three)
SHAPES = [
    (0, 16, 64, 8),
    (1, 64, 64, 8),
    (3, 71, 72, 17),
    (8, 70, 192, 100),
    (9, 40, 128, 1),
    (33, 71, 136, 16),
    (130, 65, 72, 8),
    (3, 16, 4096, 8),
    (20, 16, 1000, 4),
    (40, 600, 16, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids="M{0[0]}-N{0[1]}-K{0[2]}-R{0[3]}".format)
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, shape, device):
    M, N, K, R = shape
    weight = make_weight(kind, N, K, 32 if N == 70 else 64, device)
    for dtype, adapter in DTYPES:
        x, dy, s = (torch.randn(M, n, dtype=dtype, device=device) for n in (K, N, R))
        A, B = torch.randn(R, K, device=device).to(adapter), torch.randn(N, R, device=device).to(adapter)
        bias, key = torch.randn(N, dtype=dtype, device=device), dropout.new_key(device)
        W = reference.dequantize(weight, dtype).double()
        xd, dyd, sd, ad, bd = (t.to(dtype).double() for t in (x, dy, s, A, B))

        y = triton_ops.quant_matmul(x, weight, bias, s, B, 0.7)
        assert y.dtype == dtype
        by_torch = reference.quant_matmul(x, weight, bias, s, B, 0.7)
        assert_as_accurate_as_torch("y", y, by_torch, xd @ W.t() + bias.double() + 0.7 * sd @ bd.t(), dtype)

        dx = triton_ops.quant_matmul_dx(dy, weight, s, A, 0.1, key)
        assert dx.dtype == dtype
        by_torch = reference.quant_matmul_dx(dy, weight, s, A, 0.1, key)
        lora = torch.where(dropout.mask(key, M, K, 0.1), dropout.correction(0.1) * sd @ ad, 0)
        assert_as_accurate_as_torch("dx", dx, by_torch, dyd @ W + lora, dtype)


@pytest.mark.parametrize("M", [1, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_products_without_lora_of_strided_rows_and_bytes_at_an_odd_address(kind, M, device):
    weight = make_weight(kind, 40, 72, device=device)
    W = reference.dequantize(weight, torch.float32)
    for x in (torch.randn(M, 144, device=device)[:, :72], torch.randn(72, M, device=device).t()):
        y = triton_ops.quant_matmul(x, unaligned(weight))
        torch.testing.assert_close(y, x @ W.t(), rtol=1e-5, atol=1e-5)
    for dy in (torch.randn(M, 80, device=device)[:, :40], torch.randn(40, M, device=device).t()):
        torch.testing.assert_close(triton_ops.quant_matmul_dx(dy, unaligned(weight)), dy @ W, rtol=1e-5, atol=1e-5)


def test_bits_repeat_where_sums_are_split(device):
    wide, tall = make_weight("nf4 nested", 16, 4096, device=device), make_weight("nf4 nested", 600, 16, device=device)
    for function, weight, argument in (
        (triton_ops.quant_matmul, wide, torch.randn(2, 4096, device=device)),
        (
            triton_ops.quant_matmul,
            make_weight("fp4 plain", 16, 1000, device=device),
            torch.randn(20, 1000, device=device),
        ),
        (triton_ops.quant_matmul_dx, tall, torch.randn(20, 600, device=device)),
    ):
        assert torch.equal(function(argument, weight), function(argument, weight))


def test_everything_is_dropped(device):
    weight = make_weight("nf4 nested", 16, 64, device=device)
    dy, ds, A = (torch.randn(*shape, device=device) for shape in ((3, 16), (3, 4), (4, 64)))
    dx = triton_ops.quant_matmul_dx(dy, weight, ds, A, 1.0, dropout.new_key(device))
    torch.testing.assert_close(dx, triton_ops.quant_matmul_dx(dy, weight))


def test_limits_are_stated():
    fmt = make_weight("nf4 nested", 8, 68).format
    assert "no multiple of 8" in (quant_matmul.why_not(fmt, torch.float16, 80, 4) or "")
    fmt = make_weight("nf4 nested", 8, 72).format
    assert quant_matmul.why_not(fmt, torch.float16, 75, quant_gemv.MAX_M) is None
    assert "sm_80" in (quant_matmul.why_not(fmt, torch.float16, 75, quant_gemv.MAX_M + 1) or "")
    assert "sm_80" in (quant_matmul.why_not_dx(fmt, torch.float16, 75) or "")
    assert "float64" in (quant_matmul.why_not(fmt, torch.float64, 80, 4) or "")
    assert "32 bits" in (decode.why_not(fmt._replace(K=2 * decode.MAX_K)) or "")


# --- the second stage


def test_partials_are_summed_in_one_launch(device):
    partial = torch.rand(11, 7, 130, device=device)
    start = torch.rand(7, 130, device=device)
    truth = partial.double().sum(0)
    torch.testing.assert_close(reduce.sum_partials(partial, torch.float32), truth.float())
    torch.testing.assert_close(reduce.sum_partials(partial, torch.float16), truth.half())
    torch.testing.assert_close(reduce.sum_partials(partial, torch.float32, start), (truth + start).float())
    torch.testing.assert_close(reduce.sum_partials(partial, torch.float32, root=True), truth.sqrt().float())


# --- configurations


def test_configurations_follow_the_capability():
    cpu = torch.device("cpu")
    with configs.target(89):
        assert configs.capability(cpu) == 89
        assert configs.quant_matmul(configs.capability(cpu), 64, 2, True)[0]["num_stages"] == configs.GEMM_STAGES[86]
        with configs.target(90):
            assert configs.dequantize(configs.capability(cpu), 1 << 16)["BLOCK"] == 8192
            assert (
                configs.dequantize(configs.capability(cpu), 3 << 12)["BLOCK"] == 4096
            )  # an odd number of half programs
    assert configs.dequantize(configs.capability(cpu), 1 << 16)["BLOCK"] == 4096


@pytest.mark.parametrize(("length", "tiles"), [(4096, 1), (4096, 300), (64, 1), (65, 1), (1000, 7), (0, 1)])
def test_splits_cover_the_sum_once(length, tiles):
    splits, steps = configs.split("gemm", length, 64, tiles)
    covered = [range(i * steps * 64, min((i + 1) * steps * 64, length)) for i in range(splits)]
    assert [k for part in covered for k in part] == list(range(length))
    assert all(covered) or length == 0


def test_autotune_times_once_per_key_and_only_on_a_gpu(monkeypatch):
    timed = []

    def fake(run):
        run()
        return timed[-1]["ms"]

    candidates = [dict(ms=3.0), dict(ms=1.0), dict(ms=2.0)]
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(autotune, "do_bench", fake)
    monkeypatch.setattr(autotune, "winners", {})
    assert autotune.pick("k", (1,), candidates, timed.append, gpu) == candidates[0]  # off
    monkeypatch.setattr(autotune, "enabled", True)
    assert autotune.pick("k", (1,), candidates, timed.append, torch.device("cpu")) == candidates[0]
    assert timed == []
    assert autotune.pick("k", (1,), candidates, timed.append, gpu) == candidates[1]
    assert autotune.pick("k", (1,), candidates, timed.append, gpu) == candidates[1]
    assert timed == candidates
    with pytest.raises(ValueError, match="PEFT_FAST_AUTOTUNE must be 0 or 1, got 'yes'"):
        autotune._checked("yes")


# --- the table across the lanes of a warp, in plain integers: what the interpreter cannot run


def shfl_idx(registers: list[float], lane: int, b: int, c: int) -> float:
    """shfl.sync.idx as the PTX manual defines it (9.7.9.6), for one lane."""
    segmask, maximum = c >> 8 & 31, c & 31
    high = lane & segmask | maximum & ~segmask
    j = lane & segmask | b & 31 & ~segmask
    return registers[j if j <= high else lane]


def test_the_shuffle_looks_up_the_elements_in_their_order():
    code = torch.randn(16).tolist()
    registers = [code[lane & 15] for lane in range(32)]
    steps = re.findall(
        r"shr\.b32 index, \$8, (\d+); shfl\.sync\.idx\.b32 \$(\d), table, index, (0x[0-9a-f]+), -1;",
        decode._LOOK_UP.value,
    )
    assert [int(e) for _, e, _ in steps] == list(range(8))
    for word in [0, 0xFFFFFFFF, 0x80000001, *torch.randint(1 << 32, (50,)).tolist()]:
        packed = word.to_bytes(4, "little")
        elements = [code[nibble] for byte in packed for nibble in (byte >> 4, byte & 15)]
        for lane in (0, 7, 16, 31):
            got = [shfl_idx(registers, lane, word >> int(shift), int(c, 16)) for shift, _, c in steps]
            assert got == elements
