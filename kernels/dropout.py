"""The dropout generator: masks as a pure function of (key, row, column), so that none is ever stored.

Forward, recomputation and backward make the same mask again, on either backend, bit for bit; tiles.dropout_mask is the
Triton twin. A 32-bit hash costs half of Philox (6.5 against 13 SASS instructions per element, sm_80 and sm_90) and on a
CPU it is faster than torch's own dropout; its statistics are tested in tests/test_dropout.py.
"""

import torch
from torch import Tensor

DRAWS = 1 << 16  # a decision compares 16 random bits with a threshold: p is rounded to the next 1/65536


def new_key(device: torch.device | str) -> Tensor:
    """int32 [2], drawn from torch's generator of `device`: the seed of one layer's mask in one forward.

    A tensor, not a number: Triton compiles anew for integers that are 1 or that need more than 31 bits.
    """
    return torch.randint(-(1 << 31), (1 << 31) - 1, (2,), dtype=torch.int32, device=device)


def threshold(p: float) -> int:
    """How many of the 65,536 draws drop an element."""
    return round(p * DRAWS)


def correction(p: float) -> float:
    """c = 1 / (1 - p) for the p that 16 bits can express; 0 for p = 1, where nothing is kept."""
    kept = DRAWS - threshold(p)
    return DRAWS / kept if kept else 0.0


def mask(key: Tensor, M: int, K: int, p: float, first_row: int = 0) -> Tensor:
    """bool [M, K]: True where an element is kept, for rows first_row .. first_row + M.

    Two columns share one hash of their counter i = row * ceil(K / 2) + column // 2 and take 16 of its bits each. What
    of row * ceil(K / 2) exceeds 32 bits is hashed into the row's key. Arithmetic is modulo 2**32: int32 products wrap,
    and right shifts are masked because torch's are arithmetic.
    """
    pairs = (K + 1) // 2
    first = torch.arange(first_row, first_row + M, device=key.device)[:, None] * pairs  # int64 [M, 1]
    key0 = key[0] + (first >> 32).to(torch.int32) * _int32(0x85EBCA6B)
    low = first.to(torch.int32)  # wraps
    x = (low + torch.arange(pairs, device=key.device, dtype=torch.int32)) * _int32(0x9E3779B1) + key0
    x = x.bitwise_xor_((x >> 16) & 0xFFFF).mul_(0x7FEB352D).bitwise_xor_(key[1])
    x = x.bitwise_xor_((x >> 15) & 0x1FFFF).mul_(_int32(0x846CA68B))
    x = x.bitwise_xor_((x >> 16) & 0xFFFF)
    draws = torch.stack([x & 0xFFFF, (x >> 16) & 0xFFFF], dim=-1).view(M, 2 * pairs)[:, :K]
    return draws >= threshold(p)


def _int32(bits: int) -> int:
    """The signed number with these 32 bits."""
    return bits - (1 << 32) if bits >= 1 << 31 else bits
