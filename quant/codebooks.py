"""The tables behind the nibbles: NF4, FP4, and the 8-bit dynamic map that nested scales use.

NF4 (arXiv 2305.14314, appendix E): sixteen quantiles of the standard normal, scaled to [-1, 1], with an exact zero:
the values that make equal use of all codes when weights are normal. FP4: a sign bit, then by the three bits that follow
0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4. The dynamic map (arXiv 2110.02861, section 2): the position of the leading
indicator bit is a decimal exponent, the bits behind it a linear fraction.

The constants are file format: weights on disk hold indices into them, so they can never change.
"""

from functools import lru_cache

import torch
from torch import Tensor

_NF4_NEGATIVE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
)  # fmt: skip
_NF4_POSITIVE = (
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4 = (*_NF4_NEGATIVE, 0.0, *_NF4_POSITIVE)

_FP4_MAGNITUDE = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)  # by the low three bits
FP4 = (*_FP4_MAGNITUDE, *(-v for v in _FP4_MAGNITUDE))  # bit 3 is the sign; 0b1000 is minus zero


@lru_cache(maxsize=64)
def codebook(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """float32 [16]: the value of each nibble. Shared between callers: do not write into it."""
    return torch.tensor({"nf4": NF4, "fp4": FP4}[quant_type], dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """float32 [256], ascending: the signed 8-bit dynamic map. Shared between callers: do not write into it.

    Decade i = 0..6 of the magnitudes holds the 2**i midpoints of an even division of [0.1, 1], times 10**(i - 6); each
    also with a minus sign; then 0 and 1 make it 256. Computed in fp32, in this order, because that is how the files'
    tables were computed.
    """
    magnitudes = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        magnitudes += (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    values = sorted([*magnitudes, *(-m for m in magnitudes), 0.0, 1.0])
    return torch.tensor(values, dtype=torch.float32, device=device)
