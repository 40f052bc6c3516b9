"""Adapters that share x: the kernels and their plain torch twins, all of a group in one launch, against fp64."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from peft_fast.kernels import dropout, reference, triton_ops
from peft_fast.testing import assert_as_accurate_as_torch

from .conftest import INTERPRETING

DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]
if not INTERPRETING:
    DTYPES += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]

# ranks, out features, dropout of each adapter
GROUPS = [
    ((8, 8), (48, 48), (0.0, 0.0)),
    ((16, 16, 16), (64, 16, 16), (0.1, 0.1, 0.1)),
    ((1, 17, 4), (33, 71, 20), (0.0, 0.3, 0.1)),
    ((100, 8), (40, 64), (0.2, 0.0)),
    ((5,), (24,), (0.1,)),
    ((8, 17), (1040, 70), (0.0, 0.0)),  # of the first several programs leave partial ds, of the second one does
]


@dataclass
class Group:
    x: Tensor
    dy: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]
    bias: list[Tensor | None]
    scale: list[float]
    p: list[float]
    key: list[Tensor | None]

    def wide(self) -> "Group":
        def double(tensors: list) -> list:
            return [None if t is None else t.double() for t in tensors]

        return Group(
            self.x.double(), double(self.dy), double(self.A), double(self.B), double(self.bias), self.scale, self.p,
            self.key,
        )  # fmt: skip


def make_group(M: int, K: int, group: tuple, dtype: torch.dtype, adapter: torch.dtype, device: str) -> Group:
    ranks, widths, p = group
    return Group(
        x=torch.randn(M, K, dtype=dtype, device=device),
        dy=[torch.randn(M, N, dtype=dtype, device=device) for N in widths],
        A=[(torch.randn(R, K) / K**0.5).to(device, adapter) for R in ranks],
        B=[torch.randn(N, R).to(device, adapter) for N, R in zip(widths, ranks)],
        bias=[torch.randn(N, dtype=dtype, device=device) if N % 16 == 0 else None for N in widths],
        scale=[0.5 + j for j in range(len(ranks))],
        p=list(p),
        key=[dropout.new_key(device) if q else None for q in p],
    )


def run(ops, g: Group) -> dict[str, Tensor]:
    """All four functions of a group, with outputs that were NaN before where they are written anew."""
    s = ops.lora_down_group(g.x, g.A, g.p, g.key)
    y = [dy.clone() for dy in g.dy]
    ops.lora_up_add_group_(y, s, g.B, g.scale, g.bias)
    ds, dB = ops.lora_up_group_backward(g.dy, s, g.B, g.scale)
    dx = torch.ones_like(g.x)
    dA = ops.lora_down_group_backward(ds, g.x, g.A, g.p, g.key, dx)
    named = {"y": y, "dA": dA, "dB": dB}
    return {"s": s, "ds": ds, "dx": dx} | {f"{n}{j}": t for n, many in named.items() for j, t in enumerate(many)}


def one_by_one(g: Group) -> dict[str, Tensor]:
    """The same by the functions for one adapter, in plain torch."""
    found: dict[str, Tensor] = {"dx": torch.ones_like(g.x)}
    s_all, ds_all = [], []
    for j, (dy, A, B, bias, scale, p, key) in enumerate(zip(g.dy, g.A, g.B, g.bias, g.scale, g.p, g.key)):
        s = reference.lora_down(g.x, A, p, key)
        y = dy.clone()
        reference.lora_up_add_(y, s, B, scale, bias)
        ds, dB = reference.lora_up_backward(dy, s, B, scale)
        dA = reference.lora_down_backward(ds, g.x, A, p, key, found["dx"])
        found |= {f"y{j}": y, f"dB{j}": dB, f"dA{j}": dA}
        s_all.append(s)
        ds_all.append(ds)
    return found | {"s": torch.cat(s_all, 1), "ds": torch.cat(ds_all, 1)}


def check(ops, group: Group) -> None:
    got, by_torch, truth = run(ops, group), one_by_one(group), one_by_one(group.wide())
    assert got.keys() == truth.keys()
    for name, value in got.items():
        assert value.dtype == by_torch[name].dtype, name
        assert_as_accurate_as_torch(name, value, by_torch[name], truth[name], group.x.dtype)


@pytest.mark.kernel
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize(("M", "K"), [(33, 70), (7, 400), pytest.param(130, 64, marks=pytest.mark.slow)], ids=str)
def test_triton(M, K, group, dtype, adapter, device):
    """Rows at odd addresses, which go one by one; K split for few tokens; K whole."""
    check(triton_ops, make_group(M, K, group, dtype, adapter, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_torch(group, dtype):
    check(reference, make_group(33, 70, group, dtype, torch.float32, "cpu"))


@pytest.mark.kernel
def test_nothing_is_needed_and_nothing_is_there(device):
    """Every subset of what is asked for, and no tokens at all."""
    g = make_group(20, 64, GROUPS[1], torch.float32, torch.float32, device)
    s = triton_ops.lora_down_group(g.x, g.A, g.p, g.key)
    whole = triton_ops.lora_up_group_backward(g.dy, s, g.B, g.scale)
    for needs_ds, needs_dB in itertools.product((True, False), repeat=2):
        ds, dB = triton_ops.lora_up_group_backward(g.dy, s, g.B, g.scale, needs_ds, needs_dB)
        assert (ds is not None) == needs_ds
        assert all((d is not None) == needs_dB for d in dB)
        assert ds is None or torch.equal(ds, whole[0])
        assert not needs_dB or all(torch.equal(a, b) for a, b in zip(dB, whole[1]))
    assert triton_ops.lora_down_group_backward(whole[0], g.x, g.A, g.p, g.key, None, False) == [None] * 3
    empty = make_group(0, 64, GROUPS[1], torch.float32, torch.float32, device)
    assert all(not t.any() for t in run(triton_ops, empty).values())


@pytest.mark.kernel
def test_strided_operands(device):
    """s and ds as slices of something wider, y that are columns of one buffer, bits that repeat."""
    g = make_group(20, 64, GROUPS[2], torch.float32, torch.float32, device)
    s = triton_ops.lora_down_group(g.x, g.A, g.p, g.key)
    wide = torch.full((20, s.shape[1] + 6), torch.nan, device=device)
    wide[:, 3:-3] = s
    buffer = torch.randn(20, sum(dy.shape[1] for dy in g.dy), device=device)
    y = list(buffer.clone().split([dy.shape[1] for dy in g.dy], dim=1))
    expected = [t.clone() for t in y]
    triton_ops.lora_up_add_group_(y, wide[:, 3:-3], g.B, g.scale, g.bias)
    triton_ops.lora_up_add_group_(expected, s, g.B, g.scale, g.bias)
    assert all(torch.equal(a, b) for a, b in zip(y, expected))
    dy = list(buffer.split([dy.shape[1] for dy in g.dy], dim=1))
    for a, b in zip(
        triton_ops.lora_up_group_backward(dy, wide[:, 3:-3], g.B, g.scale)[1],
        triton_ops.lora_up_group_backward([d.contiguous() for d in dy], s, g.B, g.scale)[1],
    ):
        assert torch.equal(a, b)
    for a, b in zip(
        triton_ops.lora_down_group_backward(wide[:, 3:-3], g.x, g.A, g.p, g.key),
        triton_ops.lora_down_group_backward(s, g.x, g.A, g.p, g.key),
    ):
        assert torch.equal(a, b)
