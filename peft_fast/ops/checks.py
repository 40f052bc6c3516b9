"""What the public functions check of their arguments: the rule, what was got, the way out.

Backends differ in what a wrong argument does to them (torch broadcasts or raises, a Triton kernel reads past the end,
a tensor on the meta device makes torch answer with uninitialised memory), so it is refused before either sees it.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_device(x: Tensor, **others: Tensor | None) -> None:
    """ValueError unless all tensors are where the first one is."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"all tensors must be on one device: x is on {x.device}, {name} on {tensor.device}")


def check_floating(**tensors: Tensor | None) -> None:
    """TypeError for integers and for floats that nothing is multiplied in; ValueError for numbers without a shape."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} is {tensor.dtype}, which is not multiplied in: cast it to one of {FLOATS}")
        if tensor.dim() == 0:
            raise ValueError(f"{name} must have at least one dimension, its features, got a single number")


def check_bias(bias: Tensor | None, N: int) -> None:
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be [{N}], one value an output feature, got {tuple(bias.shape)}")


def check_dropout(p: float, key: Tensor | None) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {p}")
    if not p:
        return
    if key is None:
        raise ValueError("dropout_p > 0 needs dropout_key: pass new_dropout_key(x.device), a new one per forward")
    if key.shape != (2,) or key.dtype != torch.int32:
        raise ValueError(
            f"dropout_key must be int32 [2], as new_dropout_key gives it, got {tuple(key.shape)} {key.dtype}"
        )
