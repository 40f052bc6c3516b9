"""LoRA on an embedding: gathered down projection and up projection, added to what was looked up, and its backward.

    forward    y[M, N] += scale * A[R, V].T[ids[M]] @ B[N, R].T          in place
    backward   ds[M, R] = scale * dy @ B      dB[N, R] = scale * dy.T @ s      lora_up_add.py, s gathered by torch
               dA[:, v] = sum of ds over the ids that are v; v = padding_idx: zero

The forward gathers columns of A into registers, s never reaches memory. The sums of dA run over ids that were sorted,
stably: the program at the first id of a value adds its rows of ds in their order, and nobody else writes that column.
So no atomics, and every bit repeats. The looking up itself is torch's, and so is the assertion that ids are in range;
an id outside [0, V) here reads nothing and makes its row NaN. fp32 accumulation, one rounding on store. The same in
plain torch: reference_embedding.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, tiles
from .lora_up_add import lora_up_backward
from .tiles import cdiv, input_precision, layout, rows, warps


@triton.jit(do_not_specialize=["M"])
def _lora_embedding_add_kernel(
    y_ptr, ids_ptr, a_ptr, b_ptr,
    scale, M, N, R, V,
    stride_y_m, stride_a_r, stride_a_v, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    v = tl.load(ids_ptr + m, mask=m < M, other=0).to(tl.int64)
    known = (v >= 0) & (v < V)
    dtype = y_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)[None, :].to(tl.int64)  # [1, BLOCK_R]
        a = tl.load(a_ptr + r * stride_a_r + v * stride_a_v, mask=known & (m < M) & (r < R), other=0.0)
        b = tl.load(b_ptr + n[:, None] * stride_b_n + r, mask=(n[:, None] < N) & (r < R), other=0.0)
        acc = tl.dot(a.to(dtype), tl.trans(b.to(dtype)), acc, input_precision=PRECISION)
    acc = tl.where(known, acc * tl.cast(scale, tl.float32), float("nan"))
    inside = (m < M) & (n[None, :] < N)
    y_ptrs = y_ptr + m * stride_y_m + n[None, :]
    tl.store(y_ptrs, tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32) + acc, mask=inside)


@triton.jit(do_not_specialize=["M", "padding_idx"])
def _segment_sum_kernel(
    ds_ptr, ids_ptr, order_ptr, da_ptr,
    M, R, V, padding_idx,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: a place in the sorted ids, of which the first of each value has work; a tile of R."""
    first = tl.program_id(0).to(tl.int64)
    v = tl.load(ids_ptr + first).to(tl.int64)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if (v != before) & (v != padding_idx):
        r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        start, more = first, True
        while more:
            place = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            same = (tl.load(ids_ptr + place, mask=place < M, other=-1).to(tl.int64) == v) & (place < M)
            m = tl.load(order_ptr + place, mask=same, other=0)
            total += tl.load(ds_ptr + m[:, None] * R + r[None, :], mask=same[:, None] & (r < R)[None, :], other=0.0)
            start += BLOCK_M
            more = tl.min(same.to(tl.int32), axis=0) == 1  # else the segment ends here
        tl.store(da_ptr + r * V + v, tl.sum(total, axis=0), mask=r < R)


def lora_embedding(ids: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y [M, N] = W[ids] + scale * A.T[ids] @ B.T in W's dtype."""
    y = weight.index_select(0, ids)
    lora_embedding_add_(y, ids, A, B, scale)
    return y


def lora_embedding_add_(y: Tensor, ids: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """y [M, N] += scale * A.T[ids] @ B.T, in place. The rows of y must be dense."""
    assert y.stride(1) == 1
    (M, N), (R, V), B = y.shape, A.shape, rows(B)
    if y.numel() == 0:
        return
    config = configs.lora_embedding(R, y.element_size())
    grid = (cdiv(M, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"]))
    _lora_embedding_add_kernel[grid](
        y, ids.contiguous(), A, B, scale, M, N, R, V, y.stride(0), A.stride(0), A.stride(1), B.stride(0),
        PRECISION=input_precision(), num_warps=warps(layout(y, B)[1]), enable_fp_fusion=True, **config,
    )  # fmt: skip


def lora_embedding_backward(
    dy: Tensor,
    ids: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    padding_idx: int = -1,
    needs_dA: bool = True,
    needs_dB: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """dA [R, V] and dB [N, R] in the dtypes of A and B, each None where it is not needed."""
    s = A.t().index_select(0, ids).to(dy.dtype)
    ds, dB = lora_up_backward(dy, s, B, scale, needs_dA, needs_dB)
    return None if ds is None else segment_sum(ds, ids, A, padding_idx), dB


def segment_sum(ds: Tensor, ids: Tensor, A: Tensor, padding_idx: int = -1) -> Tensor:
    """dA [R, V] in A's dtype: the rows of ds [M, R] of equal id added up."""
    (M, R), V = ds.shape, A.shape[1]
    dA = torch.zeros(R, V, dtype=A.dtype, device=A.device)
    if ds.numel():
        sorted_ids, order = ids.sort(stable=True)
        config = configs.segment_sum(R)
        _segment_sum_kernel[(M, cdiv(R, config["BLOCK_R"]))](
            ds.contiguous(), sorted_ids, order, dA, M, R, V, padding_idx, **config
        )
    return dA


def why_not(dtype: torch.dtype) -> str | None:
    """The reason these kernels cannot take y of this dtype, or None where they can. Shapes and strides are free."""
    return tiles.why_not("y", dtype)
