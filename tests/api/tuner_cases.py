"""The methods that test_tuners.py goes through, a row each, and the models for them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

LLAMA = ("q_proj", "v_proj", "down_proj")


@dataclass(frozen=True)
class Method:
    name: str  # its config is <name>Config
    prefix: str  # in the names of its parameters
    kinds: tuple[str, ...]  # the layers of Kinds that it adapts in peft, too
    options: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ({},)  # further options, for Kinds
    llama: dict[str, Any] = field(default_factory=lambda: {"target_modules": list(LLAMA)})
    gpt2: dict[str, Any] | None = None  # None: no Conv1D
    kbit: bool = False  # whether peft has it on k-bit layers
    other: dict[str, Any] = field(default_factory=dict)  # how a second adapter of llama's differs
    together: bool = True  # whether two adapters can be active together
    linear: bool = True  # whether the rows of llama are linear layers
    default_targets: bool = True  # whether it has targets of its own for a model type
    bert: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["query", "value"]})
    t5: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["q", "v"]})


CONVOLUTIONS = ("conv2", "one", "grouped", "conv1")
METHODS = [
    Method(
        "LoHa",
        "hada_",
        (*CONVOLUTIONS, "linear"),
        {"r": 3, "alpha": 5},
        ({}, {"init_weights": False}, {"rank_pattern": {"linear": 2}}),
        other={"r": 2},
    ),
    Method(
        "IA3",
        "ia3_",
        ("conv3", "conv2", "one", "grouped", "linear", "gpt"),
        {"feedforward_modules": []},
        ({}, {"init_ia3_weights": False}, {"feedforward_modules": ["conv3", "one", "grouped", "linear"]}),
        {"target_modules": list(LLAMA), "feedforward_modules": ["down_proj"]},
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
        kbit=True,
    ),
    Method(
        "Vera",
        "vera_lambda_",
        ("linear", "gpt"),
        {"r": 4},
        ({}, {"init_weights": False, "projection_prng_key": 7}, {"bias": "vera_only"}),
        gpt2={"target_modules": ["c_attn", "mlp.c_proj"]},
        kbit=True,
    ),
    Method(
        "AdaLora",
        "lora_",
        ("conv2", "one", "linear", "gpt"),
        {"init_r": 4, "target_r": 2, "total_step": 10},
        ({}, {"init_lora_weights": False, "lora_alpha": 3}),
        gpt2={"target_modules": ["c_attn", "mlp.c_proj"]},
        kbit=True,
        other={"inference_mode": True, "init_r": 2},
    ),
    Method(
        "LoKr",
        "lokr_",
        (*CONVOLUTIONS, "linear"),
        {"r": 1, "alpha": 3},
        (
            {},
            {"init_weights": "lycoris", "r": 8},
            {"init_weights": False, "use_effective_conv2d": True, "r": 2, "decompose_factor": 1},
            {"decompose_both": True, "decompose_factor": 4, "rank_pattern": {"linear": 2}},
        ),
        other={"r": 2, "decompose_factor": 4},
    ),
    Method(
        "LNTuning",
        "ln_tuning_",
        ("norm", "linear", "conv1"),
        llama={},
        kbit=True,
        together=False,
        linear=False,
        bert={"target_modules": ["LayerNorm"]},
        t5={},
    ),
    Method(
        "TrainableTokens",
        "trainable_tokens_",
        ("table",),
        {"token_indices": [1, 3]},
        ({}, {"init_weights": False}, {"token_indices": [4, 0]}),
        llama={"token_indices": list(range(1, 20))},
        other={"token_indices": list(range(20, 40))},
        kbit=True,
        linear=False,
        bert={"token_indices": list(range(1, 20))},
        t5={"token_indices": list(range(1, 20))},
    ),
    Method(
        "Shira",
        "shira_",
        ("linear",),
        {"r": 2},
        ({}, {"init_weights": False, "random_seed": 3}),
        other={"random_seed": 5, "r": 3},
        kbit=True,
    ),
]
BY_NAME = {method.name: method for method in METHODS}


class Kinds(nn.Module):
    """A layer of every kind: [2, 4, 8, 8] -> [2, 14, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv3d(1, 1, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.one = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.conv1 = nn.Conv1d(8, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 5)
        self.gpt = Conv1D(7, 5)
        self.table = nn.Embedding(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv3(x[:, None])[:, 0]
        x = self.grouped(self.one(self.conv2(x).relu()).relu()).flatten(2)
        y = self.gpt(self.linear(self.norm(self.conv1(x).transpose(1, 2))))
        return y + self.table(torch.arange(y.shape[1]) % 5)


def kinds() -> Kinds:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Kinds()
        nn.init.normal_(model.norm.bias, std=0.1)
        return model


def image() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def config(library: Any, method: Method, **options: Any) -> Any:
    return getattr(library, f"{method.name}Config")(**{**method.options, **options})


def shaken(model: nn.Module, prefix: str, name: str = "default", std: float = 0.2) -> nn.Module:
    """With random weights in place of those that start as zeros or ones: the same ones in both libraries."""
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if prefix in path and name in path.split(".") and parameter.requires_grad | (name != "default"):
                generator = torch.Generator().manual_seed(len(path) + sum(map(ord, path)))
                parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def adapted(library: Any, base: nn.Module, method: Method, seed: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return shaken(library.get_peft_model(base, config(library, method, **options)), method.prefix)
