"""VeRA around linear layers: y = base(x) + b * (B (d * (A dropout(x)))).

A [r, K] and B [N, r] are the beginnings of projections that all layers of a model share; b [N] and d [r] are learned.
Both vectors are multiplied into B, N * r numbers: LoRA's op then does the rest. A is not trained, so that in backward
no product is spent on it, and of the gradient of B, [N, r], those of b and d are sums over its columns and rows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners._buffer_dict import BufferDict
from peft_fast.tuners.low_rank import LowRankLinear


class VeraLayer(LowRankLinear):
    """vera_lambda_b [N], vera_lambda_d [r] by adapter; vera_A, vera_B: the model's, [r, widest K] and [widest N, r]."""

    adds_to_weight = True
    vera_lambda_b: nn.ParameterDict
    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    other_param_names = ("vera_A", "vera_B", "vera_dropout", "r")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, config: Any, vera_A: BufferDict, vera_B: BufferDict
    ) -> None:
        super().__init__(base_layer)
        self.r: dict[str, int] = {}
        self.vera_dropout = nn.ModuleDict()
        self.vera_lambda_b = nn.ParameterDict()
        self.vera_lambda_d = nn.ParameterDict()
        self.vera_A, self.vera_B = vera_A, vera_B
        self.update_layer(adapter_name, config, vera_A, vera_B)

    def update_layer(self, adapter_name: str, config: Any, vera_A: BufferDict, vera_B: BufferDict) -> None:
        """Add an adapter, not active yet. The same seed gives the same weights as in peft."""
        self.r[adapter_name] = config.r
        self.vera_dropout[adapter_name] = nn.Dropout(config.vera_dropout) if config.vera_dropout else nn.Identity()
        b, d = torch.ones(self.out_features), torch.randn(config.r)
        if config.init_weights:
            b, d = torch.zeros_like(b), torch.full_like(d, config.d_initial)
        self.vera_lambda_b[adapter_name] = nn.Parameter(b)
        self.vera_lambda_d[adapter_name] = nn.Parameter(d)
        self.place_adapter(adapter_name)

    def product(self, name: str) -> tuple[Tensor, Tensor]:
        b, d = self.vera_lambda_b[name], self.vera_lambda_d[name]
        A = self.vera_A[name][:, : self.in_features].to(d.device)
        B = self.vera_B[name][: self.out_features].to(d.device)
        return A, b[:, None] * B * d

    def dropout_of(self, name: str) -> nn.Module:
        return self.vera_dropout._modules[name]  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"vera.{super().__repr__()}"


class Linear(VeraLayer):
    """VeRA around torch.nn.Linear, transformers' Conv1D and k-bit linear layers: x [..., K]."""
