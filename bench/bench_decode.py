"""One adapted linear layer as generation calls it: a token or a few, no gradients; against peft's layer."""

from collections.abc import Callable, Iterator

import peft
import torch
from torch import nn

import peft_fast
from bench.bench_lora_linear import base_of, layer_of
from bench.harness import Case, half_of
from peft_fast.testing import relative_error

SHAPES = {"cpu": {"llama-1b 2048x2048": 2048}, "cuda": {"llama3-8b q_proj 4096x4096": 4096}}


def _generate(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def cases(device: torch.device) -> Iterator[Case]:
    dtype = half_of(device)
    for name, width in SHAPES[device.type].items():
        for kind in ("dense", "nf4"):
            for M in (1, 4, 8):
                x = torch.randn(M, width, device=device, dtype=dtype)
                runs = {}
                for library in (peft, peft_fast):
                    model = layer_of(library, base_of(width, width, kind, device, dtype), 16, 0.0).to(dtype)
                    # In eval mode on some CPUs bitsandbytes repacks peft's weight, rounding its scales: another weight.
                    runs[library.__name__] = _generate(model.train(device.type == "cpu"), x)

                def gate(runs=runs, dtype=dtype) -> None:
                    ours, theirs = runs["peft_fast"](), runs["peft"]()
                    assert relative_error(ours, theirs) < 16 * torch.finfo(dtype).eps

                yield Case("decode", f"{name} M={M} r=16 {kind}", dtype, "inference", runs, gate)
