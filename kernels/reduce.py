"""total[rows, cols] = sum over P of partial[P, rows, cols]: the second stage of kernels that split a sum.

One launch. Added in fp32 in a fixed order, so every bit repeats (atomics would add in the order of arrival), and
rounded once. The sums of several matrices that lie one behind the other go to a tensor each: what an op returns may not
share memory.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import thrice

DEPTH = 8  # partials that a program loads before it adds them


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    partial_ptr, start_ptr, out0_ptr, out1_ptr, out2_ptr,
    P, numel, end0, end1,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, HAS_START: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """Elements before end0 go to the first of COUNT outputs, those before end1 to the second."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    total = tl.load(start_ptr + element, mask=inside, other=0.0) if HAS_START else tl.zeros([BLOCK], tl.float32)
    for p0 in range(0, P, DEPTH):
        p = p0 + tl.arange(0, DEPTH)[:, None]
        part = tl.load(
            partial_ptr + p.to(tl.int64) * numel + element[None, :], mask=(p < P) & inside[None, :], other=0.0
        )
        total += tl.sum(part, axis=0)
    if ROOT:
        total = tl.sqrt_rn(total)
    if COUNT == 1:
        tl.store(out0_ptr + element, total, mask=inside)
    else:
        tl.store(out0_ptr + element, total, mask=element < end0)
        tl.store(out1_ptr + element - end0, total, mask=(element >= end0) & (element < end1))
    if COUNT > 2:
        tl.store(out2_ptr + element - end1, total, mask=(element >= end1) & inside)


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


def _launch(partial: Tensor, start: Tensor | None, outs: list[Tensor], root: bool) -> None:
    numel, config = sum(out.numel() for out in outs), configs.SUM_PARTIALS
    if not numel:
        return
    end0 = outs[0].numel()
    end1 = end0 + (outs[1].numel() if len(outs) > 1 else 0)
    _sum_partials_kernel[(triton.cdiv(numel, config["BLOCK"]),)](
        partial, start, *thrice(outs, outs[0]), partial.shape[0], numel, end0, end1,
        DEPTH=DEPTH, COUNT=len(outs), HAS_START=start is not None, ROOT=root, **config,
    )  # fmt: skip
