"""A few rows of an embedding, or of the output layer that shares its weight, trained in place of the rows themselves.

Each adapter has the rows of some tokens: `trainable_tokens_delta` [tokens, dim], which despite its name, peft's, are
the new values and no differences. The base layer runs as it is, with whatever hooks and scales it has, and what belongs
to those tokens is then written over: no copy of the table, and no gradient of its size, is ever made.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast.dispatch import Choice
from peft_fast.tuners._buffer_dict import BufferDict
from peft_fast.tuners.base_weight import is_dense_linear, quantized_weight, why_not_embedding
from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.mixed_batch import one_by_one
from peft_fast.tuners.offload import onloaded


class TrainableTokensLayer(BaseTunerLayer):
    """Around an nn.Embedding or an nn.Linear. `tied_adapter`: the layer whose rows this one shares, of the embedding
    that this output layer has its weight from; it has none of its own then, and a file neither.

    Raises ValueError for other layers and for tokens that the layer has no row for.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        token_indices: Sequence[int],
        init_weights: bool = True,
        tied_adapter: "TrainableTokensLayer | None" = None,
    ) -> None:
        super().__init__(base_layer)
        _check_layer(base_layer)
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]  # in a list, so as not to be a submodule
        self.token_indices: dict[str, list[int]] = {}
        self.trainable_tokens_delta = nn.ParameterDict()
        self.trainable_tokens_original = BufferDict()
        if tied_adapter is not None:
            self.token_indices = tied_adapter.token_indices
            self.trainable_tokens_delta = tied_adapter.trainable_tokens_delta
            self.trainable_tokens_original = tied_adapter.trainable_tokens_original
        self._places: dict[Any, tuple[Tensor, Tensor, int | None]] = {}  # see places
        self.update_layer(adapter_name, token_indices, init_weights)

    @property
    def tied_adapter(self) -> "TrainableTokensLayer | None":
        return self._tied_adapter[0] if self._tied_adapter else None

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.get_base_layer(), nn.Embedding)

    @torch.no_grad()
    def update_layer(self, adapter_name: str, token_indices: Sequence[int], init_weights: bool = True) -> None:
        """Add an adapter, not active yet: its rows are the base layer's, or, without `init_weights`, drawn anew."""
        self._places.clear()
        if self.tied_adapter is not None:
            return
        tokens, weight = list(token_indices), self.weight
        wrong = [token for token in tokens if not 0 <= token < weight.shape[0]]
        if wrong:
            raise ValueError(
                f"the ids of trained tokens must be from 0 to {weight.shape[0] - 1}, for which the layer has rows, got "
                f"{wrong[:5]}: call resize_token_embeddings for tokens that are new"
            )
        with onloaded(self.get_base_layer()):
            weight = self.weight
            original = weight.detach()[torch.tensor(tokens, device=weight.device, dtype=torch.long)]
        rows = original if init_weights else torch.randn(original.shape, dtype=weight.dtype, device=weight.device)
        self.token_indices[adapter_name] = tokens
        self.trainable_tokens_original[adapter_name] = original
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(rows.clone())

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        super().set_adapter([name for name in names if name in self.trainable_tokens_delta], inference_mode)

    def check_set_adapter(self, adapter_names: Sequence[str]) -> None:
        self._check_apart([name for name in adapter_names if name in self.token_indices])

    def _check_apart(self, adapter_names: Sequence[str]) -> None:
        owners: dict[int, str] = {}
        for name in dict.fromkeys(adapter_names):
            for token in set(self.token_indices[name]):
                if token in owners:
                    raise ValueError(
                        f"adapters {owners[token]!r} and {name!r} both have a row of their own for token {token}, and "
                        "rows cannot be summed: take one of them"
                    )
                owners[token] = name

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._places.clear()

    def adapter_state_keys(self, adapter_name: str) -> dict[str, str]:
        return {} if self.tied_adapter is not None else self.own_state_keys(adapter_name)

    def own_state_keys(self, adapter_name: str) -> dict[str, str]:
        """Also of a tied layer: peft writes these, twice, where it saves the embeddings too."""
        return super().adapter_state_keys(adapter_name)

    def adapters_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = super().adapters_to_merge(adapter_names)
        self._check_apart([*(name for name in self.merged_adapters if name in self.token_indices), *names])
        return names

    def shifted_weight(self, weight: Tensor, adapter_names: Sequence[str], sign: int) -> Tensor:
        sources: Any = self.trainable_tokens_delta if sign > 0 else self.trainable_tokens_original
        return self._with_rows(weight, adapter_names, sources)

    def _with_rows(self, weight: Tensor, adapter_names: Sequence[str], sources: Any) -> Tensor:
        if not adapter_names:
            return weight
        tokens, rows, _ = self.places(adapter_names, weight.device)
        values = torch.cat([sources[name].to(weight) for name in adapter_names])
        return weight.index_copy(0, tokens, values[rows])

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        """The whole weight [tokens, dim] with these adapters' rows in it: a copy, differentiable."""
        with onloaded(self.get_base_layer()):
            return self._with_rows(self.weight, active_adapters, self.trainable_tokens_delta)

    def weight_in_effect(self) -> Tensor:
        return self.get_merged_weights(self.adapters_in_effect())

    def places(self, adapter_names: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor, int | None]:
        """(the tokens of these adapters, sorted, [T]; where each has its row among all their rows, [T]; which row is
        the embedding's padding token's, if one is).

        A token that an adapter names twice has two rows, and the last counts, as in peft.
        """
        key = (tuple(adapter_names), device)
        if key not in self._places:
            named = [token for name in adapter_names for token in self.token_indices[name]]
            row_of = {token: row for row, token in enumerate(named)}
            tokens = sorted(row_of)
            rows = [row_of[token] for token in tokens]
            padding: Any = getattr(self.get_base_layer(), "padding_idx", None)
            with torch.inference_mode(False):  # what is made in that mode could not be trained with later
                at = torch.tensor(tokens, device=device), torch.tensor(rows, device=device)
            self._places[key] = (*at, row_of.get(padding))
        return self._places[key]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Of an embedding x: ids [...] -> [..., dim]; of a linear layer [..., dim] -> [..., tokens]."""
        if self.mixed_batch is not None:
            return one_by_one(self, x, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.adapters_in_effect()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if not self.is_embedding:
            return self._with_columns(self.base_layer(x, *args, **kwargs), x, names)
        base: Any = self.get_base_layer()
        if base.max_norm is not None or base.sparse:  # what changes or counts the rows of the table as a whole
            return self._scaled(self._looked_up(x, self.weight_in_effect(), base.padding_idx))
        return self._with_looked_up(self.base_layer(x, *args, **kwargs), x, names)

    def _with_looked_up(self, y: Tensor, ids: Tensor, names: list[str]) -> Tensor:
        """y [..., dim], what the table gives for `ids`, with the rows of the adapters' tokens in place of its own."""
        tokens, rows, padding = self.places(names, ids.device)
        at = torch.searchsorted(tokens, ids.contiguous()).clamp(max=len(tokens) - 1)
        ours = tokens[at] == ids
        table = torch.cat([self.trainable_tokens_delta[name].to(self.weight.dtype) for name in names])
        table = torch.cat([table, table.new_zeros(1, table.shape[1])])  # the last row is every other token's
        found = self._scaled(self._looked_up(torch.where(ours, rows[at], len(table) - 1), table, padding))
        return torch.where(ours.unsqueeze(-1), found.to(y.dtype), y)

    def _looked_up(self, ids: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
        base: Any = self.get_base_layer()
        return F.embedding(
            ids, table, padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse
        )  # fmt: skip

    def _scaled(self, y: Tensor) -> Tensor:
        """The embeddings of Gemma, BART and others multiply what they look up."""
        factor: Any = getattr(self.get_base_layer(), "embed_scale", None)
        if factor is None:
            return y
        return y * (factor.to(y.dtype) if isinstance(factor, Tensor) else factor)

    def _with_columns(self, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """y [..., tokens], the base layer's, with the columns of the adapters' tokens computed from their rows."""
        tokens, rows, _ = self.places(names, y.device)
        table = torch.cat([self.trainable_tokens_delta[name].to(self.weight.dtype) for name in names])[rows]
        with onloaded(self.get_base_layer()):
            bias = None if self.bias is None else self.bias[tokens]
        columns = F.linear(x, table, bias).to(y.dtype)
        if y.is_leaf and y.requires_grad:  # a hook made it so
            return y.index_copy(-1, tokens, columns)
        return y.index_copy_(-1, tokens, columns)

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice("token rows", "added", "the base layer is called: rows of the trained tokens replace its own")
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")


def _check_layer(layer: Any) -> None:
    if isinstance(layer, nn.Linear) and is_dense_linear(layer) and type(layer).forward is nn.Linear.forward:
        reason = None
    elif quantized_weight(layer) is not None:
        reason = "its weight is k-bit"
    elif isinstance(layer, nn.Embedding):
        reason = why_not_embedding(layer)
    else:
        reason = "it is neither a plain Embedding nor a plain Linear"
    if reason is not None:
        raise ValueError(f"single tokens cannot be trained in a {type(layer).__name__}: {reason}")
