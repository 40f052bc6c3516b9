"""Layers that can have DoRA, tiny, each with an adapter of ours or peft's."""

import warnings

import bitsandbytes
import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_fast

from .lora_layer_models import named, relative, shaken

__all__ = ["DENSE", "LAYERS", "adapted", "both", "build", "named", "relative", "shaken"]

K, N = 64, 48
IDS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [2, 2, 3, 3, 0, 9, 10, 1]])
X = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(2))
LAYERS = {
    "linear": (lambda: nn.Linear(K, N), X),
    "no-bias": (lambda: nn.Linear(K, N, bias=False), X),
    "hf-conv1d": (lambda: Conv1D(N, K), X),
    "embedding": (lambda: nn.Embedding(11, N, padding_idx=1), IDS),
    "conv1d": (lambda: nn.Conv1d(4, N, 3, padding=1), IMAGES[:, :, 0]),
    "conv2d": (lambda: nn.Conv2d(4, N, (3, 2), stride=2), IMAGES),
    "conv3d": (lambda: nn.Conv3d(4, N, 2), IMAGES[:, :, None].expand(2, 4, 2, 5, 6)),
    "4bit": (lambda: four_bit(nn.Linear(K, N)), X),
}
DENSE = [kind for kind in LAYERS if kind != "4bit"]


def four_bit(linear, dtype=torch.float32):
    layer = bitsandbytes.nn.Linear4bit(K, N, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def build(kind):
    make, x = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.ModuleDict({"layer": make()}), x


def adapted(library, kind, dtype=torch.float32, shake=True, **options):
    model, x = build(kind)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], "use_dora": True, **options}
        model = library.get_peft_model(model.to(dtype), library.LoraConfig(**config))
    x = x.to(dtype) if x.is_floating_point() else x
    return (shaken(model) if shake else model), model.base_model.model["layer"], x


def both(kind, use, **options):
    """[ours, peft's] of what `use` makes of a model with its layer and an input."""
    return [use(*adapted(library, kind, **options)) for library in (peft_fast, peft)]
