"""The methods that test_tuner_types_b.py goes through, a row each, and the model for them."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass
class Method:
    """layers: names in Every that it adapts. variants: options to be tried on each. bits: k-bit bases it is for."""

    name: str
    prefix: str
    layers: list[str]
    options: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    refused: list[str]
    bits: tuple[int, ...] = ()
    bad: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    precise: float = 1e-4  # gradients, as peft rounds elsewhere
    like_the_base: dict[str, Any] | None = field(default_factory=dict)  # options with which nothing changes at first

    def config(self, library, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(library, f"{self.name}Config")(**{**self.options, **options})


METHODS = [
    Method(
        "OFT",
        "oft_",
        ["linear", "whole", "pointwise", "table"],
        {"oft_block_size": 4, "init_weights": False},
        {
            "neumann": {},
            "neumann3": {"num_cayley_neumann_terms": 3},
            "neumann2": {"num_cayley_neumann_terms": 2},
            "neumann8": {"num_cayley_neumann_terms": 8},
            "cayley": {"use_cayley_neumann": False},
            "shared": {"block_share": True},
            "coft": {"coft": True, "eps": 1.0},
            "coft_shared": {"coft": True, "eps": 0.5, "block_share": True, "use_cayley_neumann": False},
            "r": {"r": 2, "oft_block_size": 0},
            "adjusted": {"oft_block_size": 5},
            "plain": {"init_weights": True},
        },
        ["conv1d", "sequence", "grouped"],
        (4, 8),
        {
            "r": ({"r": 2}, "one of r, the number of blocks, and oft_block_size"),
            "neither": ({"oft_block_size": 0}, "one of r, the number of blocks, and oft_block_size"),
            "negative": ({"oft_block_size": -4}, "oft_block_size must be an integer from 0 on"),
            "terms": ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms must be a positive integer"),
            "eps": ({"eps": float("nan")}, "eps must be a finite number"),
            "dropout": ({"module_dropout": 2}, "module_dropout must be a probability"),
            "bias": ({"bias": "lora_only"}, "bias must be one of 'none', 'all', 'oft_only'"),
        },
        like_the_base={"init_weights": True},
    ),
    Method(
        "HRA",
        "hra_",
        ["linear", "whole", "pointwise"],
        {"r": 4},
        {
            "pairs": {},
            "odd": {"r": 3},
            "drawn": {"init_weights": False},
            "orthogonal": {"init_weights": False, "apply_GS": True},
        },
        ["conv1d", "sequence", "grouped", "table"],
        (),
        {
            "r": ({"r": 0}, "r must be a positive integer"),
            "apply_GS": ({"apply_GS": 1}, "apply_GS must be True or False"),
            "bias": ({"bias": "x"}, "bias must be one of 'none', 'all', 'hra_only'"),
            "expression": ({"target_modules": "x", "layers_to_transform": 1}, "needs target_modules as a list"),
        },
    ),
    Method(
        "BOFT",
        "boft_",
        ["linear", "whole", "pointwise"],
        {"boft_block_size": 4, "init_weights": False},
        {"drawn": {}, "number": {"boft_block_size": 0, "boft_block_num": 2}, "plain": {"init_weights": True}},
        ["conv1d", "sequence", "grouped", "table"],
        (4, 8),
        {
            "both": ({"boft_block_num": 2}, "one of boft_block_size and boft_block_num"),
            "neither": ({"boft_block_size": 0}, "one of boft_block_size and boft_block_num"),
            "factor": ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor must be a positive integer"),
            "dropout": ({"boft_dropout": 2}, "boft_dropout must be a probability"),
            "bias": ({"bias": "x"}, "bias must be one of 'none', 'all', 'boft_only'"),
        },
        like_the_base={"init_weights": True},
    ),
    Method(
        "RandLora",
        "randlora_",
        ["linear", "conv1d"],
        {"r": 3, "randlora_alpha": 12},
        {
            "dense": {},
            "drawn": {"init_weights": False},
            "sparse": {"sparse": True},
            "very_sparse": {"very_sparse": True},
            "unsaved": {"save_projection": False},
        },
        ["sequence", "pointwise", "grouped", "table"],
        (4, 8),
        {
            "r": ({"r": 0}, "r must be a positive integer"),
            "alpha": ({"randlora_alpha": "x"}, "randlora_alpha must be a finite number"),
            "seed": ({"projection_prng_key": 1.5}, "projection_prng_key must be an integer of 64 bits"),
            "dropout": ({"randlora_dropout": 2}, "randlora_dropout must be a probability"),
            "bias": ({"bias": "x"}, "bias must be one of 'none', 'all', 'randlora_only'"),
        },
    ),
    Method(
        "FourierFT",
        "fourierft_",
        ["linear", "conv1d"],
        {"n_frequency": 20, "scaling": 30.0},
        {
            "drawn": {},
            "zeros": {"init_weights": True},
            "pattern": {"n_frequency_pattern": {"linear": 7}},
            "elsewhere": {"random_loc_seed": 5},
        },
        ["sequence", "pointwise", "grouped", "table"],
        (),
        {
            "n": ({"n_frequency": 0}, "n_frequency must be a positive integer"),
            "pattern": ({"n_frequency_pattern": {"x": 0}}, "must be a positive integer"),
            "seed": ({"random_loc_seed": None}, "random_loc_seed must be an integer of 64 bits"),
            "scaling": ({"scaling": float("inf")}, "scaling must be a finite number"),
            "bias": ({"bias": "x"}, "bias must be one of 'none', 'all', 'fourier_only', 'fourierft_only'"),
            "expression": ({"target_modules": "x", "layers_to_transform": 1}, "needs target_modules as a list"),
        },
        like_the_base={"init_weights": True},
    ),
]


class Every(nn.Module):
    """A layer of every kind; `whole` is a convolution with one patch, as long as its input."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 12)
        self.bare = nn.Linear(12, 8, bias=False)
        self.conv1d = Conv1D(12, 8)
        self.pointwise = nn.Conv2d(12, 8, 1)
        self.whole = nn.Conv2d(8, 6, 2)
        self.grouped = nn.Conv2d(6, 6, 1, groups=2)
        self.sequence = nn.Conv1d(6, 4, 1)
        self.out_proj = nn.MultiheadAttention(4, 1).out_proj  # not called by an attention

    def forward(self, ids):
        x = self.table(ids)
        x = torch.tanh(self.linear(x))
        x = torch.tanh(self.conv1d(self.bare(x)))
        x = torch.tanh(self.pointwise(x.transpose(1, 2).reshape(-1, 12, 2, 2)))
        x = torch.tanh(self.grouped(torch.tanh(self.whole(x))))
        return self.sequence(x.flatten(2))


IDS_IN = torch.randint(0, 10, (3, 4), generator=torch.Generator().manual_seed(1))


def every():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Every()


def shaken(model, prefix, name="default", seed=1, std=0.3):
    """With random weights in place of those that start as zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in sorted(model.named_parameters()):
            if prefix in path and f".{name}" in path:
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std
    return model


def adapted(library, method, model, seed=2, std=0.3, **options):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are adjusted, ...
        model = library.get_peft_model(model, method.config(library, **options))
    return shaken(model, method.prefix, std=std)
