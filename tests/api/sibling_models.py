"""An attention of three layers that share their input, for the tests of their groups."""

import torch
from torch import nn

from peft_fast import LoraConfig, explain, get_peft_model, quantize_linear_layers

K = 32
QKV = ["q", "k", "v"]


class Attention(nn.Module):
    """Three layers of one input. `between` runs after the first of them: what must not go unnoticed happens there."""

    def __init__(self, between=None):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(K, K), nn.Linear(K, 16), nn.Linear(K, 16), nn.Linear(K, K)
        self.between = between

    def forward(self, x):
        q = self.q(x)
        if self.between is not None:
            self.between(self, x)
        k, v = self.k(x), self.v(x)
        return self.out(q * torch.cat([k, v.sin()], dim=-1))


class Plain(Attention):
    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(q * torch.cat([k, v], dim=-1))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x)


def adapted(attention=None, bits=16, **options):
    torch.manual_seed(3)
    block = Block(Attention() if attention is None else attention)
    if bits != 16:
        quantize_linear_layers(block, bits=bits, skip_modules=[])
    config = LoraConfig(**{"r": 4, "target_modules": [*QKV, "out"], "init_lora_weights": False, **options})
    return get_peft_model(block, config)


def attention_of(model):
    return model.base_model.model.attention


def row(model):
    """(route, because) of the group."""
    (found,) = [row for row in explain(model, show=False).rows if row.name.endswith("attention")]
    return found.route, found.because


def results(model, x, run=None):
    """Output and every gradient."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(5)
    y = (model if run is None else run)(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
