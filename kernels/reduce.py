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
from .tiles import thrice

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
    numel, config = sum(t.numel() for t in outs), configs.SUM_PARTIALS
    programs = triton.cdiv(out.numel(), config["BLOCK"])
    offsets = [count * of_rows[0].numel() for count in (counts[0], sum(counts[:2]))]
    _sum_both_kernel[(programs + triton.cdiv(numel, config["BLOCK"]),)](
        of_rows, out, partial, start, *thrice(outs, outs[0]),
        programs, out.shape[0], max(counts), *thrice(counts, 0), out.shape[1], widths[0], sum(widths[:2]),
        *offsets, of_rows.shape[2], partial.shape[0], numel, *_ends(outs),
        DEPTH=DEPTH, COUNT=len(outs), HAS_START=start is not None, **config,
    )  # fmt: skip
    return outs


def _ends(outs: list[Tensor]) -> tuple[int, int]:
    end0 = outs[0].numel()
    return end0, end0 + (outs[1].numel() if len(outs) > 1 else 0)


def _launch(partial: Tensor, start: Tensor | None, outs: list[Tensor], root: bool) -> None:
    numel, config = sum(out.numel() for out in outs), configs.SUM_PARTIALS
    if not numel:
        return
    _sum_partials_kernel[(triton.cdiv(numel, config["BLOCK"]),)](
        partial, start, *thrice(outs, outs[0]), partial.shape[0], numel, *_ends(outs),
        DEPTH=DEPTH, COUNT=len(outs), HAS_START=start is not None, ROOT=root, **config,
    )  # fmt: skip
