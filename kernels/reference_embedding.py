"""The ops on embeddings in plain torch: specification, path without Triton, and oracle of the tests.

M ids, V rows of the table (the vocabulary), N features of each, R rank. W is [V, N], A is [R, V], B is [N, R].

    s  = A.T[ids]
    y  = W[ids] + scale * s @ B.T                            lora_embedding
    ds = scale * dy @ B          dB = scale * dy.T @ s       lora_embedding_backward
    dA[:, v] = sum of ds over the ids that are v             (v = padding_idx: zero)

Products are taken in y's dtype, as for linear layers (reference.py). The sums of dA are taken in fp32 and in the order
of the ids, whatever the device: twice the same call gives the same bits.
"""

import torch
from torch import Tensor

from .reference import lora_up_add_, lora_up_backward


def _gather(A: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """s [M, R] = A.T[ids]"""
    return A.t().index_select(0, ids).to(dtype)


def lora_embedding(ids: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y [M, N] in W's dtype. IndexError on a CPU, a device-side assertion on a GPU, for an id outside [0, V)."""
    y = weight.index_select(0, ids)
    lora_embedding_add_(y, ids, A, B, scale)
    return y


def lora_embedding_add_(y: Tensor, ids: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """y [M, N] += scale * A.T[ids] @ B.T, in place."""
    lora_up_add_(y, _gather(A, ids, y.dtype), B, scale)


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
    """dA [R, V] and dB [N, R] in the dtypes of A and B, each None where it is not needed. s is gathered anew."""
    ds, dB = lora_up_backward(dy, _gather(A, ids, dy.dtype), B, scale, needs_dA, needs_dB)
    if ds is None:
        return None, dB
    return segment_sum(ds, ids, A.shape[1], padding_idx).t().to(A.dtype).contiguous(), dB


def segment_sum(rows: Tensor, ids: Tensor, V: int, padding_idx: int = -1) -> Tensor:
    """[V, C] in fp32 or wider: the rows [M, C] of equal id added up in their order; zero for `padding_idx`.

    torch's own has no atomics: on a CPU every thread owns ids, on a GPU they are sorted.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.ops.aten.embedding_dense_backward(wide, ids, V, padding_idx, False)
