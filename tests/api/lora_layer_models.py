"""Layers that are no nn.Linear, tiny, each in a model with an adapter of ours or peft's."""

import warnings

import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

IDS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [2, 2, 3, 3, 0, 9, 10, 1]])
ROWS = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2))
VOLUMES = torch.randn(2, 2, 3, 4, 6, generator=torch.Generator().manual_seed(3))
LAYERS = {
    "embedding": (lambda: nn.Embedding(11, 6), IDS),
    "embedding-padding": (lambda: nn.Embedding(11, 6, padding_idx=2), IDS),
    "embedding-by-frequency": (lambda: nn.Embedding(11, 6, scale_grad_by_freq=True), IDS),
    "embedding-scaled": (lambda: Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=6**0.5), IDS),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, stride=2, padding=1), ROWS),
    "conv1d-same": (lambda: nn.Conv1d(8, 6, 3, padding="same", bias=False), ROWS),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), IMAGES),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1), IMAGES),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, padding=1), VOLUMES),
    "hf-conv1d": (lambda: Conv1D(6, 6), ROWS),
    "attention": (lambda: Attention(6, 2, batch_first=True), ROWS),
}
UNMERGEABLE = {"conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGES)}
WITH_BIAS = ["conv1d", "conv2d", "conv3d", "hf-conv1d"]


class Attention(nn.MultiheadAttention):
    """With one input, and one output."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, x, x, *args, **kwargs)


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.last = layer, nn.Linear(6, 2)

    def forward(self, x):
        y = self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.last(y.transpose(1, -1) if y.shape[-1] != 6 else y)


def build(kind):
    make, x = {**LAYERS, **UNMERGEABLE}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Model(make())
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model, x


def adapted(library, kind, seed=5, dtype=torch.float32, shake=True, **options):
    model, x = build(kind)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both set fan_in_fan_out
        config = library.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["layer"], **options})
        model = library.get_peft_model(model.to(dtype), config)
    return (shaken(model) if shake else model), x.to(dtype) if x.is_floating_point() else x


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data += (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item()


def named(model):
    return dict(sorted(model.named_parameters()))
