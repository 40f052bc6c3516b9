"""What all tests share. Tests marked `kernel` run Triton kernels: in the interpreter, in a process of their own
(TRITON_INTERPRET=1 pytest), or compiled where there is a GPU. In any other process they are deselected, and the rest in
that one: the two never mix."""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS_RUN = INTERPRETING or torch.cuda.is_available()

os.environ["HF_HUB_OFFLINE"] = "1"  # no test touches a hub


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def belongs(item: pytest.Item) -> bool:
        kernel = item.get_closest_marker("kernel") is not None
        return kernel == INTERPRETING or (kernel and KERNELS_RUN)

    config.hook.pytest_deselected(items=[item for item in items if not belongs(item)])
    items[:] = [item for item in items if belongs(item)]


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """The same seed for every test, and NaN in what torch.empty hands out: who reads it before writing it is found."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def device() -> str:
    """Where kernels run: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
