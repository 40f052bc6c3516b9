"""LoRA around an output layer that shares its weight with the input embedding, for ensure_weight_tying."""

from typing import Any

import torch
from torch import Tensor, nn

from .config import LoraConfig
from .embedding import Embedding
from .layer import Linear


class TiedLinear(Linear):
    """Its adapters are those of the embedding, turned round: A is the embedding's B^T and B its A^T, parameters of
    their own, as in peft, in the memory of those. What an optimiser writes to one is in the other.

    peft loses this when the adapter is cast or moved, and so for every model in 16 bits; here it is kept.
    """

    starts_from_weight = False  # its factors are the embedding's

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
        tied_to: Embedding,
    ) -> None:
        self._tied_to = [tied_to]  # in a list, so as not to be a submodule; the adapter is made in super().__init__
        super().__init__(base_layer, adapter_name, config=config, r=r, lora_alpha=lora_alpha)

    def _get_name(self) -> str:
        return "Linear"

    def make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        super().make_factors(adapter_name, r, config)
        if config.ensure_weight_tying and adapter_name in self._tied_to[0].lora_embedding_A:
            for layer, values in zip(self.factors(adapter_name), self._of_embedding(adapter_name)):
                layer.weight = nn.Parameter(values)

    def _of_embedding(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """(A [R, K], B [N, R]) as the embedding has them."""
        embedding = self._tied_to[0]
        A, B = embedding.lora_embedding_A[adapter_name], embedding.lora_embedding_B[adapter_name]
        return B.data.t(), A.data.t()

    def place_adapter(self, adapter_name: str, keep_dtype: bool = False) -> None:
        super().place_adapter(adapter_name, keep_dtype)
        self.tie(adapter_name)

    def tie(self, adapter_name: str) -> None:
        """Use the embedding's memory, where it holds the same values."""
        if adapter_name not in self._tied_to[0].lora_embedding_A:
            return
        for layer, values in zip(self.factors(adapter_name), self._of_embedding(adapter_name)):
            own: Any = layer.weight
            if own.data_ptr() != values.data_ptr() and _same(own.data, values):
                own.data = values

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self.lora_A:
            self.tie(name)
        return self


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.device, one.dtype, one.shape) != (other.device, other.dtype, other.shape) or one.is_meta:
        return False
    return torch.equal(one, other)
