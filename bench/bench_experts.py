"""The experts of one mixture with LoRA on both parameters, forward and backward, against peft's on the same weights.

Both run transformers' grouped products; peft adds B A of every expert to its weight first. `base` has no adapter.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import peft_fast
from bench.harness import Case, half_of
from peft_fast.testing import relative_error

RANK = 16
# Of each device: name, hidden, intermediate, experts, experts per token, tokens
SHAPES = {
    "cpu": (("8 experts", 256, 128, 8, 2, 256), ("64 experts", 512, 256, 64, 4, 256)),
    "cuda": (("mixtral-8x7b", 4096, 14336, 8, 2, 4096), ("qwen3-30b-a3b", 2048, 768, 128, 8, 4096)),
}


class Mixture(torch.nn.Module):
    """A model of nothing but experts."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.experts = Qwen3MoeExperts(config)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(x, index, weights)


def adapted(library: Any, base: Any) -> Any:
    torch.manual_seed(0)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = library.LoraConfig(r=RANK, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft: that no module is adapted
        return library.get_peft_model(base, config, autocast_adapter_dtype=False)


def step_of(model: Any, inputs: tuple[torch.Tensor, ...], dy: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> list[torch.Tensor]:
        y = model(*inputs)
        return [y, *torch.autograd.grad(y, [inputs[0], *trained], dy)]

    return step


def cases(device: torch.device) -> Iterator[Case]:
    dtype = half_of(device) if device.type == "cuda" else torch.float32
    for name, hidden, inner, experts, top_k, tokens in SHAPES[device.type]:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts)
        config._experts_implementation = "grouped_mm"
        with device:  # of Mixtral's, 1.4 billion numbers are drawn
            base = Mixture(config).to(dtype).requires_grad_(False)
        x = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
        weights, index = torch.rand(tokens, experts, device=device).softmax(-1).topk(top_k)
        inputs, dy = (x, index, weights.to(dtype)), torch.randn(tokens, hidden, device=device, dtype=dtype)
        runs = {lib.__name__: step_of(adapted(lib, copy.deepcopy(base)), inputs, dy) for lib in (peft, peft_fast)}
        runs["base"] = step_of(base, inputs, dy)

        def gate(runs=runs, dtype=dtype) -> None:
            for theirs, ours in zip(runs["peft"](), runs["peft_fast"](), strict=True):
                assert relative_error(ours, theirs) < 32 * torch.finfo(dtype).eps

        shape = f"{name}, {hidden}x{inner}, top {top_k}, {tokens} tokens, r={RANK}"
        yield Case("experts", shape, dtype, "forward+backward", runs, gate)
