"""Principal components of rows that come batch by batch, by incremental PCA (Ross et al., IJCV 77, 2008).

The components so far, times their singular values, stand for the rows of the batches before:

    [S V^T; X - mean(X); sqrt(n m / (n + m)) (mean - mean(X))] = U' S' V'^T
"""

import torch
from torch import Tensor
from torch.nn import functional as F

OVERSAMPLING = 2  # the randomised SVD looks for so many times the wanted vectors, with as many subspace iterations ...
ITERATIONS = 4
SEED = 42  # ... from this seed: peft's numbers, so that both libraries find the same


class PrincipalComponents:
    """The first `count` components of all rows so far; `vectors` is None before the first batch.

    vectors: [count, K], the largest element of each positive. values: [count], singular values. shares: [count], of the
    rows' variance. alike: bool [count], whether the last batch changed a component by a cosine of at least `threshold`.
    """

    def __init__(self, count: int, threshold: float) -> None:
        self.count, self.threshold = count, threshold
        self.rows = 0
        self.mean = self.spread = self.values = self.shares = torch.empty(0)
        self.vectors: Tensor | None = None
        self.alike = torch.zeros(count, dtype=torch.bool)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count a batch of rows x [M, K], at least `count` of them and of features."""
        x = x.float()
        before, many = self.vectors, len(x)
        mean = x.mean(0, dtype=torch.float64)
        spread = (x - mean).square_().sum()
        if before is None:
            self.mean, self.spread = mean, spread
            matrix = (x - mean).to(x.dtype)
        else:
            total = self.rows + many
            shift = (self.rows / total * many) ** 0.5 * (self.mean - mean)
            matrix = torch.vstack([self.values[:, None] * before, x - x.mean(0), shift[None]])
            self.spread = self.spread + spread + shift.square().sum()
            self.mean = (self.mean * self.rows + mean * many) / total
        self.rows += many
        values, vectors = _decomposed(matrix, OVERSAMPLING * self.count)
        self.values, self.vectors = values[: self.count], vectors[: self.count]
        self.shares = self.values**2 / self.spread
        if before is not None:
            self.alike = F.cosine_similarity(self.vectors, before) >= self.threshold


def _decomposed(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(singular values, right singular vectors as rows) of [M, K], `most` or fewer."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(SEED)
        _, values, vectors = torch.svd_lowrank(matrix, min(most, *matrix.shape), niter=ITERATIONS)
    rows = vectors.t()
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values, rows * largest.sign()
