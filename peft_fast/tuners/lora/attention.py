"""LoRA around torch.nn.MultiheadAttention: on its in_proj_weight [3 E, E] and on the weight of its out_proj.

torch's attention multiplies by both without calling a layer, so the adapters are added to the weights for the time of
a forward, and the sums are under autograd. What is in the module is not written to: the parameters are exchanged, and
put back, where peft adds and subtracts, and rounds, in every forward.

One thing is as in peft 0.21.2 because its adapters are trained with it: what an adapter changes in out_proj's weight is
counted twice in the forward, and once in the gradients.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.dispatch import Choice

from . import dora
from .config import LoraConfig
from .layer import Linear, LoraLayer


class OutProjection(Linear):
    """The out_proj of an attention, which reads its weight and its bias and never calls it: so it is in the weight that
    the adapters are."""

    why_not_mixed = "torch reads its weight, with the adapters in it, and calls no layer"

    dora_layer = None

    def _get_name(self) -> str:
        return "Linear"

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        for name in self.adapters_in_effect():
            delta = differentiable_delta(self, name).to(weight.dtype)
            weight = weight + (delta + delta.detach())
        return weight

    def shifted_weight(self, weight: Tensor, adapter_names: Sequence[str], sign: int) -> Tensor:
        for name in adapter_names:
            weight = weight + 2 * sign * self.get_delta_weight(name)
        return weight

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice("out_proj", "added", "torch.nn.MultiheadAttention reads the weight: adapters are added to it")
        return super().route(tokens)


class EncoderLinear(Linear):
    """linear1 or linear2 of a torch.nn.TransformerEncoderLayer, whose fast path (in eval mode, where no gradient is
    wanted) reads their weights and calls neither. So the adapters are in what it reads; else the layer is called."""

    why_not_mixed = "torch reads its weight, with the adapters in it, and calls no layer"

    def _get_name(self) -> str:
        return "Linear"

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        for name in self.adapters_in_effect():
            weight = weight + differentiable_delta(self, name).to(weight.dtype)
            if name in self.lora_magnitude_vector:
                weight = (weight * dora.factor(self, name)[:, None]).to(weight.dtype)
        return weight

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ValueError(
                "lora_bias is not for linear1 and linear2 of torch.nn.TransformerEncoderLayer, whose fast path reads "
                "the base layer's bias: leave it out"
            )
        super().update_layer(adapter_name, r, lora_alpha, config)


class MultiheadAttention(LoraLayer):
    """Adapts in_proj and out_proj together. kdim and vdim must be embed_dim. lora_dropout has no effect, as in peft."""

    weight_name = "in_proj_weight"
    why_not_mixed = "torch reads its weight, with the adapters in it, and calls no layer"

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: LoraConfig, r: int, lora_alpha: float):
        super().__init__(base_layer)
        base: Any = self.get_base_layer()
        if not base._qkv_same_embed_dim:
            raise ValueError("LoRA adapts torch.nn.MultiheadAttention only where kdim and vdim are embed_dim")
        self.in_features: int = base.embed_dim
        self.out_features: int = 3 * base.embed_dim
        _check_config(config)
        base.out_proj = OutProjection(base.out_proj, adapter_name, config=config, r=r, lora_alpha=lora_alpha)
        super().update_layer(adapter_name, r, lora_alpha, config)
        # peft draws out_proj's weights a second time here: the same seed is to give the same ones.
        base.out_proj.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig) -> None:
        _check_config(config)
        super().update_layer(adapter_name, r, lora_alpha, config)
        self._out_proj.update_layer(adapter_name, r, lora_alpha, config)

    def make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=False)

    @property
    def _out_proj(self) -> OutProjection:
        return self.get_base_layer().out_proj  # type: ignore[return-value]

    @property
    def in_proj_weight(self) -> Tensor:
        """With the adapters in effect: torch.nn.TransformerEncoderLayer's fast path reads it instead of calling us."""
        weight: Tensor = self.get_base_layer().in_proj_weight  # type: ignore[assignment]
        for name in self.adapters_in_effect():
            weight = weight + differentiable_delta(self, name).to(weight.dtype)
        return weight

    @property
    def weight(self) -> Tensor:
        return self.get_base_layer().in_proj_weight  # type: ignore[return-value]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Of in_proj_weight: [3 E, E]."""
        with torch.no_grad():
            A, B = self.factors(adapter)
            wide = torch.promote_types(A.weight.dtype, torch.float32)
            return self.scaling[adapter] * (B.weight.to(wide) @ A.weight.to(wide))

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        if safe_merge and (problem := self._out_proj.merge_problem(self._out_proj.adapters_to_merge(adapter_names))):
            raise ValueError(problem)
        super().merge(safe_merge, adapter_names)
        self._out_proj.merge(False, adapter_names)

    def unmerge(self) -> None:
        super().unmerge()
        if self._out_proj.merged:
            self._out_proj.unmerge()

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.disable_adapters and self.merged:
            self.unmerge()
        weights = {"in_proj_weight": self.in_proj_weight} if self.adapters_in_effect() else {}
        out = torch.func.functional_call(self.base_layer, weights, (query, *args), kwargs)
        return tuple(None if tensor is None else tensor.to(query.dtype) for tensor in out)  # type: ignore[return-value]

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            because = "torch.nn.MultiheadAttention reads its weights: the adapters are added to them for each forward"
            return Choice("attention", "added", because)
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")

    def __getattr__(self, name: str) -> Any:
        """What transformer layers ask of their attention: num_heads, batch_first, in_proj_bias, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self._modules:  # being unpickled or copied
                raise
            return getattr(self.get_base_layer(), name)


def differentiable_delta(layer: LoraLayer, adapter_name: str) -> Tensor:
    A, B = layer.factors(adapter_name)
    wide = torch.promote_types(A.weight.dtype, torch.float32)
    with torch.autocast(A.weight.device.type, enabled=False):
        return layer.scaling[adapter_name] * (B.weight.to(wide) @ A.weight.to(wide))


def _check_config(config: LoraConfig) -> None:
    if config.lora_bias:
        raise ValueError("lora_bias is not for torch.nn.MultiheadAttention, which calls no B: leave it out")
    if config.use_dora:
        raise ValueError("use_dora is not for torch.nn.MultiheadAttention (nor is it in peft): leave it out")
    if config.lora_dropout:
        warnings.warn("lora_dropout has no effect on torch.nn.MultiheadAttention, as in peft", stacklevel=2)
