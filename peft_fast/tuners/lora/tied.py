"""LoRA around an output layer that shares its weight with the input embedding, for ensure_weight_tying."""

from collections.abc import Sequence
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
    Where the two share their weight, merging writes to it once, by the embedding; peft adds the change twice.
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
        self._merged_there: list[str] = []  # by the embedding, into the weight of both
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

    def follows(self, adapter_name: str) -> bool:
        """Whether merging the adapter into the embedding's weight merges it here too: one weight, and one change."""
        embedding = self._tied_to[0]
        if self.weight is not embedding.weight or adapter_name not in embedding.lora_embedding_A:
            return False
        if self.use_dora[adapter_name] or self.scaling[adapter_name] != embedding.scaling[adapter_name]:
            return False
        return all(_same(f.weight, v) for f, v in zip(self.factors(adapter_name), self._of_embedding(adapter_name)))

    @torch.no_grad()
    def add_to_base(self, adapter_names: Sequence[str], undoable: bool = True) -> None:
        there = [name for name in adapter_names if self.follows(name)]
        if there:
            self._tied_to[0].add_to_base(there, undoable)
            self.merged_adapters += there
            self._merged_there += there
        super().add_to_base([name for name in adapter_names if name not in there], undoable)

    def unmerge(self) -> None:
        """Of what the embedding has merged, nothing is left to do here."""
        if self._merged_there:
            self.merged_adapters[:] = [name for name in self.merged_adapters if name not in self._merged_there]
            self._merged_there.clear()
            if not self.merged:
                return
        super().unmerge()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self.lora_A:
            self.tie(name)
        return self


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.device, one.dtype, one.shape) != (other.device, other.dtype, other.shape) or one.is_meta:
        return False
    return torch.equal(one, other)
