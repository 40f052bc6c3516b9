"""PiSSA (arXiv 2404.02948): the adapter starts as the weight's largest singular values and vectors, and what is left of
the weight is frozen.

    W = U S V^T,   scale * B A = U_r S_r V_r^T,   A = sqrt(S_r / scale) V_r^T,   B = U_r sqrt(S_r / scale)
"""

import torch
from torch import Tensor

from .largest import largest_singular
from .start import Start


def pissa(weight: Tensor, r: int, scale: float) -> Start:
    """weight [N, K] -> A [R, K], B [N, R] by a full SVD, or where that takes long by one of the largest vectors alone,
    to the same accuracy."""
    U, S, Vh = largest_singular(weight, r) or torch.linalg.svd(weight, full_matrices=False)
    return _start(U[:, :r], S[:r], Vh[:r], scale)


def pissa_niter(weight: Tensor, r: int, scale: float, iterations: int) -> Start:
    """The same by a randomised SVD with `iterations` subspace iterations (arXiv 0909.4061, algorithm 5.1): seconds
    instead of minutes. Draws from torch's generator."""
    U, S, V = torch.svd_lowrank(weight, r, niter=iterations)
    return _start(U, S, V.t(), scale)


def _start(U: Tensor, S: Tensor, Vh: Tensor, scale: float) -> Start:
    root = (S / scale).sqrt()
    return Start(root[:, None] * Vh, U * root, subtracted=True)
