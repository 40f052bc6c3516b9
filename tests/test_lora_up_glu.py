"""LoRA's up projections of gate and up and the activation in one pass, on both backends: against fp64."""

import pytest
import torch
from torch import Tensor

from peft_fast.kernels import reference, triton_ops
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
            over_g = ops.lora_up_glu(*alone, s, B, SCALES, activation, keep=False)
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
