"""LoRA on the experts of a mixture, in plain torch: the specification of lora_experts.py.

E experts, A [E, R, K] and B [E, N, R]; the rows of expert e are the group starts[e] to starts[e + 1] of x [M, K].

    s[m]  = x[m] @ A_e.T              lora_down_experts             m in group e
    y[m] += scale * s[m] @ B_e.T      lora_up_add_experts_
    ds[m] = scale * dy[m] @ B_e       lora_up_experts_backward
    dB_e  = scale * dy[group e].T @ s[group e]
    dA_e  = ds[group e].T @ x[group e]                              zero for an expert without rows
    dx[m] += ds[m] @ A_e              lora_down_experts_backward

All by two products, rows with each group's own matrix and the sums over each group's rows: torch's grouped ones where
they can, else expert by expert (a call then waits for the lengths of the groups, if they are on a GPU).
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .segments import Groups

GROUPED = (torch.bfloat16, torch.float16, torch.float32)  # torch's grouped product takes


def product(x: Tensor, W: Tensor, groups: Groups) -> Tensor:
    """y [M, N] = x [M, K] @ W_e, W [E, K, N]."""
    if _can_be_grouped(x, W):
        return F.grouped_mm(x, W, offs=groups.starts[1:])
    y = x.new_empty(x.shape[0], W.shape[2])
    for e, group in _groups(groups):
        torch.mm(x[group], W[e], out=y[group])
    return y


def gram(u: Tensor, v: Tensor, groups: Groups) -> Tensor:
    """[E, R, C] = u[group e].T [R, M_e] @ v[group e] [M_e, C], zero for an expert without rows."""
    if u.device.type == "cpu" and _can_be_grouped(u, v):
        return F.grouped_mm(u.t(), v, offs=groups.starts[1:])
    out = u.new_zeros(groups.starts.shape[0] - 1, u.shape[1], v.shape[1])
    for e, group in _groups(groups):
        torch.mm(u[group].t(), v[group], out=out[e])
    return out


def _can_be_grouped(*operands: Tensor) -> bool:
    """torch's grouped product wants rows, or columns, that begin at multiples of 16 bytes. On a GPU it has kernels for
    bf16 from sm_80 on; for others it goes expert by expert itself."""
    first = operands[0]
    if not first.shape[0] or first.dtype not in GROUPED or not all(_is_even(t) for t in operands):
        return False
    if first.device.type != "cuda":
        return True
    return first.dtype == torch.bfloat16 and torch.cuda.get_device_capability(first.device) >= (8, 0)


def _is_even(t: Tensor) -> bool:
    rows, columns = t.stride()[-2:]
    other = rows if columns == 1 else columns if rows == 1 else 1
    return other > 0 and other * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def lora_down_experts(x: Tensor, A: Tensor, groups: Groups) -> Tensor:
    """s [M, R] in x's dtype."""
    return product(x, A.to(x.dtype).mT, groups)


def lora_up_add_experts_(y: Tensor, s: Tensor, B: Tensor, scale: float, groups: Groups) -> None:
    """y [M, N] += scale * s @ B_e.T, in place."""
    y.add_(product(s, B.to(s.dtype).mT, groups), alpha=scale)


def lora_up_experts_backward(
    dy: Tensor, s: Tensor, B: Tensor, scale: float, groups: Groups, needs_ds: bool = True, needs_dB: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """ds [M, R] in dy's dtype and dB [E, N, R] in fp32, each None where it is not needed."""
    ds = product(dy, B.to(dy.dtype), groups).mul_(scale) if needs_ds else None
    return ds, gram(dy, s, groups).float().mul_(scale) if needs_dB else None


def lora_down_experts_backward(
    ds: Tensor, x: Tensor, A: Tensor, groups: Groups, dx: Tensor | None = None, needs_dA: bool = True
) -> Tensor | None:
    """dA [E, R, K] in A's dtype, None where it is not needed; ds @ A_e is added to dx [M, K], in place, if given."""
    if dx is not None:
        dx.add_(product(ds, A.to(ds.dtype), groups))
    return gram(ds, x, groups).to(A.dtype) if needs_dA else None


def lora_experts(x: Tensor, W: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float]], groups: Groups) -> Tensor:
    """y [M, N] for W [E, N, K] and (A [E, R, K], B [E, N, R], scale) of each adapter, expert by expert under torch's
    own autograd: the truth."""
    parts = []
    for e, group in _groups(groups):
        own = x[group]
        part = own @ W[e].t()
        for A, B, scale in adapters:
            part = part + scale * (own @ A[e].to(x.dtype).t()) @ B[e].to(x.dtype).t()
        parts.append(part)
    return torch.cat(parts) if parts else x.new_zeros(0, W.shape[1])


def _groups(groups: Groups) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and these."""
    starts = groups.starts.tolist()
    return ((e, slice(first, end)) for e, (first, end) in enumerate(itertools.pairwise(starts)) if end > first)
