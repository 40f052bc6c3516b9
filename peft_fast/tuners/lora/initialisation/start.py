"""Where an adapter begins: its factors, and what becomes of the base weight for their sake."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_fast import ops
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.tuners.base_weight import clone, set_base_weight, set_quantized_weight
from peft_fast.tuners.offload import onloaded


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

    def changed(self, weight: Tensor, scale: float) -> Tensor:
        """What becomes of the base weight [N, K], unrounded."""
        if self.replaced is not None:
            return ops.dequantize(self.replaced, weight.dtype).to(weight.device)
        return weight - (scale * self.B @ self.A).to(weight.device)


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
            if isinstance(weight, QuantizedWeight):
                self.before = clone(weight)
            elif self.start.replaced is not None:
                self.before = weight.detach().cpu() if weight.device.type != "cpu" else weight.detach().clone()
            rows = self.start.changed(rows_in_full(self.layer), self.scale)
            set_base_weight(base, rows.t() if self.layer.out_dim else rows)
        self.layer.base_changed()

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
                delta = (self.scale * self.start.B @ self.start.A).to(self.layer.base_weight().device)
                rows = rows_in_full(self.layer) + delta
                set_base_weight(base, rows.t() if self.layer.out_dim else rows)
        self.layer.base_changed()


def rows_in_full(layer: Any) -> Tensor:
    """The base weight [N, K], a row an out feature, in fp32 or wider; the weight itself where it is that already."""
    weight = layer.rows_of_base()
    if isinstance(weight, QuantizedWeight):
        return ops.dequantize(weight, torch.float32)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
