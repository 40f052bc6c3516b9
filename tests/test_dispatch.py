"""Which route runs and why: the rules of dispatch.py, in fresh processes where the process matters."""

import subprocess
import sys
import warnings

import pytest
import torch

from peft_fast import dispatch, ops
from peft_fast.dispatch import REFERENCE, Choice, Op, TritonUnsupported, current_backend, use_backend
from peft_fast.ops import Call, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})


def call(backend=None):
    x, W = torch.randn(4, 16), torch.randn(8, 16)
    return ops.lora_linear(x, W, torch.randn(2, 16), torch.randn(8, 2), 1.0, backend=backend)


def test_on_a_cpu_auto_runs_the_reference_and_says_so():
    call_of_4 = Call(CPU, torch.float32, 4, 8, 16, 2)
    assert choose(call_of_4) == Choice("lora_linear", REFERENCE, "the tensors are on the CPU")
    assert call().shape == (4, 8)


def test_an_explicit_request_never_falls_back():
    with pytest.raises(
        TritonUnsupported, match=r"lora_linear: backend triton was asked for, but the tensors are on the"
    ):
        call(backend="triton")
    with use_backend("triton"), pytest.raises(TritonUnsupported):
        call()


def test_a_calls_own_backend_wins_over_the_process():
    with use_backend("triton"):
        assert call(backend="torch").shape == (4, 8)


def test_use_backend_restores_what_was_even_after_an_error():
    def fail():
        with use_backend("torch"):
            assert current_backend() == "torch"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert current_backend() == "auto"
    with (
        pytest.raises(ValueError, match=r"use_backend must be one of auto, triton, torch, got 'gpu'"),
        use_backend("gpu"),
    ):
        pass


def test_the_environment_variable_is_validated_at_import():
    assert python(
        "from peft_fast.dispatch import current_backend as b; print(b())", PEFT_FAST_BACKEND="torch"
    ).stdout == ("torch\n")
    bad = python("import peft_fast", PEFT_FAST_BACKEND="cuda")
    assert bad.returncode
    assert "PEFT_FAST_BACKEND must be one of auto, triton, torch, got 'cuda'" in bad.stderr


def test_without_triton_everything_imports_and_runs_on_torch():
    blocked = """
import sys
sys.modules["triton"] = None  # import triton raises
import importlib.util as u
real = u.find_spec
u.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
import torch
import peft_fast
from peft_fast import ops
print(ops.choose(ops.Call(torch.device("cpu"), torch.float32, 4, 8, 16, 2)).because)
print(ops.lora_linear(torch.ones(1, 4), torch.ones(4, 4), torch.ones(2, 4), torch.ones(4, 2), 1.0)[0, 0].item())
"""
    done = python(blocked)
    assert done.stdout == "Triton is not installed\n12.0\n", done.stderr


def test_importing_does_not_import_the_libraries_of_tests_nor_triton():
    code = (
        "import sys, peft_fast; print([m for m in ('peft', 'trl', 'accelerate', 'bitsandbytes') if m in sys.modules])"
    )
    assert python(code).stdout == "[]\n"


def test_the_reasons_for_a_gpu(monkeypatch):
    """The rules for devices that are not here: capability, kernels' own limits, the interpreter."""
    monkeypatch.setattr(dispatch, "_warned_of_fallback", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 5))
    with_dot = Op("with_dot", "split", lambda dtype: None)
    elementwise = Op("elementwise", "triton", lambda dtype: None, needs_dot=False)
    with pytest.warns(UserWarning, match=r"with_dot runs in plain torch on Tesla T4 \(sm_75\): .* older than sm_80"):
        choice = with_dot.choose("auto", CUDA, torch.float16)
    assert choice.route == REFERENCE
    assert elementwise.choose("auto", CUDA, torch.float16).route == "triton"
    limited = Op(
        "limited", "split", lambda dtype, rank: f"rank {rank} is above 8" if rank > 8 else None, needs_dot=False
    )
    assert limited.choose("auto", CUDA, torch.float16, 8).route == "split"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once per process, above
        assert limited.choose("auto", CUDA, torch.float16, 9).because == "rank 9 is above 8"
    with pytest.raises(TritonUnsupported, match="limited: .* rank 9 is above 8"):
        limited.choose("triton", CUDA, torch.float16, 9)


def test_choices_are_memoised(monkeypatch):
    asked = []
    op = Op("memoised", "split", lambda dtype: asked.append(dtype), needs_dot=False)
    monkeypatch.setattr(dispatch, "cannot_run_triton", lambda *a, **k: None)
    assert {op.choose("auto", CPU, torch.float32).route for _ in range(3)} == {"split"}
    assert len(asked) == 1
