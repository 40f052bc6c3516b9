"""CorDA (arXiv 2406.05223): the singular values and vectors of the weight times the covariance C of its inputs, so that
the directions that sample data use are told from those that they do not.

    W C = U S V^T,   scale * B A = U_r S_r V_r^T C^-1,   and the base weight loses it

preprocess_corda (tuners/lora/corda.py) makes U_r, S_r and C^-1 V_r and leaves them at the layer.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .start import Start


@dataclass
class CordaEigens:
    """U_r [N, R], S_r [R], C^-1 V_r [K, R]."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def corda(layer: Any, weight: Tensor, r: int, scale: float) -> Start:
    """weight [N, K], read for its shape -> A [R, K], B [N, R]. Takes the layer's `eigens` away."""
    eigens = getattr(layer, "eigens", None)
    if eigens is None:
        raise ValueError("init_lora_weights='corda' needs what preprocess_corda leaves at the layers: call it first")
    U, S, V = (tensor.to(weight) for tensor in (eigens.U_WC, eigens.S_WC, eigens.V_WC))
    N, K = weight.shape
    if U.shape != (N, r) or S.shape != (r,) or V.shape != (K, r):
        raise ValueError(
            f"what preprocess_corda left is for another layer or rank: U {tuple(U.shape)}, S {tuple(S.shape)} and V "
            f"{tuple(V.shape)} for a weight {(N, K)} and rank {r}. Call it with the model and the config of "
            "get_peft_model; is cache_file of another?"
        )
    if scale <= 0:
        raise ValueError(f"init_lora_weights='corda' needs a scale above 0, got {scale}: see lora_alpha")
    del layer.eigens
    root = (S / scale).sqrt()
    return Start(root[:, None] * V.t(), U * root, subtracted=True)
