"""The dropout generator: masks as a pure function of (key, row, column), so that none is ever stored.

Forward, recomputation and backward make the same mask again, on either backend, bit for bit; tiles.dropout_mask is the
Triton twin. A 32-bit hash costs half of Philox (6.5 against 13 SASS instructions per element, sm_80 and sm_90); its
statistics are tested in tests/test_dropout.py.
"""

import torch
from torch import Tensor

DRAWS = 1 << 16  # a decision compares 16 random bits with a threshold: p is rounded to the next 1/65536
CHUNK = 1 << 20  # pairs of elements that are hashed at a time, 4 MiB: bounds the temporaries, costs nothing


def new_key(device: torch.device | str) -> Tensor:
    """int32 [2], drawn from torch's generator of `device`: the seed of one layer's mask in one forward.

    A tensor, not a number: Triton compiles anew for integers that are 1 or that need more than 31 bits.
    """
    return torch.randint(-(1 << 31), (1 << 31) - 1, (2,), dtype=torch.int32, device=device)


def new_keys(device: torch.device | str, count: int) -> list[Tensor]:
    """So many keys from one draw, one launch on a GPU. They lie 16 bytes apart: Triton compiles anew for a pointer that
    is not a multiple of 16."""
    draws = torch.randint(-(1 << 31), (1 << 31) - 1, (count, 4), dtype=torch.int32, device=device)
    return list(draws[:, :2].unbind())


def new_key_table(device: torch.device | str, count: int) -> Tensor:
    """int32 [count, 2]: so many keys in one tensor, as the kernels for many adapters take them."""
    return torch.randint(-(1 << 31), (1 << 31) - 1, (count, 2), dtype=torch.int32, device=device)


def threshold(p: float) -> int:
    """How many of the 65,536 draws drop an element."""
    return round(p * DRAWS)


def correction(p: float) -> float:
    """c = 1 / (1 - p) for the p that 16 bits can express; 0 for p = 1, where nothing is kept."""
    kept = DRAWS - threshold(p)
    return DRAWS / kept if kept else 0.0


def mask(key: Tensor, M: int, K: int, p: float, first_row: int = 0) -> Tensor:
    """bool [M, K]: True where an element is kept, for rows first_row .. first_row + M.

    Two columns share one hash of their counter i = row * ceil(K / 2) + column // 2 and take 16 of its bits each, the
    even column the lower ones. What of row * ceil(K / 2) exceeds 32 bits is hashed into the row's key.

    Arithmetic is modulo 2**32 on int32, whose products wrap. In place: 1.2 ms for a million elements against 11 ms of
    torch's own dropout (one thread of an EPYC; tests/test_dropout.py has the formula in plain integers).
    """
    pairs, drop = (K + 1) // 2, threshold(p)
    kept = torch.empty(M, 2 * pairs, dtype=torch.bool, device=key.device)
    if drop == DRAWS or not pairs:
        return kept[:, :K].fill_(False)
    first = torch.arange(first_row, first_row + M, device=key.device)[:, None] * pairs  # int64 [M, 1]
    key0 = key[0] + (first >> 32).to(torch.int32) * _int32(0x85EBCA6B)
    of_row = first.to(torch.int32) * _int32(0x9E3779B1) + key0
    of_pair = torch.arange(pairs, device=key.device, dtype=torch.int32) * _int32(0x9E3779B1)
    step = max(1, CHUNK // pairs)
    for start in range(0, M, step):
        x = of_row[start : start + step] + of_pair
        _xor_shifted(x, 16)
        x.mul_(0x7FEB352D).bitwise_xor_(key[1])
        _xor_shifted(x, 15)
        x.mul_(_int32(0x846CA68B))
        _xor_shifted(x, 16)
        # Halves as int16, compared as unsigned: with both sign bits flipped the order is that of signed numbers.
        x.bitwise_xor_(_int32(0x80008000))
        torch.ge(x.view(torch.int16), drop - DRAWS // 2, out=kept[start : start + step])
    return kept[:, :K]


def _xor_shifted(x: Tensor, bits: int) -> None:
    """x ^= x >>> bits, in place; masked because torch shifts arithmetically."""
    x ^= (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _int32(bits: int) -> int:
    """The signed number with these 32 bits."""
    return bits - (1 << 32) if bits >= 1 << 31 else bits
