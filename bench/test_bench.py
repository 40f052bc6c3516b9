"""The cases of bench_*.py under pytest-benchmark: `make bench-pytest`, or, for some of them and a comparison with the
last run, `python -m pytest bench/test_bench.py -k decode --benchmark-autosave --benchmark-compare`.

No part of `make test`, whose tests are under tests/. The same gates and the same providers as `make bench`, which runs
them in turn and prints ratios; here each runs by itself, and pytest-benchmark keeps and compares the numbers.
"""

from collections.abc import Callable

import pytest
import torch

from bench.harness import Case
from bench.run import MODULES

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [case for module in MODULES for case in module.cases(DEVICE)]
PARAMETERS = [
    pytest.param(case, provider, id=f"{case.op} {case.shape} {str(case.dtype).removeprefix('torch.')} {provider}")
    for case in CASES
    for provider in case.providers
]


def _finished(run: Callable[[], object]) -> Callable[[], object]:
    """`run`, and on a GPU the wait for what it launched."""

    def on_gpu() -> object:
        result = run()
        torch.cuda.synchronize()
        return result

    return on_gpu if DEVICE.type == "cuda" else run


@pytest.mark.parametrize(("case", "provider"), PARAMETERS)
def test_case(case: Case, provider: str, benchmark) -> None:
    case.gate()
    benchmark.group = f"{case.op} {case.shape} {case.dtype} {case.passes}"
    benchmark.extra_info["provider"] = provider
    benchmark(_finished(case.providers[provider]))
