"""The Triton kernels: values and every gradient against fp64, bits where bits are promised.

In the interpreter on a CPU (TRITON_INTERPRET=1) and compiled on a GPU. The interpreter computes bf16 wrongly (it
multiplies raw bits and truncates): bf16 runs on a GPU only.
"""

import itertools

import pytest
import torch

from peft_fast import ops
from peft_fast.dispatch import TritonUnsupported, use_backend
from peft_fast.kernels import dropout, reference, tiles, triton_ops
from peft_fast.quant import blockwise
from peft_fast.quant.weight import BLOCKSIZES

from .conftest import INTERPRETING
from .lora_cases import check_against_fp64, make_case
from .test_ops import opcheck_all

pytestmark = pytest.mark.kernel

# (x, A and B)
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]
if not INTERPRETING:
    DTYPES += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]

# (M, K, N, R): no multiple of a tile, exactly a tile, one row, ranks of several tiles, nothing. Not one row
# with rank 1: everything would hang on the rounding of one number, and torch may have been lucky with it
SHAPES = [
    (1, 64, 48, 8),
    (40, 72, 64, 1),
    (33, 130, 71, 17),
    (64, 128, 128, 16),
    (130, 65, 257, 8),
    (7, 96, 64, 100),
    (0, 64, 64, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids="M{0[0]}-K{0[1]}-N{0[2]}-R{0[3]}".format)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_lora_linear(shape, dtype, adapter, p, base, device):
    M, K, N, R = shape
    case = make_case(M, K, N, R, dtype, adapter, base, p, device)
    check_against_fp64(case, backend="triton", route="split")


# K a multiple of 16, as the fused kernels want it; tokens on both sides of the GEMV's 8
FUSED_SHAPES = [(2, 64, 48, 8), (8, 128, 65, 17), (33, 144, 71, 16), (0, 64, 64, 8)]


@pytest.mark.parametrize("shape", FUSED_SHAPES, ids="M{0[0]}-K{0[1]}-N{0[2]}-R{0[3]}".format)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=str)
@pytest.mark.parametrize(("route", "p"), [("fused", 0.0), ("fused", 0.1), ("merge", 0.0)])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_lora_linear_by_the_other_routes(shape, dtype, adapter, route, p, base, device):
    M, K, N, R = shape
    check_against_fp64(make_case(M, K, N, R, dtype, adapter, base, p, device), backend="triton", route=route)


@pytest.mark.parametrize("shape", SHAPES[1:4], ids="M{0[0]}-K{0[1]}-N{0[2]}-R{0[3]}".format)
@pytest.mark.parametrize("base", ["fp4", "int8"])
def test_merging_takes_any_shape(shape, base, device):
    M, K, N, R = shape
    case = make_case(M, K, N, R, torch.float32, torch.float32, base, 0.0, device)
    check_against_fp64(case, backend="triton", route="merge")


@pytest.mark.parametrize("tokens", [1, 8, 9, 300])
def test_auto_takes_a_route_that_is_right(tokens, device):
    case = make_case(tokens, 64, 64, 8, torch.float32, torch.float32, "nf4", 0.0, device)
    check_against_fp64(case, backend="triton")
    with torch.no_grad():
        y = case.call("triton", case.leaves())
    torch.testing.assert_close(y, case.call("torch", case.leaves()).detach(), rtol=1e-4, atol=1e-4)


def test_every_subset_of_gradients(device):
    case = make_case(40, 70, 50, 20, torch.float32, torch.float32, "dense", 0.1, device)
    names = ("x", "A", "B", "bias", "weight")
    everything = case.run("triton", needs=names)
    for n in (1, 2, 3, 4):
        for needs in itertools.combinations(names, n):
            for name, value in case.run("triton", needs=needs).items():
                torch.testing.assert_close(value, everything[name])


@pytest.mark.parametrize("rank", [8, 100])
def test_strided_operands(rank, device):
    """Rows apart, columns apart, rows repeated; A, B, s and gradients that are views."""
    M, K, N = 37, 66, 50
    wide = torch.randn(M, 2 * K, device=device)
    A, B = torch.randn(K, rank, device=device).t(), torch.randn(rank, N, device=device).t()
    key = dropout.new_key(device)
    for x in (wide[:, :K], wide[:, ::2], torch.randn(1, K, device=device).expand(M, K)):
        s = triton_ops.lora_down(x, A, 0.1, key)
        torch.testing.assert_close(s, reference.lora_down(x, A, 0.1, key))
        y = torch.randn(M, 2 * N, device=device)
        mine, expected = y.clone()[:, :N], y.clone()[:, :N]
        triton_ops.lora_up_add_(mine, s, B, 0.5)
        reference.lora_up_add_(expected, s, B, 0.5)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
        dy = torch.randn(N, M, device=device).t()
        for got, wanted in zip(triton_ops.lora_up_backward(dy, s, B, 0.5), reference.lora_up_backward(dy, s, B, 0.5)):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        ds = torch.randn(rank, M, device=device).t()
        dx1, dx2 = torch.ones(M, 2 * K, device=device)[:, :K], torch.ones(M, K, device=device)
        dA1 = triton_ops.lora_down_backward(ds, x, A, 0.1, key, dx1)
        torch.testing.assert_close(dA1, reference.lora_down_backward(ds, x, A, 0.1, key, dx2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dx1, dx2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("M", "K", "R"), [(7, 64, 0), (200, 64, 0), (7, 0, 8)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_down_of_no_ranks_or_no_columns(M, K, R, p, device):
    """What torch allows: sums of nothing are zero, and dx is left as it is."""
    x, A, key = torch.randn(M, K, device=device), torch.randn(R, K, device=device), dropout.new_key(device)
    ds, dx = torch.randn(M, R, device=device), torch.ones(M, K, device=device)
    for module in (triton_ops, reference):
        s = module.lora_down(x, A, p, key)
        assert s.shape == (M, R)
        assert not s.any()
        assert module.lora_down_backward(ds, x, A, p, key, dx).shape == (R, K)
        assert (dx == 1).all()


@pytest.mark.parametrize("widths", [(0, 48), (48, 0), (0, 600), (0, 48, 48)])
def test_ds_of_a_sibling_without_columns_is_zero(widths, device):
    """Nobody sums it, and memory that nobody writes is full of NaN here (conftest.py)."""
    dy, B = zip(*[(torch.randn(32, N, device=device).half(), torch.randn(N, 16, device=device).half()) for N in widths])
    s, scale = torch.randn(32, 16 * len(widths), device=device).half(), [0.5] * len(widths)
    got, expected = (module.lora_up_group_backward(dy, s, B, scale) for module in (triton_ops, reference))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-2, atol=1e-2)
    for mine, other in zip(got[1], expected[1]):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2)


def test_column_major_inputs_and_strided_biases(device):
    """Every gradient of the public halves, where an input's rows are not dense."""
    A, B = torch.randn(4, 40, device=device), torch.randn(30, 4, device=device)
    x = torch.randn(40, 9, device=device).t().requires_grad_()
    y, bias = torch.randn(30, 9, device=device).t(), torch.arange(60.0, device=device)[::2]
    key = dropout.new_key(device)
    results = []
    for backend in ("triton", "torch"):
        s = ops.lora_down(x, A, dropout_p=0.2, dropout_key=key, backend=backend)
        out = ops.lora_up_add(y, s, B, 0.5, bias, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("K", [64, 33])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_masks_are_the_same_bits_as_in_torch(K, p, device):
    """lora_down of the identity's rows shows the mask: s[m, k] = c * mask[m, k] for x = ones and A = identity."""
    key = dropout.new_key(device)
    x, A = torch.ones(70, K, device=device), torch.eye(K, device=device)
    s = triton_ops.lora_down(x, A, p, key)
    assert torch.equal(s != 0, dropout.mask(key, 70, K, p))
    dx = torch.zeros(70, K, device=device)
    triton_ops.lora_down_backward(torch.ones(70, K, device=device), x, A, p, key, dx, needs_dA=False)
    assert torch.equal(dx != 0, dropout.mask(key, 70, K, p))


def test_bits_repeat(device):
    for route, p in (("split", 0.1), ("fused", 0.1), ("merge", 0.0)):
        case = make_case(300, 96, 80, 16, torch.float32, torch.float32, "nf4", p, device)
        first, second = case.run("triton", route=route), case.run("triton", route=route)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_slabs_of_the_up_backward_add_up(monkeypatch, device):
    from peft_fast.kernels import lora_up_add

    dy, s, B = (
        torch.randn(130, 48, device=device),
        torch.randn(130, 8, device=device),
        torch.randn(48, 8, device=device),
    )
    whole = triton_ops.lora_up_backward(dy, s, B, 0.5)
    monkeypatch.setattr(lora_up_add, "SLAB", 64)
    for a, b in zip(whole, triton_ops.lora_up_backward(dy, s, B, 0.5)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_is_bit_exact(quant_type, nested, blocksize, device):
    for N, K in [(1, 1), (3, 5), (33, 131), (64, 128), (2, 4097)]:
        weight = blockwise.quantize(torch.randn(N, K) * 0.02, quant_type, blocksize, nested).to(device)
        for dtype in {d for d, _ in DTYPES}:
            assert torch.equal(triton_ops.dequantize(weight, dtype), reference.dequantize(weight, dtype))


def test_dequantize_covers_every_byte_and_every_scale_code(device):
    """All 256 bytes under all 256 codes of nested scales: every product and every sum of the format."""
    weight = blockwise.quantize(torch.randn(256, 512), "nf4", 64, True).to(device)
    weight.data.copy_(torch.arange(256, dtype=torch.uint8).repeat(256))
    weight.absmax.copy_(torch.arange(weight.absmax.numel()).remainder(256).to(torch.uint8))
    assert torch.equal(triton_ops.dequantize(weight), reference.dequantize(weight))


@pytest.mark.parametrize(
    ("base", "p"),
    [
        ("nf4", 0.1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dense", 0.1), ("nf4", 0.0), ("int8", 0.0))),
    ],
)
def test_opcheck_with_triton(base, p, device):
    opcheck_all(make_case(8, 64, 32, 4, torch.float32, torch.float32, base, p, device), "triton")


def test_rank_tiles():
    assert [tiles.rank_block(R, 2) for R in (1, 16, 17, 64, 100, 512)] == [16, 16, 32, 64, 64, 64]
    assert [tiles.rank_block(R, 4) for R in (1, 33, 512)] == [16, 16, 16]


@pytest.mark.skipif(not INTERPRETING, reason="only the interpreter computes bf16 wrongly")
def test_the_interpreter_refuses_bf16():
    case = make_case(4, 32, 32, 4, torch.bfloat16, torch.bfloat16, "dense", 0.0)
    with pytest.raises(TritonUnsupported, match="interpreter computes bfloat16 wrongly"), use_backend("triton"):
        ops.lora_linear(case.x, case.weight, case.A, case.B, 1.0)
