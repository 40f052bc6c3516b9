"""LoRA around linear layers whose weight nobody here can read: other libraries' k-bit formats."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor

from peft_fast.dispatch import Choice
from peft_fast.tuners.mixed_batch import one_by_one

from .layer import Linear


class LinearLike(Linear):
    """The layer is called, and what the adapters make of its input is added: y = layer(x) + LoRA(x).

    For a layer of any class that computes a linear map of the last dimension, differentiably in x, and has
    in_features and out_features (or GPTQ's infeatures and outfeatures):

        config._register_custom_module({TheirLinear: LinearLike})

    Adapters are trained, saved, loaded, switched and unloaded as around any other layer. Merging into the format is
    not known, and raises by name. Adapter weights have the layer's `compute_dtype` if it says one, else that of its
    floating-point tensors, else fp32.
    """

    dora_layer = None  # the norm of its rows cannot be known
    starts_from_weight = False

    def _get_name(self) -> str:
        return "Linear"

    def base_weight(self) -> Tensor:
        """Nothing but a dtype and a device."""
        base: Any = self.get_base_layer()
        tensors = list(chain(base.parameters(), base.buffers()))
        dtype = getattr(base, "compute_dtype", None)
        if dtype is None:
            dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
        return torch.empty(0, dtype=dtype, device=tensors[0].device if tensors else None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.mixed_batch is not None:
            return one_by_one(self, x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        return self.plus(y, x.to(y.dtype), self.adapters_in_effect())

    def adapters_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        wanted = self.active_adapters if adapter_names is None else adapter_names
        return self._refuse_to_merge() if set(wanted) & set(self.available_adapters()) else []

    def shifted_base(self, adapter_names: Sequence[str], sign: int = 1) -> NoReturn:
        self._refuse_to_merge()

    def _refuse_to_merge(self) -> NoReturn:
        raise NotImplementedError(
            f"an adapter cannot be merged into a {type(self.get_base_layer()).__name__}: its format is not known here. "
            "Keep it unmerged, or merge it into the unquantised model"
        )

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice("lora_up_add", "added", "the base layer's format is not known: it is called")
        reason = "switched off" if self.disable_adapters else "not active here"
        return Choice("base_layer", "base", f"the adapters are {reason}")
