"""ops.rms_norm and the ops that keep its input in place of its output."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bench.memory_saved import kept, total
from peft_fast import ops
from peft_fast.ops.norm import source_of

K, EPS = 48, 1e-5


def norms() -> dict[str, nn.Module]:
    made = {
        "llama": LlamaRMSNorm(K, eps=EPS),
        "gemma": Gemma2RMSNorm(K, eps=EPS),
        "torch": nn.RMSNorm(K, eps=EPS),
    }
    for norm in made.values():
        nn.init.normal_(norm.weight, 1.0, 0.3)
        norm.requires_grad_(False)
    return made


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return dict(atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma", "torch"])
def test_as_the_module(kind, weights, stream):
    """Outputs bit for bit, gradients to rounding."""
    if kind == "torch" and weights != stream:
        pytest.skip("torch's own norm wants one dtype")
    norm = norms()[kind].to(weights)
    x = (torch.randn(2, 7, K) * 3).to(stream).requires_grad_()
    y, theirs = ops.rms_norm(x, norm.weight, EPS, kind), norm(x)
    assert y.dtype == theirs.dtype
    assert torch.equal(y, theirs)
    dy = torch.randn_like(y)
    (dx,), (expected,) = (torch.autograd.grad(out, x, dy) for out in (y, theirs))
    assert dx.dtype == x.dtype
    torch.testing.assert_close(dx, expected, **tolerance(stream))


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_changes_nothing(autocast):
    norm = norms()["llama"].bfloat16()
    x = torch.randn(5, K, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ops.rms_norm(x, norm.weight, EPS)
    assert torch.equal(y, norm(x))


def test_what_is_kept():
    """x in its own dtype; of torch's formula x in fp32 and more."""
    norm = norms()["llama"].bfloat16()
    x = torch.randn(64, K, dtype=torch.bfloat16, requires_grad=True)
    assert total(kept(lambda: ops.rms_norm(x, norm.weight, EPS), norm)) == 2 * 64 * K
    assert total(kept(lambda: norm(x), norm)) >= 4 * 64 * K


class Layers:
    """One, two and gated layers that read the same input."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.weights = [torch.randn(n, k, dtype=dtype) * 0.1 for n, k in ((32, K), (16, K), (32, K), (32, K), (K, 32))]
        self.A = [torch.randn(4, w.shape[1], dtype=dtype, requires_grad=True) for w in self.weights]
        self.B = [torch.randn(w.shape[0], 4, dtype=dtype, requires_grad=True) for w in self.weights]

    def part(self, i: int) -> ops.Projection:
        return ops.Projection(self.weights[i], None, self.A[i], self.B[i], 0.5)

    def run(self, op: str, y: torch.Tensor) -> torch.Tensor:
        if op == "lora_linear":
            return ops.lora_linear(y, self.weights[0], self.A[0], self.B[0], 0.5)
        if op == "lora_group":
            return torch.cat(ops.lora_group(y, [self.part(0), self.part(1)]), dim=-1)
        gate, up, down = self.part(2), self.part(3), self.part(4)
        return ops.lora_mlp(y, gate, up, down, "silu", recompute=op.endswith("recompute"))

    def tensors(self) -> list[torch.Tensor]:
        return [*self.A, *self.B]


OPS = ["lora_linear", "lora_group", "lora_mlp", "lora_mlp, recompute"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_ops_that_make_their_input_again(op, dtype):
    """The same gradients bit for bit as of ops that keep it, the norm's own backward included, and y is not kept."""
    layers, norm = Layers(dtype), norms()["llama"].to(dtype)
    x = torch.randn(2, 40, K, dtype=dtype, requires_grad=True)
    wanted = [x, *layers.tensors()]

    def forward(forgets: bool) -> torch.Tensor:
        y = ops.rms_norm(x, norm.weight, EPS)
        return layers.run(op, y.view_as(y) if forgets else y)  # a view is another tensor: where it came from is lost

    bare = nn.ParameterList([*layers.weights, *layers.tensors()])
    sizes = [total(kept(lambda forgets=forgets: forward(forgets), bare)) for forgets in (True, False)]
    assert sizes[0] - sizes[1] == x.nbytes
    results = []
    for forgets in (True, False):
        out = forward(forgets)
        results.append(torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True))
    for kept_, again in zip(*results):
        assert (kept_ is None) == (again is None)
        assert kept_ is None or torch.equal(kept_, again)


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives(op):
    layers, norm = Layers(torch.float32), norms()["llama"]
    x = torch.randn(3, K, requires_grad=True)

    def twice(y: torch.Tensor) -> tuple:
        out = layers.run(op, y)
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, layers.A[0 if op[5] != "m" else 2]])

    for ours, theirs in zip(twice(ops.rms_norm(x, norm.weight, EPS)), twice(norm(x))):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_what_was_written_to_is_no_norms_output():
    x = torch.randn(3, K, requires_grad=True)
    y = ops.rms_norm(x, torch.ones(K), EPS)
    assert source_of(y) is not None
    assert source_of(y.detach()) is None
    with torch.no_grad():
        y.mul_(2)
    assert source_of(y) is None


@pytest.mark.parametrize("written", ["x", "weight"])
def test_a_source_that_was_written_to_before_the_op_is_not_kept(written):
    """Nothing else would notice it where the norm's input has no gradient, as in a model's first layer."""

    def gradient(write):
        torch.manual_seed(1)
        layers, given = Layers(), {"x": torch.randn(3, K), "weight": torch.rand(K)}
        y = ops.rms_norm(given["x"], given["weight"], EPS)
        if write:
            given[written].mul_(3).add_(1)
        layers.run("lora_linear", y).square().sum().backward()
        return layers.A[0].grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_tensors_of_inference_mode_are_no_sources():
    with torch.inference_mode():
        x = torch.randn(3, K)
    assert source_of(ops.rms_norm(x, torch.ones(K), EPS)) is None


def test_a_source_that_was_written_to_is_an_error():
    layers, x = Layers(), torch.randn(3, K)
    out = layers.run("lora_linear", ops.rms_norm(x, torch.ones(K), EPS))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_without_gradients_and_under_transforms():
    weight, x = torch.rand(K), torch.randn(4, K)
    with torch.no_grad():
        y = ops.rms_norm(x, weight, EPS)
    assert source_of(y) is None
    by_func = torch.func.grad(lambda x: ops.rms_norm(x, weight, EPS).square().sum())(x)
    own = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ops.rms_norm(own, weight, EPS).square().sum(), own)
    torch.testing.assert_close(by_func, expected)


def test_wrong_arguments():
    x, weight = torch.randn(2, K), torch.ones(K)
    with pytest.raises(ValueError, match="kind must be one of llama, gemma, torch, got 'bert'"):
        ops.rms_norm(x, weight, EPS, "bert")
    with pytest.raises(ValueError, match=r"weight must be \[K\] with K=48 as x has, got \(47,\)"):
        ops.rms_norm(x, torch.ones(47), EPS)
    with pytest.raises(ValueError, match="which rms_norm does not compute: freeze it"):
        ops.rms_norm(x, weight.requires_grad_(), EPS)
    with pytest.raises(TypeError, match="x is torch.int32, which is not multiplied in"):
        ops.rms_norm(torch.ones(2, K, dtype=torch.int32), torch.ones(K), EPS)


def test_a_weight_that_is_gone_is_an_error():
    """FSDP frees the memory of a weight in its parameter's place: read, it would crash the process."""
    x, weight = torch.randn(4, 8), torch.ones(8)
    A, B = (torch.randn(shape, requires_grad=True) for shape in ((2, 8), (8, 2)))
    y = ops.lora_linear(ops.rms_norm(x, weight, 1e-6), torch.randn(8, 8), A, B, 1.0)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="that has been freed"):
        y.sum().backward()
