"""MLPs with adapters for the tests: the one that is meant, and look-alikes that compute something else."""

import bitsandbytes
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from peft_fast import LoraConfig, explain, get_peft_model, set_lora_mlp

K, N = 64, 128
TARGETS = ["gate_proj", "up_proj", "down_proj"]


class Gated(nn.Module):
    """Somebody's own MLP, with the forward that is meant."""

    def __init__(self, act=None, bias=True, dtype=torch.float32):
        super().__init__()
        self.gate_proj = nn.Linear(K, N, bias, dtype=dtype)
        self.up_proj = nn.Linear(K, N, bias, dtype=dtype)
        self.down_proj = nn.Linear(N, K, bias, dtype=dtype)
        self.act_fn = nn.SiLU() if act is None else act

    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class Inherits(Gated):
    pass


class Scaled(Gated):
    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)) * 2


class Swapped(Gated):
    """The other one through the activation: the same instructions on other names."""

    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.up_proj(hidden)) * self.gate_proj(hidden))


class Dropping(Gated):
    def forward(self, hidden):
        h = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(F.dropout(h, 0.5, self.training))


class Calling(Gated):
    def __call__(self, hidden):
        return 2 * super().__call__(hidden)


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x)


def adapted(mlp=None, trained=True, **options):
    """A model around an MLP whose adapters do something."""
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS, **options})
    model = get_peft_model(Block(Gated() if mlp is None else mlp), config)
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return model


def mlp_of(model):
    return model.base_model.model.mlp


def row(model):
    """(route, because) of the first MLP."""
    (found, *_) = [row for row in explain(model, show=False).rows if row.name.endswith("mlp")]
    return found.route, found.because


def results(model, x, mode=None, seed=5):
    """Output and every gradient, in this mode."""
    if mode:
        set_lora_mlp(model, mode)
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def four_bit(mlp, dtype=torch.float32):
    for name in TARGETS:
        linear = getattr(mlp, name)
        has_bias = linear.bias is not None
        layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, has_bias, compute_dtype=dtype)
        layer.load_state_dict(linear.state_dict())
        setattr(mlp, name, layer.to("cpu"))
    return mlp
