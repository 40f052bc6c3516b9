"""A linear layer with DoRA, forward and backward, against peft's on the same base: bench_lora_linear's shapes."""

from collections.abc import Iterator

import peft
import torch

import peft_fast
from bench.bench_lora_linear import SHAPES, base_of, layer_of, step_of
from bench.harness import Case, half_of
from peft_fast.testing import relative_error


def cases(device: torch.device) -> Iterator[Case]:
    dtype = half_of(device) if device.type == "cuda" else torch.float32
    for name, (M, K, N, r) in SHAPES[device.type].items():
        for kind in ("dense", "nf4"):
            for p in (0.0, 0.05):
                x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
                dy = torch.randn(M, N, device=device, dtype=dtype)
                runs = {}
                for library in (peft, peft_fast):
                    model = layer_of(library, base_of(N, K, kind, device, dtype), r, p, use_dora=True)
                    runs[library.__name__] = step_of(model.to(dtype).train(), x, dy)

                def gate(runs=runs, dtype=dtype) -> None:
                    found = []
                    for run in runs.values():
                        torch.manual_seed(0)  # the masks of DoRA are torch's own in both
                        found.append(run())
                    for theirs, ours in zip(*found):
                        assert relative_error(ours, theirs) < 32 * torch.finfo(dtype).eps

                yield Case("dora_linear", f"{name} {kind} p={p}", dtype, "forward+backward", runs, gate)
