"""LoRA around torch.nn.Embedding: y = W[ids] + sum over active adapters of scale * A^T[ids] B^T.

A is [r, num_embeddings], B is [embedding_dim, r], as parameters by adapter name: lora_embedding_A, lora_embedding_B.
There is no dropout on ids: lora_dropout has no meaning here, in peft neither.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.dispatch import Choice
from peft_fast.tuners.base_weight import why_not_embedding
from peft_fast.tuners.mixed_batch import one_by_one

from . import dora
from .config import LoraConfig
from .constants import WithConstants
from .scales import folded


class Embedding(WithConstants):
    """`embed_scale`: the embeddings of Gemma, BART and others multiply what they look up, and so the adapter's part."""

    dora_layer = dora.DoraEmbeddingLayer
    out_dim = 1

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: LoraConfig, r: int, lora_alpha: float):
        super().__init__(base_layer)
        base: Any = self.get_base_layer()
        if reason := why_not_embedding(base):
            raise ValueError(f"LoRA cannot adapt this {type(base).__name__}: {reason}")
        self.in_features: int = base.num_embeddings
        self.out_features: int = base.embedding_dim
        self.fan_in_fan_out = config.fan_in_fan_out
        self.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ValueError("lora_bias is not for embeddings, whose B is no layer: leave them out of target_modules")
        if config.lora_dropout:
            warnings.warn("lora_dropout has no effect on embeddings, whose input are ids, as in peft", stacklevel=2)
        super().update_layer(adapter_name, r, lora_alpha, config)

    def make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        self.lora_embedding_A[adapter_name] = nn.Parameter(torch.randn(r, self.in_features))
        self.lora_embedding_B[adapter_name] = nn.Parameter(torch.randn(self.out_features, r))

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """A zero and B normal, "gaussian" or not; False leaves both normal."""
        if init_lora_weights is not False:
            nn.init.zeros_(self.lora_embedding_A[adapter_name])
            nn.init.normal_(self.lora_embedding_B[adapter_name])

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """[num_embeddings, embedding_dim]"""
        A, B = self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        wide = torch.promote_types(A.dtype, torch.float32)
        return self.scaling[adapter] * (B.to(wide) @ A.to(wide)).t()

    def dora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x, ids: [...] -> [..., embedding_dim] in the table's dtype."""
        if self.mixed_batch is not None:
            return one_by_one(self, x, *args, **kwargs)
        ids = x
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters, base = self.adapters_in_effect(), self.base_layer
        weight = None if args or kwargs or not adapters else lookup_weight(base)
        if weight is not None and adapters[0] in self.lora_magnitude_vector:
            weight = None
        if weight is None:
            return self._add(self.base_layer(ids, *args, **kwargs), ids, adapters)
        first = adapters[0]
        A, (B, scale) = self.lora_embedding_A[first], folded(self.lora_embedding_B[first], self.scaling[first])
        padding_idx: Any = base.padding_idx
        y = ops.lora_embedding(
            ids, weight, A, B, scale, padding_idx=padding_idx, backend=self.backend
        )  # fmt: skip
        return self._add(y, ids, adapters[1:])

    def _add(self, y: Tensor, ids: Tensor, names: list[str]) -> Tensor:
        base: Any = self.get_base_layer()
        for name in names:
            A, (B, scale) = self.lora_embedding_A[name], folded(self.lora_embedding_B[name], self.scaling[name])
            factor = getattr(base, "embed_scale", None)
            if factor is not None:
                B = B * (factor.to(B.dtype) if isinstance(factor, Tensor) else factor)
            if base.max_norm is None and not base.scale_grad_by_freq and not base.sparse:
                y = ops.lora_embedding_add(
                    y, ids, A, B, scale, padding_idx=base.padding_idx, backend=self.backend
                )  # fmt: skip
            else:  # torch has these rules, and so have peft's adapters
                s = nn.functional.embedding(
                    ids, A.t(), base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse
                )
                y = y + (scale * s @ B.t()).to(y.dtype)
            if name in self.lora_magnitude_vector:
                y = ops.scale_columns(y, dora.factor(self, name), backend=self.backend)
        return y

    def route(self, tokens: int) -> Choice:
        if not self.adapters_in_effect():
            reason = self.why_idle()
            return Choice("base_layer", "base", f"the adapters are {reason}")
        weight = lookup_weight(self.base_layer)
        if weight is None:
            return Choice("lora_embedding_add", "added", "the base layer is called: it does more than looking up")
        return ops.choose_embedding(weight, self.backend)


def lookup_weight(layer: Any) -> Tensor | None:
    """The table where looking up in it may replace calling the layer, else None: it has hooks, a forward of its own, or
    an option that changes the table or its gradients in the lookup."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks) or "forward" in vars(layer) or type(layer).forward is not nn.Embedding.forward:
        return None
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        return None
    return layer.weight
