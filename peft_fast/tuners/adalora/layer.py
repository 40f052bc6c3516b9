"""AdaLoRA around linear layers and convolutions: y = base(x) + c * B (E * (A dropout(x))), c = lora_alpha / init_r.

E and c are multiplied into A or B, whichever is smaller: LoRA's op then does the rest, and the gradient of E is a sum
over the rows of that one's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast.dispatch import Choice
from peft_fast.tuners.low_rank import LowRankLinear
from peft_fast.tuners.scaling import ScaledLayer


class AdaLoraLayer(ScaledLayer):
    """lora_A [r, K], lora_E [r, 1], lora_B [N, r] by adapter; `ranknum`: the rank that each had before values were
    dropped, which its scale stays divided by. A layer whose values were all dropped has r = 0."""

    in_features: int
    out_features: int
    adapter_layer_names = ("lora_A", "lora_B", "lora_E")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")

    def make_containers(self) -> None:
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, Any] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_E = nn.ParameterDict()
        self.ranknum = nn.ParameterDict()

    def update_layer(self, adapter_name: str, config: Any, r: int) -> None:
        """Add an adapter, not active yet. The same seed gives the same weights as in peft.

        r: config.init_r, or less where values of a trained adapter were dropped.
        """
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, config.lora_alpha
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.scaling[adapter_name] = self.initial_scale(adapter_name)
        K, N = self.sizes()
        self.lora_A[adapter_name] = nn.Parameter(torch.randn(r, K))
        self.lora_E[adapter_name] = nn.Parameter(torch.randn(r, 1))
        self.lora_B[adapter_name] = nn.Parameter(torch.randn(N, r))
        with torch.device("cpu"):  # it is in no file, and so never on the meta device
            torch.randn(1)  # peft draws it
            self.ranknum[adapter_name] = nn.Parameter(torch.tensor([float(config.init_r)]), requires_grad=False)
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_E[adapter_name])
            nn.init.normal_(self.lora_A[adapter_name], mean=0.0, std=0.02)
            nn.init.normal_(self.lora_B[adapter_name], mean=0.0, std=0.02)
        self.place_adapter(adapter_name)

    def sizes(self) -> tuple[int, int]:
        """(K, N) of the weight as a matrix."""
        return self.in_features, self.out_features

    def initial_scale(self, adapter: str) -> float:
        alpha = self.lora_alpha[adapter]
        return alpha if alpha > 0 else float(self.r[adapter])

    def place_adapter(self, adapter_name: str, keep_dtype: bool = False) -> None:
        super().place_adapter(adapter_name, keep_dtype)
        if adapter_name in self.lora_A and not self.lora_A[adapter_name].is_meta:
            rank = self.ranknum[adapter_name]
            rank.data = rank.data.to(self.lora_A[adapter_name].device)

    def adapters_in_effect(self) -> list[str]:
        return [name for name in super().adapters_in_effect() if self.r[name]]

    def product(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] with the singular values and the scale in one of them."""
        A, B = self.lora_A[name], self.lora_B[name]
        values = self.lora_E[name] * (self.scaling[name] / (self.ranknum[name] + 1e-5))
        return (A * values, B) if A.shape[1] <= B.shape[0] else (A, B * values.t())

    def dropout_of(self, name: str) -> nn.Module:
        return self.lora_dropout._modules[name]  # type: ignore[return-value]

    def why_idle(self) -> str:
        dropped = not self.merged and not self.disable_adapters and any(n in self.r for n in self.active_adapters)
        return "of rank 0: all of its values were dropped" if dropped else super().why_idle()

    def __repr__(self) -> str:
        return f"adalora.{super().__repr__()}"


class SVDLinear(AdaLoraLayer, LowRankLinear):
    """AdaLoRA around torch.nn.Linear, transformers' Conv1D and k-bit linear layers: x [..., K]."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, r: int) -> None:
        super().__init__(base_layer)
        self.make_containers()
        self.update_layer(adapter_name, config, r)


class SVDConv2d(AdaLoraLayer):
    """AdaLoRA around torch.nn.Conv2d: x [batch, in, height, width]. A is a convolution of the base layer's kernel to r
    channels, B one of kernel 1 from these."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, r: int) -> None:
        super().__init__(base_layer)
        base: Any = self.get_base_layer()
        if base.groups > 1:
            raise ValueError(
                f"AdaLoRA cannot adapt a convolution of {base.groups} groups: an adapter mixes channels that the layer "
                "keeps apart. Leave it out with exclude_modules, or use LoRA"
            )
        self.in_features, self.out_features = base.in_channels, base.out_channels
        self.make_containers()
        self.update_layer(adapter_name, config, r)

    def sizes(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        return base.weight[0].numel(), self.out_features

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """[out, in, *kernel] in fp32"""
        A, B = self.product(adapter)
        wide = torch.promote_types(A.dtype, torch.float32)
        return (B.to(wide) @ A.to(wide)).view(self.weight.shape)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        for name in self.adapters_in_effect():
            A, B = self.product(name)
            z = self.dropout_of(name)(x.to(A.dtype))
            s = base._conv_forward(z, A.view(-1, *base.weight.shape[1:]), None)
            y = y + F.conv2d(s, B[..., None, None].to(s.dtype)).to(y.dtype)
        return y

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            return Choice("convolution", "added", "torch's own convolutions compute the base layer, A and B")
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")
