"""Up to how many tokens decoding a k-bit weight inside the product beats writing it out: the table for this card.

    python -m bench.crossover [--shapes 4096x4096,14336x4096] [--rounds 21]

For each weight [N, K] and number of tokens M, forward and dx: our fused kernel, bitsandbytes' fused kernel (forward),
and dequantise + cuBLAS. Rows are appended to bench/results/<device>/crossover.csv; the summary is what ops/table.py
wants to know.
Needs a GPU: on a CPU nothing is ever fused.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes  # noqa: F401 - a provider
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bench.harness import (
    FAILURES,
    RESULTS,
    ROUNDS,
    Case,
    Row,
    append,
    device_name,
    folder_of,
    half_of,
    measure,
    table,
)
from peft_fast.dispatch import interpreting, use_backend
from peft_fast.kernels import reference
from peft_fast.quant import bitsandbytes_kernels, blockwise, int8
from peft_fast.testing import relative_error

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def case(N: int, K: int, M: int, kind: str, dtype: torch.dtype, device: torch.device, dx: bool) -> Case:
    from peft_fast.kernels import triton_ops

    W = torch.randn(N, K, device=device, dtype=dtype) * 0.02
    weight = int8.quantize(W) if kind == "int8" else blockwise.quantize(W, kind)
    x = torch.randn(M, N if dx else K, device=device, dtype=dtype)
    providers: dict[str, Callable[[], torch.Tensor]] = {}
    if dx:
        providers["dequantize"] = lambda: x @ triton_ops.dequantize(weight, dtype)
        providers["fused"] = lambda: triton_ops.quant_matmul_dx(x, weight)
    else:
        providers["dequantize"] = lambda: F.linear(x, triton_ops.dequantize(weight, dtype))
        providers["fused"] = lambda: triton_ops.quant_matmul(x, weight)
        if bitsandbytes_kernels.why_not_matmul(weight.format, device, dtype) is None:
            providers["bitsandbytes"] = lambda: bitsandbytes_kernels.matmul(x, weight, None)

    def gate() -> None:
        W = reference.dequantize(weight, torch.float32).double()
        truth = x.double() @ (W if dx else W.t())
        for name, run in providers.items():
            assert relative_error(run().double(), truth) < 4 * torch.finfo(dtype).eps, name

    return Case("quant_matmul_dx" if dx else "quant_matmul", f"{kind}:{N}x{K} M={M}", dtype, "forward", providers, gate)


def crossovers(rows: list[Row]) -> list[str]:
    """For each op and weight, up to how many tokens a fused provider is faster than dequantising, without a gap."""
    found = []
    for key in dict.fromkeys((row.op, row.shape.split()[0]) for row in rows):
        mine = [row for row in rows if (row.op, row.shape.split()[0]) == key]
        for provider in dict.fromkeys(row.provider for row in mine if not row.provider.startswith("dequantize")):
            of_provider = [row for row in mine if row.provider == provider]
            wins = list(itertools.takewhile(lambda row: row.speedup > 1, of_provider))
            up_to = wins[-1].shape.split("=")[1] if wins else 0
            found.append(f"{key[0]} {key[1]}: {provider} wins up to M = {up_to}")
    return found


def rehearse() -> int:
    """What `main` does, gate and summary included, of one shape in fp32: times mean nothing there."""
    if not interpreting():
        print("--rehearse needs Triton's interpreter: TRITON_INTERPRET=1 python -m bench.crossover", file=sys.stderr)
        return 2
    cpu = torch.device("cpu")
    with use_backend("triton"):
        rows = [
            row
            for dx, M in itertools.product((False, True), (1, 16))
            for row in measure(case(32, 64, M, "nf4", torch.float32, cpu, dx), cpu, 1)
        ]
    print(table(rows))
    print("\n".join(crossovers(rows)))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,1024x4096,14336x4096,4096x14336", help="N x K, comma separated")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=0, help="begin no case after this time (default: run all)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rehearse", action="store_true", help="one small case in Triton's interpreter, on the CPU")
    options = parser.parse_args()
    if options.rehearse:
        return rehearse()
    if not torch.cuda.is_available():
        print("the crossover is a property of a GPU, and there is none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    rows: list[Row] = []
    left, errors, start = 0, [], time.perf_counter()
    path = folder_of(device, options.results) / "crossover.csv"
    for (N, K), kind, dx, M in tqdm(list(itertools.product(shapes, ("nf4", "int8"), (False, True), TOKENS))):
        if options.seconds and time.perf_counter() - start > options.seconds:
            left += 1
            continue
        try:
            found = list(measure(case(N, K, M, kind, half_of(device), device, dx), device, options.rounds))
        except FAILURES as error:
            errors.append(f"{'dx' if dx else 'forward'} {kind}:{N}x{K} M={M}: {type(error).__name__}: {error}")
            continue
        rows += found
        append(found, path)  # at once: the stage may be ended
    print(device_name(device))
    if rows:
        print(table(rows))
        print("\n".join(crossovers(rows)))
    print("\n".join(errors), file=sys.stderr)
    if left:
        print(f"{left} cases not run after {options.seconds} s", file=sys.stderr)
    return int(bool(errors or left))


if __name__ == "__main__":
    sys.exit(main())
