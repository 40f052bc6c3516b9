"""total[rows, cols] = sum over P of partial[P, rows, cols]: the second stage of kernels that split a sum.

One launch. Added in fp32 in a fixed order, so every bit repeats (atomics would add in the order of arrival), and
rounded once. The sums of several matrices that lie one behind the other go to a tensor each: what an op returns may not
share memory. Two sums of one kernel, rows of ds and the dB_j, share a launch (`sum_both`).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Plan, planned
from .tiles import cdiv, thrice

DEPTH = 8  # partials that a program loads before it adds them


@triton.jit
def _sum(partial_ptr, total, element, inside, numel, most, P, DEPTH: tl.constexpr):
    """total [BLOCK] + the sum over p < P of partial[p, element]; P <= most may differ from element to element"""
    for p0 in range(0, most, DEPTH):
        p = p0 + tl.arange(0, DEPTH)[:, None]
        part = tl.load(
            partial_ptr + p.to(tl.int64) * numel + element[None, :], mask=(p < P) & inside[None, :], other=0.0
        )
        total += tl.sum(part, axis=0)
    return total


@triton.jit
def _sum_matrices(
    program, partial_ptr, start_ptr, out0_ptr, out1_ptr, out2_ptr, P, numel, end0, end1,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, HAS_START: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """Elements before end0 go to the first of COUNT outputs, those before end1 to the second."""
    element = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    total = tl.load(start_ptr + element, mask=inside, other=0.0) if HAS_START else tl.zeros([BLOCK], tl.float32)
    total = _sum(partial_ptr, total, element, inside, numel, P, P, DEPTH)
    if ROOT:
        total = tl.sqrt_rn(total)
    if COUNT == 1:
        tl.store(out0_ptr + element, total, mask=inside)
    else:
        tl.store(out0_ptr + element, total, mask=element < end0)
        tl.store(out1_ptr + element - end0, total, mask=(element >= end0) & (element < end1))
    if COUNT > 2:
        tl.store(out2_ptr + element - end1, total, mask=(element >= end1) & inside)


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    partial_ptr, start_ptr, out0_ptr, out1_ptr, out2_ptr,
    P, numel, end0, end1,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, HAS_START: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    _sum_matrices(
        tl.program_id(0), partial_ptr, start_ptr, out0_ptr, out1_ptr, out2_ptr, P, numel, end0, end1,
        DEPTH, BLOCK, COUNT, HAS_START, ROOT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["P", "programs", "M", "most", "P0", "P1", "P2"])
def _sum_both_kernel(
    rows_partial_ptr, rows_ptr, partial_ptr, start_ptr, out0_ptr, out1_ptr, out2_ptr,
    programs, M, most, P0, P1, P2, columns, column1, column2, offset1, offset2, width, P, numel, end0, end1,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """The first `programs` sum rows [M, columns]. The columns from column1 on are the second matrix, those from column2
    on the third; their partials [P1, M, width] and [P2, M, width] begin at offset1 and offset2."""
    if tl.program_id(0) < programs:
        element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m, column = element // columns, element % columns
        first, second = column < column1, column < column2
        own = tl.where(first, P0, tl.where(second, P1, P2))[None, :]
        place = tl.where(first, column, tl.where(second, offset1 + column - column1, offset2 + column - column2))
        inside = m < M
        total = tl.zeros([BLOCK], tl.float32)
        total = _sum(rows_partial_ptr, total, m * width + place, inside, tl.cast(M, tl.int64) * width, most, own, DEPTH)
        tl.store(rows_ptr + element, total, mask=inside)
    else:
        _sum_matrices(
            tl.program_id(0) - programs, partial_ptr, start_ptr, out0_ptr, out1_ptr, out2_ptr, P, numel, end0, end1,
            DEPTH, BLOCK, COUNT, HAS_START, False,
        )  # fmt: skip


def sum_partials(partial: Tensor, dtype: torch.dtype, start: Tensor | None = None, root: bool = False) -> Tensor:
    """[rows, cols] in `dtype` from fp32 partials [P, rows, cols], contiguous; plus `start`, fp32; its square root if
    asked for."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    _launch(partial, start, [out], root)
    return out


def sum_partials_of(partial: Tensor, like: Sequence[Tensor], start: Tensor | None = None) -> list[Tensor]:
    """The sums of fp32 partials [P, numel], contiguous, plus `start`, fp32 [numel]: one behind the other up to three
    matrices of the shapes and dtypes of `like`."""
    outs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
    _launch(partial, start, outs, False)
    return outs


def sum_both(
    of_rows: Tensor,
    out: Tensor,
    counts: Sequence[int],
    widths: Sequence[int],
    partial: Tensor,
    like: Sequence[Tensor],
    start: Tensor | None = None,
) -> list[Tensor]:
    """In one launch: `sum_partials_of(partial, like, start)`, and to `out` [M, sum of widths], contiguous, the sums of
    fp32 partials of_rows [sum of counts, M, largest width]: the first counts[0] are of the first widths[0] columns, ...
    """
    outs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
    numels = tuple([t.numel() for t in outs])
    launch = _both_plan(out.shape[0], tuple(counts), tuple(widths), partial.shape[0], numels, start is not None)
    launch(of_rows, out, partial, start, *thrice(outs, outs[0]))
    return outs


@planned
def _both_plan(
    M: int, counts: tuple[int, ...], widths: tuple[int, ...], P: int, numels: tuple[int, ...], has_start: bool
) -> Plan:
    block, columns, width = configs.SUM_PARTIALS["BLOCK"], sum(widths), max(widths)
    programs, offsets = cdiv(M * columns, block), [count * M * width for count in (counts[0], sum(counts[:2]))]
    numbers = (programs, M, max(counts), *thrice(counts, 0), columns, widths[0], sum(widths[:2]), *offsets, width)
    return Plan(
        _sum_both_kernel, (programs + cdiv(sum(numels), block),), (*numbers, P, sum(numels), *_ends(numels)),
        DEPTH=DEPTH, COUNT=len(numels), HAS_START=has_start, **configs.SUM_PARTIALS,
    )  # fmt: skip


def _ends(numels: Sequence[int]) -> tuple[int, int]:
    return numels[0], sum(numels[:2])


def _launch(partial: Tensor, start: Tensor | None, outs: list[Tensor], root: bool) -> None:
    numels = tuple([out.numel() for out in outs])
    if any(numels):
        _plan(partial.shape[0], numels, start is not None, root)(partial, start, *thrice(outs, outs[0]))


@planned
def _plan(P: int, numels: tuple[int, ...], has_start: bool, root: bool) -> Plan:
    return Plan(
        _sum_partials_kernel, (cdiv(sum(numels), configs.SUM_PARTIALS["BLOCK"]),), (P, sum(numels), *_ends(numels)),
        DEPTH=DEPTH, COUNT=len(numels), HAS_START=has_start, ROOT=root, **configs.SUM_PARTIALS,
    )  # fmt: skip
