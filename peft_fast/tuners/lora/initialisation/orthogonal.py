"""Both factors start with random values, in halves of one orthogonal basis, so that their product is zero: the base
weight stays as it is (datta0.github.io/posts/rethink-lora-init)."""

import torch
from torch import Tensor

from .start import Start

DAMPING = 10.0  # peft's: both factors are a tenth of standard normal values


def orthogonal(weight: Tensor, r: int, scale: float) -> Start:
    """weight [N, K], read for its shape -> A [R, K], B [N, R] with B A = 0. Raises ValueError for an odd r.

    Draws from torch's generator on the CPU, in peft's order.
    """
    if r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, half of it for each factor, got {r}")
    N, K = weight.shape
    basis, _ = torch.linalg.qr(torch.randn(r, r, device="cpu"))
    A = torch.randn(K, r // 2, device="cpu").mm(basis[0::2]).t() / DAMPING
    B = torch.randn(r // 2, N, device="cpu").t().mm(basis[1::2]) / DAMPING
    return Start(A.to(weight.device), B.to(weight.device))
