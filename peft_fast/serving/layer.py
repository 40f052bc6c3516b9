"""A linear layer of a model whose adapters are in a store."""

from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.dispatch import Choice
from peft_fast.tuners.base_weight import linear_features, matmul_weight
from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.lora.multi import Call, compute
from peft_fast.tuners.mixed_batch import MixedBatch

from .adapter import StoredAdapter


class StoreBatch(MixedBatch):
    """A batch whose adapters are a store's: those that were there when it was made, whatever the store does since."""

    def __init__(self, names: Any, stored: dict[str, StoredAdapter], repeats: int = 1) -> None:
        super().__init__(names, repeats)
        self.stored = stored


class ServedLinear(BaseTunerLayer):
    """The base layer, and for a batch of a store the adapters of its samples. Has no weights of its own."""

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__(base_layer)
        self.path = path
        self.in_features, self.out_features = linear_features(self.get_base_layer())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch: StoreBatch | None = self.mixed_batch
        if batch is None:
            return self.base_layer(x, *args, **kwargs)
        if self not in batch.kept:
            batch.kept[self] = self._call(batch, x)
        return compute(self, x, batch.kept[self], batch, *args, **kwargs)

    def _call(self, batch: StoreBatch, x: Tensor) -> Call:
        found = [batch.stored[name].factors(self.path) for name in batch.adapters]
        none = x.new_empty(0, self.in_features), x.new_empty(self.out_features, 0), 1.0
        A, B, scales = zip(*(none if one is None else one for one in found)) if found else ((), (), ())
        here = [name for name, one in zip(batch.adapters, found) if one is not None]
        return Call(here, ops.Adapters(A, B, scales, constant=True), matmul_weight(self.base_layer))

    def own_dtype(self, x: Tensor) -> torch.dtype | None:
        """In which dtype a k-bit base layer says to compute."""
        return None if torch.is_autocast_enabled(x.device.type) else getattr(self.base_layer, "compute_dtype", None)

    def route(self, tokens: int) -> Choice:
        if matmul_weight(self.base_layer) is None:
            return Choice("lora_linear_multi", "added", "the base layer has hooks or a forward of its own")
        weight = self.base_weight()
        dtype = getattr(self.base_layer, "compute_dtype", None) or weight.dtype
        return ops.choose_multi(weight.device, dtype, set(), self.backend)
