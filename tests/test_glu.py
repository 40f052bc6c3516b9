"""SwiGLU and GeGLU in Triton and in plain torch: values and gradients against fp64, and who may be written over."""

import pytest
import torch
import torch.nn.functional as F

from peft_fast import ops
from peft_fast.kernels import reference
from peft_fast.testing import assert_as_accurate_as_torch

from .conftest import INTERPRETING

FORMULAS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
}
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETING else [torch.bfloat16])]  # the interpreter truncates bf16
SHAPES = [(1, 1), (7, 33), (5, 1024), (64, 1030), (0, 16), (16, 0)]

backends = pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=pytest.mark.kernel)])


def of(kernels: str):
    if kernels == "torch":
        return reference
    from peft_fast.kernels import glu

    return glu


def case(M: int, N: int, dtype: torch.dtype, device: str):
    """g, u, dh; g reaches where every activation is flat."""
    scales = (3.0, 1.0, 1.0)
    return [(scale * torch.randn(M, N)).to(device, dtype) for scale in scales]


def by_autograd(g, u, dh, activation):
    g, u = g.detach().requires_grad_(), u.detach().requires_grad_()
    h = FORMULAS[activation](g) * u
    return [h.detach(), *torch.autograd.grad(h, (g, u), dh)]


@backends
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(kernels, activation, dtype, shape, device):
    run, (g, u, dh) = of(kernels), case(*shape, dtype, device)
    h = run.glu(g, u, activation)
    du_is_here = dh.clone()
    dg, du, again = run.glu_backward_(du_is_here, g, u, activation, needs_h=True)
    assert du is du_is_here
    assert torch.equal(again, h)
    truth = by_autograd(g.double(), u.double(), dh.double(), activation)
    by_torch = by_autograd(g, u, dh, activation)
    for name, value, plain, exact in zip(("h", "dg", "du"), (h, dg, du), by_torch, truth):
        assert value.dtype == dtype
        assert_as_accurate_as_torch(name, value, plain, exact)


@backends
@pytest.mark.parametrize("activation", FORMULAS)
def test_large_arguments_stay_finite(kernels, activation, device):
    g = torch.tensor([[-300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0]], device=device)
    dg, du, h = of(kernels).glu_backward_(torch.ones_like(g), g, torch.ones_like(g), activation, needs_h=True)
    limit = g.clamp(min=0)
    torch.testing.assert_close(h, limit, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(du, limit, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dg, torch.where(g == 0, 0.5, (g > 0).float()), atol=1e-6, rtol=1e-6)


@backends
def test_rows_that_lie_apart(kernels, device):
    run, wide = of(kernels), [torch.randn(9, 80, device=device) for _ in range(3)]
    g, u, dh = (t[:, 5:45] for t in wide)
    h = run.glu(g, u, "silu")
    torch.testing.assert_close(h, run.glu(g.contiguous(), u.contiguous(), "silu"))
    outside = wide[2].clone()
    expected = run.glu_backward_(dh.clone(), g.contiguous(), u.contiguous(), "silu", needs_h=True)
    got = run.glu_backward_(dh, g, u, "silu", needs_h=True)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)
    untouched = torch.ones(80, dtype=torch.bool, device=device)
    untouched[5:45] = False
    assert torch.equal(wide[2][:, untouched], outside[:, untouched])
    columns = torch.randn(40, 9, device=device).t()  # not even the rows are dense
    torch.testing.assert_close(run.glu(columns, u, "gelu"), run.glu(columns.contiguous(), u, "gelu"))


@backends
def test_only_what_is_named_is_written_over(kernels, device):
    run, (g, u, dh) = of(kernels), case(12, 40, torch.float32, device)
    before = [t.clone() for t in (g, u)]
    h, (dg, du, _) = run.glu(g, u, "silu"), run.glu_backward_(dh.clone(), g, u, "silu")
    assert all(torch.equal(a, b) for a, b in zip((g, u), before))
    over_g = g.clone()
    assert run.glu(over_g, u, "silu", out=over_g) is over_g
    assert torch.equal(over_g, h)
    over_g = g.clone()
    d_over_g, d_u, none = run.glu_backward_(dh.clone(), over_g, u, "silu", out=over_g)
    assert d_over_g is over_g
    assert none is None
    assert torch.equal(d_over_g, dg)
    assert torch.equal(d_u, du)


@pytest.mark.kernel
def test_the_kernels_refuse_what_they_cannot_take():
    from peft_fast.kernels import glu

    assert glu.why_not(torch.bfloat16) is None
    assert glu.why_not(torch.float64) == "g is torch.float64, the kernels take float32, float16 and bfloat16"


def test_slabs_cover_every_row(monkeypatch):
    g, u, dh = case(11, 6, torch.float32, "cpu")
    whole = [reference.glu(g, u, "silu"), *reference.glu_backward_(dh.clone(), g, u, "silu", needs_h=True)]
    for elements in (1, 6, 20, 66):
        monkeypatch.setattr(reference, "GLU_ELEMENTS", elements)
        slabs = [reference.glu(g, u, "silu"), *reference.glu_backward_(dh.clone(), g, u, "silu", needs_h=True)]
        for a, b in zip(whole, slabs):
            torch.testing.assert_close(a, b)


@pytest.mark.kernel
@pytest.mark.skipif(not INTERPRETING, reason="compares bits with torch on the CPU")
def test_both_backends_agree_to_rounding():
    from peft_fast.kernels import glu

    g, u, dh = case(33, 257, torch.float32, "cpu")
    for activation in FORMULAS:
        ours = glu.glu_backward_(dh.clone(), g, u, activation, needs_h=True)
        for a, b in zip(ours, reference.glu_backward_(dh.clone(), g, u, activation, needs_h=True)):
            torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)


@backends
@pytest.mark.parametrize("activation", FORMULAS)
def test_the_op_keeps_g_and_u_and_writes_over_nothing(kernels, activation, device):
    where = "cpu" if kernels == "torch" else device
    g, u, dh = (t.view(2, 3, 33) for t in case(6, 33, torch.float32, where))
    copies = [t.clone() for t in (g, u, dh)]
    leaves = [t.requires_grad_() for t in (g, u)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h = ops.glu(*leaves, activation, backend=kernels)
    assert {t.data_ptr() for t in saved} == {g.data_ptr(), u.data_ptr()}
    got = [h.detach(), *torch.autograd.grad(h, leaves, dh)]
    for value, expected in zip(got, by_autograd(g, u, dh, activation), strict=True):
        torch.testing.assert_close(value, expected)
    for t, copy in zip((g, u, dh), copies, strict=True):
        assert torch.equal(t, copy)


@pytest.mark.parametrize("activation", FORMULAS)
def test_second_derivatives_and_torch_func(activation):
    g, u = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(g, u):
        return ops.glu(g, u, activation)

    assert torch.autograd.gradcheck(call, (g, u))
    assert torch.autograd.gradgradcheck(call, (g, u))
    torch.testing.assert_close(torch.func.jvp(call, (g, u), (u, g))[0], call(g, u))


def test_what_does_not_fit_is_refused():
    g = torch.randn(2, 3)
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, gelu_tanh, got 'relu'"):
        ops.glu(g, g, "relu")
    for u in (torch.randn(2, 4), g.half()):
        with pytest.raises(ValueError, match="g and u must be alike"):
            ops.glu(g, u, "silu")
    with pytest.raises(TypeError, match="int64"):
        ops.glu(g.long(), g.long(), "silu")


def opcheck_all(backend: str, device: str) -> None:
    op, (g, u, dh) = torch.ops.peft_fast, case(3, 8, torch.float32, device)
    torch.library.opcheck(op.glu.default, (g, u, "silu", backend))
    torch.library.opcheck(op.glu_backward.default, (dh, g, u, "silu", backend))


@pytest.mark.kernel
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend, device):
    opcheck_all(backend, device)
