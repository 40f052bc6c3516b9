"""OLoRA (arXiv 2406.01775): the adapter starts with orthonormal columns, those of the weight's QR decomposition.

W = Q R,   B = Q_r,   A = R_r,   and the base weight loses scale * B A
"""

import torch
from torch import Tensor

from .start import Start


def olora(weight: Tensor, r: int, scale: float) -> Start:
    """weight [N, K] -> A [R, K], B [N, R]."""
    Q, R = torch.linalg.qr(weight)
    return Start(R[:r].clone(), Q[:, :r].clone(), subtracted=True)
