"""The gate of a MLP whose layers have LoRA, one pass each way, on both backends: against fp64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from peft_fast.kernels import dropout, lora_glu, reference, triton_ops
from peft_fast.testing import assert_as_accurate_as_torch

from .conftest import INTERPRETING
from .test_glu import FORMULAS

BACKENDS = [pytest.param(reference, id="torch"), pytest.param(triton_ops, marks=pytest.mark.kernel, id="triton")]
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETING else [torch.bfloat16])]
SCALES = [0.7, -1.5]


def make(M: int, F: int, ranks: tuple[int, int], dtype, adapter, device) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    g, u, s = (torch.randn(M, n).to(device, dtype) for n in (F, F, sum(ranks)))
    return g, u, s, [(torch.randn(F, R) / R**0.5).to(device, adapter) for R in ranks]


def formula(g: Tensor, u: Tensor, s: Tensor, B: list[Tensor], activation: str) -> dict[str, Tensor]:
    parts = s.split([b.shape[1] for b in B], dim=1)
    g, u = (y + scale * part @ b.to(y.dtype).t() for y, part, b, scale in zip((g, u), parts, B, SCALES))
    return {"g": g, "u": u, "h": FORMULAS[activation](g) * u}


@pytest.mark.parametrize("ops", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "F", "ranks"), [(1, 16, (16, 16)), (70, 80, (8, 17)), (33, 144, (100, 4)), (5, 33, (3, 3)), (64, 64, (64, 1))]
)
def test_values(ops, dtype, M, F, ranks, device):
    """Rows at odd addresses go one by one."""
    for activation in FORMULAS if F == 80 else ("silu",):
        for adapter in dict.fromkeys((dtype, torch.float32)):
            g, u, s, B = make(M, F, ranks, dtype, adapter, device)
            truth = formula(g.double(), u.double(), s.double(), [b.double() for b in B], activation)
            plain = formula(g, u, s, B, activation)
            kept, alone = (g.clone(), u.clone()), (g.clone(), u.clone())
            h = ops.lora_up_glu(*kept, s, B, SCALES, activation)
            for name, value in {"g": kept[0], "u": kept[1], "h": h}.items():
                assert value.dtype == dtype
                assert_as_accurate_as_torch(name, value, plain[name], truth[name], dtype)
            assert torch.equal(ops.lora_up_glu(*alone, s, B, SCALES, activation, update=False), h)
            assert all(map(torch.equal, alone, (g, u)))
            over_g = ops.lora_up_glu(*alone, s, B, SCALES, activation, update=False, out=alone[0])
            assert over_g is alone[0]
            assert torch.equal(over_g, h)
            assert torch.equal(h, ops.glu(*kept, activation))  # what the backward has from g and u


@pytest.mark.parametrize("ops", BACKENDS)
def test_strided_and_empty(ops, device):
    g, u, s, B = make(9, 64, (8, 8), torch.float16, torch.float16, device)
    wide = [torch.full((9, 96), torch.nan, dtype=torch.float16, device=device) for _ in range(2)]
    for buffer, y in zip(wide, (g, u)):
        buffer[:, 16:80] = y
    views = [buffer[:, 16:80] for buffer in wide]
    h = ops.lora_up_glu(*views, s, B, SCALES, "silu")
    assert torch.equal(h, ops.lora_up_glu(g, u, s, B, SCALES, "silu"))
    assert all(torch.equal(view, y) for view, y in zip(views, (g, u)))
    assert all(buffer[:, :16].isnan().all() and buffer[:, 80:].isnan().all() for buffer in wide)
    for M, F in ((0, 16), (3, 0)):
        assert ops.lora_up_glu(*make(M, F, (8, 8), torch.float16, torch.float16, device), SCALES, "silu").shape == (
            M,
            F,
        )


class Backward(NamedTuple):
    """What lora_glu_backward_ is given, besides its flags."""

    dh: Tensor
    g: Tensor
    u: Tensor
    s: Tensor
    B: list[Tensor]
    scale: list[float]
    ds: Tensor
    A: Tensor
    p: float
    key: Tensor | None
    activation: str

    @classmethod
    def make(cls, M, F, ranks, dtype, adapter, device, p=0.0, activation="silu") -> "Backward":
        g, u, s, B = make(M, F, ranks[:2], dtype, adapter, device)
        dh, ds = torch.randn(M, F).to(device, dtype), torch.randn(M, ranks[2]).to(device, dtype)
        A = (torch.randn(ranks[2], F) / ranks[2] ** 0.5).to(device, adapter)
        return cls(dh, g, u, s, B, SCALES, ds, A, p, dropout.new_key(device) if p else None, activation)

    def formula(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The steps one by one, computed in `dtype`: dg and du by torch's own autograd, dA as product of rounded h."""
        dh, g, u, s, ds, A, *B = (t.to(dtype) for t in (self.dh, self.g, self.u, self.s, self.ds, self.A, *self.B))
        c, kept = dropout.correction(self.p), torch.ones_like(dh)
        if self.key is not None:
            kept = dropout.mask(self.key, *dh.shape, self.p).to(dtype)
        parts = s.split([b.shape[1] for b in B], dim=1)
        g, u = ((y + scale * part @ b.t()).requires_grad_() for y, part, b, scale in zip((g, u), parts, B, self.scale))
        h = FORMULAS[self.activation](g) * u
        dg, du = torch.autograd.grad(h, (g, u), dh + c * kept * (ds @ A))
        return {"dg": dg, "du": du, "dA": c * ds.t() @ (kept * h.detach())}

    def copy(self) -> "Backward":
        return self._replace(dh=self.dh.clone())


def check_backward(ops, case: Backward) -> None:
    given = case.copy()
    dg, du, dA = ops.lora_glu_backward_(*given)
    assert du is given.dh
    assert (dg.dtype, dA.dtype) == (case.g.dtype, case.A.dtype)
    truth, plain = case.formula(torch.float64), case.formula(case.g.dtype)
    for name, value in {"dg": dg, "du": du, "dA": dA}.items():
        assert_as_accurate_as_torch(name, value, plain[name], truth[name], case.g.dtype)
    again = case.copy()
    over_g = case.g.clone()
    again_dg, again_du, none = ops.lora_glu_backward_(
        *again._replace(g=over_g), needs_dA=False, out=over_g
    )  # the same without dA, dg over g
    assert none is None
    assert again_dg is over_g
    assert torch.equal(again_dg, dg)
    assert torch.equal(again_du, du)


@pytest.mark.parametrize("ops", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("M", "F", "ranks"),
    [(1, 16, (16, 16, 16)), (70, 80, (8, 17, 5)), (100, 144, (64, 4, 33)), (9, 33, (3, 3, 3)), (20, 32, (8, 80, 8))],
)
def test_backward(ops, dtype, p, M, F, ranks, device):
    """Rows at odd addresses, and ranks above 64, in three launches."""
    for activation in FORMULAS if F == 80 else ("silu",):
        for adapter in dict.fromkeys((dtype, torch.float32)):
            check_backward(ops, Backward.make(M, F, ranks, dtype, adapter, device, p, activation))


@pytest.mark.parametrize("ops", BACKENDS)
def test_backward_of_many_rows(ops, device):
    """Rows are split among programs, whose parts of dA are added; two runs give the same bits."""
    case = Backward.make(301, 48, (8, 8, 8), torch.float16, torch.float16, device, 0.1)
    check_backward(ops, case)
    first, second = (ops.lora_glu_backward_(*case.copy()) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("ops", BACKENDS)
def test_backward_strided_and_empty(ops, device):
    case = Backward.make(9, 64, (8, 8, 8), torch.float16, torch.float16, device, 0.1)

    def apart(t: Tensor) -> Tensor:
        buffer = torch.full((t.shape[0], t.shape[1] + 32), torch.nan, dtype=t.dtype, device=device)
        buffer[:, 16:-16] = t
        return buffer[:, 16:-16]

    names = ("dh", "g", "u", "s", "ds", "A")
    views = case._replace(**{name: apart(getattr(case, name)) for name in names}, B=[apart(b) for b in case.B])
    out = torch.full_like(case.g, torch.nan)
    got, expected = ops.lora_glu_backward_(*views, out=out), ops.lora_glu_backward_(*case.copy())
    assert got[0] is out
    assert all(map(torch.equal, got, expected))
    for M, F in ((0, 16), (3, 0)):
        dg, du, dA = ops.lora_glu_backward_(*Backward.make(M, F, (8, 8, 8), torch.float16, torch.float16, device))
        assert dg.shape == du.shape == (M, F)
        assert torch.equal(dA, torch.zeros_like(dA))
        assert dA.shape == (8, F)


def test_what_takes_one_launch():
    assert lora_glu.why_not(torch.bfloat16, 64, (8, 17, 64)) is None
    assert "float32" in lora_glu.why_not(torch.float32, 64, (8, 8, 8))
    assert "71 features" in lora_glu.why_not(torch.float16, 71, (8, 8, 8))
    assert "rank 65" in lora_glu.why_not(torch.float16, 64, (8, 8, 65))
