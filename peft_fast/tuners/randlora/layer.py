"""RandLoRA around linear layers: two products through all bases at once."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast.tuners.shared_tensors import SharingLayer


class RandLoraLayer(SharingLayer):
    """randlora_lambda [r, bases], randlora_gamma [bases, smaller size] by adapter; randlora_A, randlora_B: the model's,
    [r, 1, smallest] and [largest, bases, r]."""

    randlora_lambda: nn.ParameterDict
    randlora_gamma: nn.ParameterDict
    randlora_dropout: dict[str, float]
    scaling: dict[str, float]
    method = "randlora"
    shared = ("randlora_A", "randlora_B")
    adapter_layer_names = ("randlora_lambda", "randlora_gamma")
    other_param_names = (*shared, "randlora_dropout", "r", "scaling")

    def make_weights(self, adapter_name: str, config: Any, **options: Any) -> None:
        smaller, larger = sorted(self.weight_shape())
        count = -(-smaller // config.r)
        lambda_, gamma = torch.randn(config.r, count), torch.ones(count, smaller) / larger
        if config.init_weights:
            lambda_, gamma = torch.zeros_like(lambda_), torch.full_like(gamma, 1 / max(gamma.shape))
        self.randlora_lambda[adapter_name], self.randlora_gamma[adapter_name] = map(nn.Parameter, (lambda_, gamma))
        numbers = {"r": config.r, "randlora_dropout": config.randlora_dropout}
        for name, value in {**numbers, "scaling": config.randlora_alpha / config.r}.items():
            getattr(self, name)[adapter_name] = value

    def product(self, name: str) -> tuple[Tensor, Tensor]:
        """[ranks, in] and [out, ranks], without the scale: what is learned is always on the smaller side."""
        lambda_, gamma = self.randlora_lambda[name], self.randlora_gamma[name]
        A, B = (getattr(self, of_model)[name].to(gamma.device) for of_model in self.shared)
        smaller, larger = sorted(self.weight_shape())
        small = (lambda_[:, :, None] * A[..., :smaller] * gamma).flatten(0, 1)
        large = B[:larger, : len(gamma)].flatten(1).to(gamma.dtype)
        return (small, large) if self.weight_shape()[1] == smaller else (large.T, small.T)


class Linear(RandLoraLayer):
    """RandLoRA around torch.nn.Linear, transformers' Conv1D and k-bit linear layers: x [..., in]."""

    def delta(self, name: str) -> Tensor:
        first, second = self.product(name)
        return self.scaling[name] * (second @ first)

    def change(self, name: str, x: Tensor) -> Tensor:
        first, second = self.product(name)
        x = F.dropout(self.cast(x, first.dtype), self.randlora_dropout[name], self.training)
        return self.scaling[name] * F.linear(F.linear(x, first), second)
