"""The largest singular values and vectors of a large matrix, to the accuracy of a full SVD, without one: subspace
iteration with Chebyshev filters (Zhou and Saad, SIAM J. Matrix Anal. 29, 2007). A block of vectors X is multiplied by

    T_d(2 W^T W / beta - 1) X

which grows what is above beta, the block's smallest squared singular value, and nothing below; then the block's own
singular vectors are taken, until they are those of W. Memory beside W: a few blocks.
"""

import math

import torch
from torch import Tensor

SMALLEST = 1024  # below, LAPACK is as fast
BLOCK = 8  # of the matrix's smaller side one part in so many is the most that the block may be
# Until the residual |W^T u - s v| / s_1 is that, in this dtype; the second is the rounding of fp32, as LAPACK's. A step
# may grow the first wanted vector so much more than the last; those that are found are kept out of it.
PHASES = ((torch.float32, 1e-5, 1e3), (torch.float64, 5e-8, 1e8))
MOST_DEGREE, MOST_PRODUCTS = 12, 100  # of one filter; of a phase before a full SVD is the better way
SEED = 0


def largest_singular(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """(U [N, r], S [r], Vh [r, K]) of weight [N, K] fp32; None where a full SVD is the better way: small matrices, many
    vectors, and values so close together that the iteration takes long. The same from call to call; torch's generator
    is not drawn from."""
    count = 2 * r + 8
    if weight.dtype != torch.float32 or min(weight.shape) < max(SMALLEST, BLOCK * count):
        return None
    if weight.shape[0] < weight.shape[1]:
        found = largest_singular(weight.t(), r)
        return None if found is None else (found[2].t(), found[1], found[0].t())
    generator = torch.Generator().manual_seed(SEED)
    block = torch.randn(weight.shape[1], count, generator=generator).to(weight.device)
    found = _iterated(weight, block, r, *PHASES[0])
    found = None if found is None else _iterated(weight, found[2], r, *PHASES[1])
    if found is None:
        return None
    U, S, V = found
    return U[:, :r].float(), S[:r].float(), V[:, :r].t().float()


def _iterated(
    weight: Tensor, block: Tensor, r: int, dtype: torch.dtype, tolerance: float, growth: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(U, S, V) of the block's vectors, the first r of which are the weight's."""
    block, products = torch.linalg.qr(block.to(dtype)).Q, 0
    while True:
        U, S, Vh = torch.linalg.svd(_times(weight, block), full_matrices=False)
        block = block @ Vh.t()
        residual = _times_transposed(weight, U[:, :r]) - block[:, :r] * S[:r]
        found = (torch.linalg.vector_norm(residual, dim=0) <= tolerance * S[0]).tolist()
        if all(found):
            return U, S, block
        done = found.index(False)
        beta = float(S[-1]) ** 2
        degree = _degree(float(S[done]) ** 2, float(S[r - 1]) ** 2, beta, growth)
        products += degree
        if not degree or products > MOST_PRODUCTS:
            return None
        kept, rest = block[:, :done], block[:, done:]
        block = torch.linalg.qr(torch.cat([kept, _filtered(weight, rest, kept, beta, degree)], 1)).Q


def _degree(first: float, last: float, beta: float, growth: float) -> int:
    """The largest polynomial that grows the first wanted vector at most `growth` times more than the last."""
    if not beta > 0:
        return 0
    apart = math.acosh(max(1.0, 2 * first / beta - 1)) - math.acosh(max(1.0, 2 * last / beta - 1))
    return max(1, min(MOST_DEGREE, int(math.log(growth) / max(apart, 1e-9))))


def _filtered(weight: Tensor, block: Tensor, kept: Tensor, beta: float, degree: int) -> Tensor:
    half = beta / 2
    before, now = block, (_gram(weight, block, kept) - half * block) / half
    for _ in range(degree - 1):
        before, now = now, 2 * (_gram(weight, now, kept) - half * now) / half - before
    return now


def _gram(weight: Tensor, block: Tensor, kept: Tensor) -> Tensor:
    """W^T W X without what is along the vectors `kept`: what rounding leaves of them would outgrow the rest."""
    product = _times_transposed(weight, _times(weight, block))
    return product - kept @ (kept.t() @ product)


def _times(weight: Tensor, block: Tensor) -> Tensor:
    """W X in the dtype of X; W is cast rows by rows."""
    return torch.cat([rows.to(block.dtype) @ block for rows in weight.split(_rows(weight, block))])


def _times_transposed(weight: Tensor, block: Tensor) -> Tensor:
    """W^T X"""
    step = _rows(weight, block)
    result = block.new_zeros(weight.shape[1], block.shape[1])
    for rows, part in zip(weight.split(step), block.split(step)):
        result.addmm_(rows.t().to(block.dtype), part)
    return result


def _rows(weight: Tensor, block: Tensor) -> int:
    return len(weight) if weight.dtype == block.dtype else 256
