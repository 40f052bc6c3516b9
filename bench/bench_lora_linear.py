"""lora_linear: one adapted layer as a user meets it, forward and backward, against peft's layer on the same base."""

from collections.abc import Callable, Iterator

import bitsandbytes as bnb
import peft
import torch
from torch import nn

import peft_fast
from bench.harness import Case, half_of
from peft_fast.testing import relative_error

# (M, K, N, r); a CPU measures the fallback, on shapes it can do
SHAPES = {
    "cpu": {"tiny M=256 512x512 r=16": (256, 512, 512, 16), "llama-1b M=512 2048x2048 r=16": (512, 2048, 2048, 16)},
    "cuda": {
        f"llama3-8b q_proj M={M} 4096x4096 r=16": (M, 4096, 4096, 16) for M in (1, 512, 4096)
    },
}  # fmt: skip


class OneLayer(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.proj = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def layer_of(library, base: nn.Module, r: int, p: float, **options) -> nn.Module:
    config = library.LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=["proj"], init_lora_weights=False, **options
    )
    torch.manual_seed(0)
    return library.get_peft_model(OneLayer(base), config, autocast_adapter_dtype=False)


def base_of(N: int, K: int, kind: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    dense = nn.Linear(K, N, bias=False, dtype=dtype)
    if kind == "dense":
        return dense.to(device)
    layer = bnb.nn.Linear4bit(K, N, bias=False, quant_type="nf4", compute_dtype=dtype)
    layer.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(device)


def step_of(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> list[torch.Tensor]:
        y = model(x)
        return [y, *torch.autograd.grad(y, [x, *parameters], dy)]

    return run


def cases(device: torch.device) -> Iterator[Case]:
    dtype = half_of(device) if device.type == "cuda" else torch.float32
    for name, (M, K, N, r) in SHAPES[device.type].items():
        for kind in ("dense", "nf4"):
            for p in (0.0, 0.05):
                x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
                dy = torch.randn(M, N, device=device, dtype=dtype)
                runs = {}
                for library in (peft, peft_fast):
                    model = layer_of(library, base_of(N, K, kind, device, dtype), r, p).to(dtype).train()
                    runs[library.__name__] = step_of(model, x, dy)

                def gate(runs=runs, p=p, dtype=dtype) -> None:
                    if p == 0.0:  # with dropout the masks differ by design
                        for ours, theirs in zip(runs["peft_fast"](), runs["peft"]()):
                            assert relative_error(ours, theirs) < 16 * torch.finfo(dtype).eps

                yield Case("lora_linear", f"{name} {kind} p={p}", dtype, "forward+backward", runs, gate)
