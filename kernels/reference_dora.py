"""DoRA's two ops in plain torch (arXiv 2402.09353, equation 5): norms of rows, and scaling of columns.

N out features, K in features, R rank, M tokens. W is [N, K], A is [R, K], B is [N, R].

    squares[n] = |W[n] + scale * B[n] @ A|**2
               = |W[n]|**2 + 2 * scale * <P[n], B[n]> + scale**2 * <B[n] @ G, B[n]>      P = W @ A.T, G = A @ A.T

    y  = z * factor + bias                                                               scale_columns
    dz = dy * factor           dfactor[n] = sum over m of dy * z                         scale_columns_backward

|W|**2 changes only when the base weight does; the rest reads W once, as a product with R rows of x would, and the
merged weight is never made. Sums in fp32; the products of a 16-bit dy and z are not rounded before they are added up.
"""

import torch
from torch import Tensor

SLAB = 1 << 20  # elements of dy that scale_columns_backward widens to fp32 at a time


def merged_squares(constant: Tensor, P: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The squared norms [N] of the rows of W + scale * B @ A, from |W|**2 [N] and P = W @ A.T [N, R], in `constant`'s
    dtype, fp32 or wider."""
    P, A, B = (t.to(constant.dtype) for t in (P, A, B))
    cross = (P * B).sum(1)
    change = ((B @ (A @ A.t())) * B).sum(1)
    return (constant + 2 * scale * cross + scale**2 * change).clamp_(min=0)  # below 0 by rounding only


def scale_columns(z: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [M, N] = z * factor + bias in z's dtype, rounded once; factor [N] in fp32 or wider."""
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    if bias is None:
        return torch.mul(z, factor, out=out)
    return torch.addcmul(bias.to(factor.dtype), z.to(factor.dtype), factor).to(z.dtype)


def scale_columns_backward(
    dy: Tensor, z: Tensor, factor: Tensor, needs_dz: bool = True, needs_dfactor: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dz [M, N] in dy's dtype and dfactor [N] in factor's, each None where it is not needed."""
    dz = scale_columns(dy, factor) if needs_dz else None
    if not needs_dfactor:
        return dz, None
    dfactor = torch.zeros_like(factor)
    rows = max(1, SLAB // max(1, z.shape[1]))
    for start in range(0, z.shape[0], rows):
        slab = slice(start, start + rows)
        dfactor += (dy[slab].to(factor.dtype) * z[slab]).sum(0)
    return dz, dfactor
