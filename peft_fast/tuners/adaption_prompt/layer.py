"""An attention module that looks at learned tokens too: beside the base model's attention and not in its softmax.

    y = attention(x) + gate * softmax(q K^T / sqrt(d)) V, through the output projection where the model is no GPT-2

q are the queries of x, computed again as the module does not give them; K and V are what the module's own projections
make of the learned tokens, without positions.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast.dispatch import Choice
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.tuners.base_weight import base_weight
from peft_fast.tuners.layer import BaseTunerLayer


class AttentionWithPrompt(BaseTunerLayer):
    """adaption_prompt: {adapter: tokens [1, adapter_len, hidden_size]}; adaption_gate: {adapter: [1]}, 0 at first."""

    adapter_layer_names = ("adaption_prompt", "adaption_gate")
    first: ClassVar[str]  # the projection that says dtype and device
    needed: ClassVar[tuple[str, ...]]  # what an attention module has to have

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any) -> None:
        super().__init__(base_layer)
        self.adaption_prompt = nn.ParameterDict()
        self.adaption_gate = nn.ParameterDict()
        self.update_layer(adapter_name, config=config)

    def update_layer(self, adapter_name: str, *, config: Any) -> None:
        """Add an adapter, not active yet. The same seed gives the same weights as in peft."""
        base: Any = self.get_base_layer()
        weight = self.base_weight()
        dtype = torch.float32 if isinstance(weight, QuantizedWeight) else weight.dtype
        tokens = torch.empty(1, config.adapter_len, base.config.hidden_size, dtype=dtype).normal_()
        self.adaption_prompt[adapter_name] = nn.Parameter(tokens)
        self.adaption_gate[adapter_name] = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.place_adapter(adapter_name, keep_dtype=True)

    def base_weight(self) -> Tensor | QuantizedWeight:
        return base_weight(getattr(self.get_base_layer(), self.first))

    @property
    def bias(self) -> Tensor | None:
        return None

    def check_set_adapter(self, adapter_names: Sequence[str]) -> None:
        here = [name for name in adapter_names if self.has_adapter(name)]
        if len(here) > 1:
            raise ValueError(f"one adaption prompt can be active at a time, got {here}")

    def adapters_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        raise ValueError(
            "an adaption prompt is no change of a weight, and cannot be merged: keep the adapter, or call unload() for "
            "the base model without it"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self.adapters_in_effect()
        if not names:
            return self.base_layer(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        output, *others = self.base_layer(*args, **kwargs)
        queries = self.queries(hidden, kwargs)
        keys, values = self.keys_and_values(self.adaption_prompt[names[0]])
        scores = queries @ keys.transpose(2, 3).to(queries.dtype) / math.sqrt(queries.shape[-1])
        weights = self.adaption_gate[names[0]] * F.softmax(scores, -1, dtype=torch.float32).to(queries.dtype)
        added = (weights @ values).transpose(1, 2).flatten(2)
        return (output + self.projected(added)).to(queries.dtype), *others

    def queries(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """[batch, heads, tokens, size of a head]"""
        raise NotImplementedError  # each architecture's own

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[1, heads, adapter_len, size of a head], twice."""
        raise NotImplementedError

    def projected(self, added: Tensor) -> Tensor:
        return added

    def heads(self, projected: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        return projected.unflatten(-1, (-1, base.head_dim)).transpose(1, 2)

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice("attention", "added", "the attention is called, and what learned tokens add comes on top")
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")

    def __repr__(self) -> str:
        return f"adaption_prompt.{super().__repr__()}"


class AdaptedAttention(AttentionWithPrompt):
    """Around the attention of Llama and Mistral."""

    first = "q_proj"
    needed = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "config")

    def queries(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        base: Any = self.get_base_layer()
        queries = self.heads(base.q_proj(hidden))
        cos, sin = (table.unsqueeze(1) for table in kwargs["position_embeddings"])
        first, second = queries.chunk(2, dim=-1)
        return queries * cos + torch.cat((-second, first), dim=-1) * sin

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        base: Any = self.get_base_layer()
        keys, values = self.heads(base.k_proj(tokens)), self.heads(base.v_proj(tokens))
        shared_by = base.config.num_attention_heads // keys.shape[1]
        return keys.repeat_interleave(shared_by, dim=1), values.repeat_interleave(shared_by, dim=1)

    def projected(self, added: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        return base.o_proj(added)


class AdaptedAttentionGPT(AttentionWithPrompt):
    """Around the attention of GPT-2, where what is added does not go through the output projection, as in peft."""

    first = "c_attn"
    needed = ("c_attn", "head_dim", "split_size", "config")

    def queries(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        base: Any = self.get_base_layer()
        return self.heads(base.c_attn(hidden).split(base.split_size, dim=2)[0])

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        base: Any = self.get_base_layer()
        _, keys, values = base.c_attn(tokens).split(base.split_size, dim=2)
        return self.heads(keys), self.heads(values)
