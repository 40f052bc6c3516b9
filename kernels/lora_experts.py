"""LoRA on the experts of a mixture: rows sorted by expert, every expert's factors of one rank, in one tensor.

    s[m, R]  = x[m, K] @ A_e[R, K].T              m in group e: the rows of expert e
    y[m, N] += scale * s[m, R] @ B_e[N, R].T      in place
    ds       = scale * dy @ B_e                   dB_e = scale * dy[group].T @ s[group]
    dA_e     = ds[group].T @ x[group]             dx[m] += ds[m] @ A_e

The kernels of lora_multi.py, an expert being an adapter: A [E, R, K] and B [E, N, R] one expert behind the other. How
many rows each has the router decides, so only the device knows: programs are launched for as many pieces of a group as
there can be, M // size + E, and a kernel tells which there are. Those left over, fewer than E + 1, read the factors of
expert 0 and write nothing. Nothing waits for the device, and the number of launches does not depend on how many experts
there are. The same in plain torch: reference_experts.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lora_multi import Factors, down, gram, up
from .segments import Groups
from .tiles import power_of_2, rows


@triton.jit
def _pieces_kernel(starts_ptr, pieces_ptr, T, SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the pieces of one group."""
    t = tl.program_id(0)
    others = tl.arange(0, BLOCK_T)
    known = others < T
    first = tl.load(starts_ptr + others, mask=known, other=0)
    lengths = tl.load(starts_ptr + others + 1, mask=known, other=0) - first
    counts = (lengths + SIZE - 1) // SIZE
    before = tl.sum(tl.where(others < t, counts, 0))
    own = others == t
    start, length, count = (
        tl.sum(tl.where(own, first, 0)),
        tl.sum(tl.where(own, lengths, 0)),
        tl.sum(tl.where(own, counts, 0)),
    )
    for i0 in range(0, count, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        row, piece_ptr, there = i * SIZE, pieces_ptr + (before + i) * 4, i < count
        tl.store(piece_ptr, tl.zeros([BLOCK], tl.int32) + t, mask=there)
        tl.store(piece_ptr + 1, start + row, mask=there)
        tl.store(piece_ptr + 2, tl.minimum(length - row, SIZE), mask=there)
        tl.store(piece_ptr + 3, row, mask=there)


def pieces_of(starts: Tensor, M: int, size: int) -> Tensor:
    """int32 [M // size + T, 4]: see segments.pieces_of, which gives the same."""
    T = starts.shape[0] - 1
    pieces = torch.zeros((M // size + T, 4), dtype=torch.int32, device=starts.device)
    _pieces_kernel[(T,)](
        starts, pieces, T, SIZE=size, BLOCK_T=power_of_2(T), BLOCK=32, num_warps=1, enable_fp_fusion=True
    )
    return pieces


def lora_down_experts(x: Tensor, A: Tensor, groups: Groups) -> Tensor:
    """s [M, R] in x's dtype."""
    return down(rows(x), Factors.stacked(A, False, 1.0), groups)


def lora_up_add_experts_(y: Tensor, s: Tensor, B: Tensor, scale: float, groups: Groups) -> None:
    """y [M, N] += scale * s @ B_e.T, in place."""
    up(y, rows(s), Factors.stacked(B, True, scale), groups)


def lora_up_experts_backward(
    dy: Tensor, s: Tensor, B: Tensor, scale: float, groups: Groups, needs_ds: bool = True, needs_dB: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """ds [M, R] in dy's dtype and dB [E, N, R] in fp32, each None where it is not needed."""
    dy, factors = rows(dy), Factors.stacked(B, True, scale)
    ds = down(dy, factors, groups) if needs_ds else None
    return ds, gram(rows(s), dy, factors, groups, torch.float32).view(B.shape) if needs_dB else None


def lora_down_experts_backward(
    ds: Tensor, x: Tensor, A: Tensor, groups: Groups, dx: Tensor | None = None, needs_dA: bool = True
) -> Tensor | None:
    """dA [E, R, K] in A's dtype, None where it is not needed; ds @ A_e is added to dx [M, K], in place, if given."""
    factors = Factors.stacked(A, False, 1.0)
    if dx is not None:
        up(dx, rows(ds), factors, groups)
    return gram(rows(ds), rows(x), factors, groups, A.dtype).view(A.shape) if needs_dA else None
