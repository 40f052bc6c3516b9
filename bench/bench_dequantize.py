"""dequantize: 4-bit weights of real layers back to 16 bits, against bitsandbytes."""

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import torch

from bench.harness import Case
from peft_fast import ops
from peft_fast.quant import blockwise

SHAPES = {"llama3-8b q_proj 4096x4096": (4096, 4096), "llama3-8b k_proj 1024x4096": (1024, 4096)}


def cases(device: torch.device) -> Iterator[Case]:
    for name, (N, K) in SHAPES.items():
        w = torch.randn(N, K, dtype=torch.bfloat16, device=device) * 0.02
        packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        weight = blockwise.quantize(w)

        def gate(weight=weight) -> None:
            ours = ops.dequantize(weight)
            assert torch.equal(ours, blockwise.dequantize(weight))

        yield Case(
            "dequantize", name, torch.bfloat16, "forward",
            {
                "bitsandbytes": lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state),
                "peft_fast": lambda weight=weight: ops.dequantize(weight),
            },
            gate,
        )  # fmt: skip
