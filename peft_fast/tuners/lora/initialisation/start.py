"""Where an adapter begins: its factors, and what becomes of the base weight for their sake."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_fast import ops
from peft_fast.quant.bitsandbytes import forget_codes
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.tuners.base_weight import clone, set_base_weight, set_quantized_weight
from peft_fast.tuners.offload import onloaded

ROWS_AT_ONCE = 1 << 20  # elements: 4 MiB of fp32


@dataclass
class Start:
    """A [R, K] and B [N, R], in fp32 or wider.

    `subtracted`: the base weight loses scale * B A, so that base and adapter are together what the base was.
    `replaced`: the base weight becomes this one, of 4 or 8 bits, dequantised.
    """

    A: Tensor
    B: Tensor
    subtracted: bool = False
    replaced: QuantizedWeight | None = field(default=None, repr=False)
    norms: Tensor | None = None  # [N], of base and adapter together, where DoRA asks for them

    @property
    def changes_base(self) -> bool:
        return self.subtracted or self.replaced is not None

    def merged(self, weight: Tensor, scale: float) -> Tensor:
        """Base and adapter together [N, K]; `weight`: the base weight of now, which has not been changed yet."""
        if self.subtracted:
            return weight
        base = weight if self.replaced is None else ops.dequantize(self.replaced, weight.dtype)
        return base + (scale * self.B @ self.A).to(weight)

    def take_from(self, weight: Tensor, scale: float) -> None:
        """weight [N, K] -= scale * B A, in place and rounded once; with `scale` negative it is put back.

        Rows by rows: the fp32 of a 16-bit weight never reaches the size of the weight.
        """
        A, B = self.A.to(weight.device), self.B.to(weight.device)
        if weight.dtype == A.dtype:
            weight.addmm_(B, A, alpha=-scale)
            return
        step = max(1, ROWS_AT_ONCE // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            weight[rows] = torch.addmm(weight[rows].to(A.dtype), B[rows], A, alpha=-scale)


class Change:
    """What a start does to the base weight of a layer, to be written when the whole model is ready for it."""

    def __init__(self, layer: Any, start: Start, scale: float) -> None:
        self.layer, self.start, self.scale = layer, start, scale
        self.before: QuantizedWeight | Tensor | None = None

    @torch.no_grad()
    def write(self) -> None:
        base = self.layer.get_base_layer()
        with onloaded(base, changed=True):
            weight = self.layer.base_weight()
            if self.start.replaced is not None:
                self.before = weight.detach().to("cpu", copy=True)
                self._set(ops.dequantize(self.start.replaced, torch.float32))
            elif isinstance(weight, QuantizedWeight):
                self.before = clone(weight)
                rows = rows_in_full(self.layer)
                self.start.take_from(rows, self.scale)
                self._set(rows)
            else:
                self.start.take_from(self.layer.rows_of_base().data, self.scale)
                forget_codes(base)
        self.layer.base_changed()

    def _set(self, rows: Tensor) -> None:
        set_base_weight(self.layer.get_base_layer(), rows.t() if self.layer.out_dim else rows)

    @torch.no_grad()
    def undo(self) -> None:
        """Exact for a k-bit weight and for one that was replaced; up to a rounding for what was subtracted from."""
        base = self.layer.get_base_layer()
        with onloaded(base, changed=True):
            if isinstance(self.before, QuantizedWeight):
                set_quantized_weight(base, self.before)
            elif self.before is not None:
                set_base_weight(base, self.before)
            else:
                self.start.take_from(self.layer.rows_of_base().data, -self.scale)
                forget_codes(base)
        self.layer.base_changed()


def rows_in_full(layer: Any) -> Tensor:
    """The base weight [N, K], a row an out feature, in fp32 or wider; the weight itself where it is that already."""
    weight = layer.rows_of_base()
    if isinstance(weight, QuantizedWeight):
        return ops.dequantize(weight, torch.float32)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
