"""What would be launched: records Triton launches, with their arguments, instead of running them.

The compile matrix and the launch counts both read the launchers' own calls, so they cannot drift from what a GPU gets.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.runtime.jit import JITFunction

from bench import traffic
from peft_fast.kernels.launch import Plan

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One launch of `kernel`: everything that decides which binary Triton builds, in hashable form."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]  # (argument, type)
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]  # arguments known to be multiples of 16: pointers (bytes) and integers
    options: tuple[tuple[str, Any], ...]
    grid: tuple[int, ...] = field(default=(), compare=False)  # decides nothing about the binary, nor does
    tensors: tuple[tuple[str, traffic.Extent], ...] = field(default=(), compare=False)  # (argument, its bytes)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_")

    @property
    def nbytes(self) -> int:
        """What it moves between memory and the chip, as bench/traffic.py counts it."""
        return traffic.of_kernel(self.name, dict(self.tensors), dict(self.constexprs))


def _describe(kernel: JITFunction, grid: tuple[int, ...], args: tuple, kwargs: dict) -> Launch:
    """As Triton specialises: 1 and None become constants, multiples of 16 are marked, floats are fp32."""
    signature, constexprs, divisible, tensors = [], [], [], []
    given = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and isinstance(value, int) and value == 1):
            signature.append((name, "constexpr"))
            constexprs.append((name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((name, "*" + TYPES[value.dtype]))
            tensors.append((name, traffic.extent(value)))
            if value.data_ptr() % 16 == 0:
                divisible.append(name)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(1 << 31) <= value < 1 << 31 else "i64"))
            if free and value % 16 == 0:
                divisible.append(name)
    options = tuple((k, kwargs[k]) for k in OPTIONS if k in kwargs)
    return Launch(kernel, tuple(signature), tuple(constexprs), tuple(divisible), options, grid, tuple(tensors))


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Within, Triton kernels are not run; the list fills with what they would have been run with."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_describe(self, tuple(grid), args, kwargs))

    with patch.object(JITFunction, "run", run), patch.object(Plan, "__call__", Plan.by_triton):
        yield launches


def compile_for(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel (ptx, cubin, metadata) for a GPU that need not be here; capability 80 means sm_80."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: i for i, name in enumerate(launch.kernel.arg_names)}
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(position[name],): value for name, value in launch.constexprs},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
