"""QuantizedWeight: a 4- or 8-bit weight as what it is, a handful of plain tensors and a few numbers.

4 bits ("nf4", "fp4"). The bytes, for a weight of N output and K input features, row-major, G = blocksize:

    element e = n * K + k          lies in byte e // 2: even e in the high nibble, odd e in the low one
    its block  b = e // G          over the flat index, so blocks run across row ends when G does not divide K
    value(e)   = code[nibble(e)] * scale(b)                                 fp32, then one rounding to `dtype`
    scale(b)   = absmax[b]                                                  plain
               = nested.code[absmax[b]] * nested.absmax[b // 256] + offset  nested: a product and a sum, both rounded

An odd N * K leaves the last low nibble unused.

8 bits ("int8", the weight of LLM.int8, arXiv 2208.07339, section 2.1): one signed byte an element, one scale a row:

    value(n, k) = data[n, k] * (absmax[n] * (1 / 127))                      two fp32 roundings, then one to `dtype`

Both layouts are bitsandbytes' own, so its weights are read in place: see bitsandbytes.py beside this file.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")  # with a table of sixteen codes
INT8 = "int8"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Format(NamedTuple):
    """The numbers of a QuantizedWeight, without its tensors. Hashable; travels through torch.library as a string."""

    quant_type: str
    N: int
    K: int
    blocksize: int  # K for int8: a row is a block
    dtype: torch.dtype
    nested_blocksize: int  # 0: plain fp32 scales

    @property
    def bits(self) -> int:
        return 8 if self.quant_type == INT8 else 4

    @property
    def tensors(self) -> int:
        """How many tensors a weight of this format has."""
        return 2 if self.bits == 8 else 6 if self.nested_blocksize else 3

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.quant_type},{self.N},{self.K},{self.blocksize},{name},{self.nested_blocksize}"

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> "Format":
        quant_type, n, k, blocksize, dtype, nested = text.split(",")
        return Format(quant_type, int(n), int(k), int(blocksize), getattr(torch, dtype), int(nested))


@dataclass(frozen=True, eq=False)
class NestedScales:
    """Block scales that are themselves quantised to 8 bits ("double quantisation")."""

    absmax: Tensor  # float32 [ceil(blocks / blocksize)]
    code: Tensor  # float32 [256], ascending
    offset: Tensor  # float32 [], the mean that was taken off before quantising
    blocksize: int = 256


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] in 4 or 8 bits. No tensor subclass: functions take it apart, nothing is overloaded."""

    data: Tensor  # uint8 [ceil(N * K / 2)]; int8 [N * K] for int8
    absmax: Tensor  # float32 [blocks], or uint8 [blocks] when nested; float32 [N] for int8
    code: Tensor | None  # float32 [16], by nibble; None for int8
    shape: tuple[int, int]  # (N, K)
    blocksize: int  # G; K for int8
    quant_type: str  # "nf4" | "fp4" | "int8"
    dtype: torch.dtype  # what the weight was before, and what it is dequantised to unless another is asked for
    nested: NestedScales | None = None

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def format(self) -> Format:
        return Format(
            self.quant_type, *self.shape, self.blocksize, self.dtype, self.nested.blocksize if self.nested else 0
        )

    @property
    def bits(self) -> int:
        return 8 if self.quant_type == INT8 else 4

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales included: 0.516 per weight for G = 64 nested, 0.5625 plain, 1 for int8."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """data, absmax, unless int8 the code and, when nested, the nested absmax, code and offset: the inverse of
        `from_tensors`."""
        head = [self.data, self.absmax]
        if self.code is not None:
            head.append(self.code)
        return [*head, self.nested.absmax, self.nested.code, self.nested.offset] if self.nested else head

    @staticmethod
    def from_tensors(tensors: list[Tensor], fmt: Format) -> "QuantizedWeight":
        data, absmax = tensors[:2]
        code = tensors[2] if fmt.bits == 4 else None
        nested = None
        if fmt.nested_blocksize:
            nested = NestedScales(tensors[3], tensors[4], tensors[5], fmt.nested_blocksize)
        return QuantizedWeight(data, absmax, code, (fmt.N, fmt.K), fmt.blocksize, fmt.quant_type, fmt.dtype, nested)

    def to(self, device: torch.device | str, copy: bool = False) -> "QuantizedWeight":
        return QuantizedWeight.from_tensors([t.to(device, copy=copy) for t in self.tensors()], self.format)

    def check(self) -> "QuantizedWeight":
        """Raise ValueError where the tensors do not fit the numbers; return self. For weights from outside."""
        n, k = self.shape
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype}")
        if self.quant_type == INT8:
            if self.blocksize != k or self.code is not None or self.nested is not None:
                raise ValueError(
                    f"int8 has one plain scale a row and no table: blocksize must be {k}, code and nested None"
                )
            self._check_tensors([("data", self.data, torch.int8, n * k), ("absmax", self.absmax, torch.float32, n)])
            return self
        if self.quant_type not in QUANT_TYPES or self.code is None:
            raise ValueError(
                f"quant_type must be {INT8!r} or, with a code, one of {QUANT_TYPES}, got {self.quant_type!r}"
            )
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")
        blocks = -(-n * k // self.blocksize)
        expected = [("data", self.data, torch.uint8, (n * k + 1) // 2), ("code", self.code, torch.float32, 16)]
        if self.nested:
            groups = -(-blocks // self.nested.blocksize)
            expected += [("absmax", self.absmax, torch.uint8, blocks)]
            expected += [("nested.absmax", self.nested.absmax, torch.float32, groups)]
            expected += [("nested.code", self.nested.code, torch.float32, 256)]
            expected += [("nested.offset", self.nested.offset, torch.float32, 1)]
        else:
            expected += [("absmax", self.absmax, torch.float32, blocks)]
        self._check_tensors(expected)
        return self

    def _check_tensors(self, expected: list[tuple[str, Tensor, torch.dtype, int]]) -> None:
        for name, tensor, dtype, numel in expected:
            if tensor.dtype != dtype or tensor.numel() != numel:
                raise ValueError(
                    f"{name} of a {self.shape[0]} x {self.shape[1]} {self.quant_type} weight in blocks of "
                    f"{self.blocksize} must be {numel} x {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
                )
