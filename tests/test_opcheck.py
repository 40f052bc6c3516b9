"""Every op of the library is given to torch.library.opcheck, with the torch implementation and with the Triton one.

The checks themselves are in the tests of each op; here is seen that none is forgotten.
"""

import pytest
import torch

from peft_fast.ops import library

from . import (
    embedding_cases,
    lora_cases,
    mlp_cases,
    test_dora_ops,
    test_embedding,
    test_glu,
    test_lora_experts,
    test_lora_group,
    test_lora_multi,
    test_mlp,
    test_ops,
)

FP32 = torch.float32


def checked(backend: str, monkeypatch) -> set[str]:
    """The ops that the tests' opcheck_all functions, which the tests call with both backends, give to opcheck."""
    found: set[str] = set()

    def opcheck(op, args, **options) -> None:
        assert backend in args, op  # the implementation is picked by this argument
        found.add(op._opname)

    monkeypatch.setattr(torch.library, "opcheck", opcheck)
    test_ops.opcheck_all(lora_cases.make_case(8, 64, 32, 4, FP32, FP32, "nf4", 0.1), backend)
    test_lora_group.opcheck_all("mixed", backend, "cpu")
    test_lora_multi.opcheck_all(backend, "cpu")
    test_mlp.opcheck_all(mlp_cases.make_case(8, 32, 48, (4, 4, 4), FP32, FP32, "nf4", 0.0), backend)
    test_dora_ops.opcheck_all(backend, "cpu")
    test_glu.opcheck_all(backend, "cpu")
    test_lora_experts.opcheck_all(backend, "cpu")
    test_embedding.opcheck_all(embedding_cases.make_case(*embedding_cases.SHAPES[0], FP32, FP32), backend)
    return found


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_none_is_forgotten(backend, monkeypatch):
    assert checked(backend, monkeypatch) == set(library.IMPLEMENTATIONS)
