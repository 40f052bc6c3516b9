"""total[rows, cols] = sum over P of partial[P, rows, cols]: the second stage of kernels that split a sum.

One launch. Added in fp32 in a fixed order, so every bit repeats (atomics would add in the order of arrival), and
rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs

DEPTH = 8  # partials that a program loads before it adds them


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    partial_ptr, start_ptr, out_ptr,
    P, numel,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, HAS_START: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    total = tl.load(start_ptr + element, mask=inside, other=0.0) if HAS_START else tl.zeros([BLOCK], tl.float32)
    for p0 in range(0, P, DEPTH):
        p = p0 + tl.arange(0, DEPTH)[:, None]
        part = tl.load(
            partial_ptr + p.to(tl.int64) * numel + element[None, :], mask=(p < P) & inside[None, :], other=0.0
        )
        total += tl.sum(part, axis=0)
    tl.store(out_ptr + element, tl.sqrt_rn(total) if ROOT else total, mask=inside)


def sum_partials(partial: Tensor, dtype: torch.dtype, start: Tensor | None = None, root: bool = False) -> Tensor:
    """[rows, cols] in `dtype` from fp32 partials [P, rows, cols], contiguous; plus `start`, fp32; its square root if
    asked for."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    config = configs.SUM_PARTIALS
    if out.numel():
        _sum_partials_kernel[(triton.cdiv(out.numel(), config["BLOCK"]),)](
            partial, start, out, partial.shape[0], out.numel(),
            DEPTH=DEPTH, HAS_START=start is not None, ROOT=root, **config,
        )  # fmt: skip
    return out
