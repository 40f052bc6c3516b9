"""dequantize: k-bit weights of real layers back to 16 bits, against bitsandbytes and a copy of as many bytes."""

from collections.abc import Callable, Iterator

import bitsandbytes.functional as bnb
import torch

from bench.harness import Case, half_of
from peft_fast import ops
from peft_fast.kernels import reference
from peft_fast.quant import blockwise, int8
from peft_fast.quant.weight import QuantizedWeight

SHAPES = {"llama3-8b q_proj 4096x4096": (4096, 4096), "llama3-8b k_proj 1024x4096": (1024, 4096)}


def copy_of(weight: QuantizedWeight) -> Callable[[], torch.Tensor]:
    """A copy that reads and writes together as many bytes as dequantising to 16 bits does: the bandwidth there is."""
    N, K = weight.shape
    source = torch.empty((weight.nbytes + 2 * N * K) // 2, dtype=torch.uint8, device=weight.device).fill_(1)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def cases(device: torch.device) -> Iterator[Case]:
    dtype = half_of(device)
    for name, (N, K) in SHAPES.items():
        w = torch.randn(N, K, dtype=dtype, device=device) * 0.02
        packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        codes, scales, _ = bnb.int8_vectorwise_quant(w.half())
        for kind, weight in (("nf4", blockwise.quantize(w)), ("int8", int8.quantize(w))):

            def gate(weight=weight) -> None:
                for backend in ("auto", "torch"):
                    assert torch.equal(ops.dequantize(weight, backend=backend), reference.dequantize(weight))

            def by_bitsandbytes(kind=kind, packed=packed, state=state, codes=codes, scales=scales) -> torch.Tensor:
                if kind == "nf4":
                    return bnb.dequantize_4bit(packed, state)
                return codes.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1 / 127))  # its backward's way

            providers = {
                "bitsandbytes": by_bitsandbytes,
                "peft_fast": lambda weight=weight: ops.dequantize(weight),
                "copy": copy_of(weight),
            }
            if device.type == "cpu":
                providers["peft_fast, torch"] = lambda weight=weight: ops.dequantize(weight, backend="torch")
            yield Case("dequantize", f"{name} {kind}", dtype, "forward", providers, gate)
