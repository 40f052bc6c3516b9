"""bench/counts.py: the counter on known cases, and the launches that issue and README promise."""

import peft
import pytest
import torch
import torch.nn.functional as F

import peft_fast
from bench.counts import as_on_a_gpu, count, forward_and_backward, layer_counts, qlora_layer
from peft_fast import ops
from peft_fast.dispatch import use_route
from peft_fast.ops import Call, choose

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def test_what_computes_is_counted_and_what_does_not_is_not():
    x, W, b = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    assert count(lambda: F.linear(x, W, b).relu()) == {"aten.addmm": 1, "aten.relu": 1}
    assert count(lambda: x.t().reshape(2, 16)[:, ::2].expand(2, 8).detach()) == {"aten.clone": 1}  # reshape of x.t()
    assert not count(lambda: torch.empty(3, 4).view(12)[2:].unsqueeze(0))
    assert count(lambda: x.mul_(2).add_(1)) == {"aten.mul_": 1, "aten.add_": 1}
    assert count(lambda: F.dropout(x, 0.5)) == {"aten.native_dropout": 1}


def test_backward_is_counted():
    x, W = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    assert count(lambda: torch.autograd.grad(x @ W.t(), (x, W), torch.ones(4, 6)))["aten.mm"] == 3


def test_triton_launches_are_counted_inside_ops_and_not_carried_out():
    x, A = torch.randn(64, 32), torch.randn(8, 32)
    assert count(lambda: ops.lora_down(x, A), triton=True) == {"triton.lora_down_fwd_kernel": 1}
    assert count(lambda: ops.lora_down(x, A)) == {"aten.matmul": 1}
    assert choose(Call(CPU, torch.float32, 4, 8, 16, 2)).route == "reference"
    with as_on_a_gpu():
        assert choose(Call(CPU, torch.float32, 4, 8, 16, 2)).route == "split"
    assert choose(Call(CPU, torch.float32, 4, 8, 16, 2)).route == "reference"  # nothing of it stays


def test_bitsandbytes_nested_scales_take_two_launches_more():
    ops_of = count(forward_and_backward(qlora_layer(peft, 128, 0.0), *inputs(64, 128)))
    assert ops_of["bitsandbytes.dequantize_4bit"] == 2  # forward and backward
    assert ops_of["bitsandbytes.dequantize_blockwise"] == 2
    assert ops_of["bitsandbytes.offset"] + ops_of["aten.add_"] == 2


def inputs(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    return x, torch.randn(tokens, width, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("route", "p", "most"), [("merge", 0.0, 9), ("split", 0.0, 10), ("split", 0.05, 11), ("fused", 0.0, 9)]
)
def test_launches_of_one_qlora_linear(route, p, most):
    """Forward and backward at 512 tokens, the second stages of reductions and the dropout key included."""
    x, dy = inputs(512, 1024)
    theirs = count(forward_and_backward(qlora_layer(peft, 1024, p), x, dy))
    with use_route(route):
        ours = count(forward_and_backward(qlora_layer(peft_fast, 1024, p), x, dy), triton=True)
    assert sum(ours.values()) <= most, ours
    assert sum(theirs.values()) >= 17, theirs


@pytest.mark.parametrize(("bits", "p", "most"), [(4, 0.0, 52), (4, 0.05, 55), (16, 0.0, 38), (16, 0.05, 41)])
def test_launches_of_a_llama_layer(bits, p, most):
    """q, k, v share the launches of their adapters, and so do gate and up: lora_down and lora_up's backward run four
    times for seven projections, lora_up_add three times and once with the gate, which takes lora_down's fourth backward
    too. One draw of dropout keys for q, k, v, one for o, one for the MLP."""
    theirs, ours = layer_counts(512, bits, p)
    assert sum(ours.values()) <= most, ours
    assert ours["triton.lora_down_fwd_kernel"] == ours["triton.lora_up_bwd_kernel"] == 4
    assert (ours["triton.lora_up_add_fwd_kernel"], ours["triton.lora_up_glu_kernel"]) == (3, 1)
    assert (ours["triton.lora_down_bwd_kernel"], ours["triton.lora_glu_bwd_kernel"]) == (3, 1)
    assert ours["aten.randint"] == (3 if p else 0)
    assert sum(theirs.values()) >= 2.2 * sum(ours.values()), theirs
