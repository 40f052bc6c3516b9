"""Every op of the library is given to torch.library.opcheck, with the torch implementation and with the Triton one.

The checks themselves are in the tests of each op; here is seen that none is forgotten.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from peft_fast import ops
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


def test_an_op_is_seen_by_whoever_looks():
    """Elsewhere its implementation is called without torch's dispatcher (library.is_unseen)."""
    case, seen = lora_cases.make_case(3, 64, 32, 4, torch.float32, torch.float32, "nf4", 0.0), []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def run():
        with torch.no_grad():
            return ops.lora_linear(case.x, case.weight, case.A, case.B, 1.7)

    alone = run()
    with Look():
        torch.testing.assert_close(run(), alone, rtol=0, atol=0)
    assert "peft_fast.lora_linear.default" in seen
    with torch.profiler.profile() as recorded:
        run()
    assert "peft_fast::lora_linear" in {event.key for event in recorded.key_averages()}
    assert library.is_unseen(case.x)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert not library.is_unseen(case.x)
        of_shape = fake.from_tensor(case.x)
    assert not library.is_unseen(of_shape)
    with torch.device("cpu"):  # a mode: implementations make tensors where theirs are
        assert not library.is_unseen(case.x)
