"""Derivatives of derivatives, torch.func's transforms and forward mode, of every differentiable op."""

import pytest
import torch
from torch.autograd import forward_ad

from peft_fast import ops
from peft_fast.kernels import dropout
from peft_fast.quant import blockwise

M, K, N, R = 5, 8, 6, 2


def tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR).requires_grad_()


GENERATOR = torch.Generator().manual_seed(0)
KEY = dropout.new_key("cpu")
W, W2, DOWN = (torch.randn(N, K).double(), torch.randn(N, K).double(), torch.randn(K, N).double())
IDS = torch.tensor([[0, 2, 2], [1, 0, 2]])


def packed(W, A, B, bias=None, p=0.0):
    return ops.Projection(W, bias, A, B, 1.5, p, KEY if p else None)


CASES = {
    "linear": (
        lambda x, A, B, bias: ops.lora_linear(x, W, A, B, 1.5, bias),
        [(2, M, K), (R, K), (N, R), (N,)],
    ),
    "linear, dropout": (
        lambda x, A, B: ops.lora_linear(x, W, A, B, 1.5, dropout_p=0.3, dropout_key=KEY),
        [(M, K), (R, K), (N, R)],
    ),
    "linear, a trained weight": (
        lambda x, A, B, weight: ops.lora_linear(x, weight, A, B, 1.5),
        [(M, K), (R, K), (N, R), (N, K)],
    ),
    "linear, a factor that depends on the other": (
        lambda x, A, B: ops.lora_linear(x, W, A, B * A.sum(), 1.5),
        [(M, K), (R, K), (N, R)],
    ),
    "down": (lambda x, A: ops.lora_down(x, A, dropout_p=0.3, dropout_key=KEY), [(M, K), (R, K)]),
    "up_add": (
        lambda y, s, B, bias: ops.lora_up_add(y.sin(), s, B, 1.5, bias),
        [(M, N), (M, R), (N, R), (N,)],
    ),
    "embedding": (
        lambda table, A, B: ops.lora_embedding(IDS, table, A, B, 1.5, padding_idx=3),
        [(4, N), (R, 4), (N, R)],
    ),
    "embedding_add": (lambda y, A, B: ops.lora_embedding_add(y.sin(), IDS, A, B, 1.5), [(2, 3, N), (R, 4), (N, R)]),
    "scale_columns": (lambda z, factor, bias: ops.scale_columns(z, factor, bias), [(M, N), (N,), (N,)]),
    "group": (
        lambda x, A, B, bias, A2, B2: torch.cat(
            ops.lora_group(x, [packed(W, A, B, bias, 0.3), packed(W2, A2, B2), packed(W2, None, None)]), -1
        ),
        [(M, K), (R, K), (N, R), (N,), (R, K), (N, R)],
    ),
    "group, one output": (
        lambda x, A, B, A2, B2: ops.lora_group(x, [packed(W, A, B), packed(W2, A2, B2)])[1],
        [(M, K), (R, K), (N, R), (R, K), (N, R)],
    ),
    **{
        f"mlp, {activation}{', recomputed' * again}": (
            lambda x, A, B, A2, B2, C, D, activation=activation, again=again: ops.lora_mlp(
                x, packed(W, A, B), packed(W2, A2, B2), packed(DOWN, C, D), activation, recompute=again
            ),
            [(M, K), (R, K), (N, R), (R, K), (N, R), (R, N), (K, R)],
        )
        for activation, again in (("silu", False), ("gelu", False), ("gelu_tanh", True))
    },
}
every_op = pytest.mark.parametrize("name", CASES)


@every_op
def test_gradients_of_gradients(name):
    call, shapes = CASES[name]
    inputs = [tensor(*shape) for shape in shapes]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@every_op
def test_the_first_gradients_are_the_same_whether_they_are_differentiated_again_or_not(name):
    call, shapes = CASES[name]
    inputs = [tensor(*shape) for shape in shapes]
    once = torch.autograd.grad(call(*inputs).sin().sum(), inputs, allow_unused=True)
    again = torch.autograd.grad(call(*inputs).sin().sum(), inputs, create_graph=True, allow_unused=True)
    for a, b in zip(once, again):
        assert (a is None) == (b is None)
        if a is not None:
            assert b.requires_grad
            torch.testing.assert_close(a, b)


@every_op
def test_transforms_of_torch_func(name):
    call, shapes = CASES[name]
    inputs = [tensor(*shape).detach() for shape in shapes]
    leaves = [t.clone().requires_grad_() for t in inputs]

    def loss(*inputs):
        return call(*inputs).sin().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves, create_graph=True, materialize_grads=True)
    found = torch.func.grad(loss, tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(found, tuple(t.detach() for t in expected))
    tangents = [torch.randn_like(t) for t in inputs]
    value, slope = torch.func.jvp(loss, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(value, loss(*inputs))
    torch.testing.assert_close(slope, sum((g * t).sum() for g, t in zip(found, tangents)))
    with forward_ad.dual_level():
        dual = loss(*(forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)
    several = [torch.stack([t, 2 * t]) for t in inputs]
    mapped = torch.func.vmap(call)(*several)
    torch.testing.assert_close(mapped, torch.stack([call(*inputs), call(*(2 * t for t in inputs))]))
    hessian = torch.func.hessian(loss)(*inputs)
    (row,) = torch.autograd.grad(expected[0].flatten()[1], leaves[0], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(hessian.flatten(0, inputs[0].dim() - 1)[1], row)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_ids_without_a_gradient(padding_idx):
    table, A, B = tensor(4, N), tensor(R, 4), tensor(N, R)

    def call(table, A, B):
        return ops.lora_embedding(IDS, table, A, B, 1.5, padding_idx=padding_idx).sin().sum()

    once = torch.autograd.grad(call(table, A, B), [table, A, B])
    again = torch.autograd.grad(call(table, A, B), [table, A, B], create_graph=True)
    transformed = torch.func.grad(call, (0, 1, 2))(table, A, B)
    for others in (again, transformed):
        for a, b in zip(once, others):
            torch.testing.assert_close(a, b)
    assert (once[0][2] == 0).all() == (padding_idx is not None)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_k_bit_weights(kind):
    from peft_fast.quant import int8

    dense = torch.randn(64, 64, generator=GENERATOR)
    weight = int8.quantize(dense) if kind == "int8" else blockwise.quantize(dense, "nf4", 64, True)
    x, A, B = (torch.randn(*shape, generator=GENERATOR).requires_grad_() for shape in ((5, 64), (4, 64), (64, 4)))
    W = ops.dequantize(weight, torch.float32)
    results = []
    for call in (
        lambda x, A, B: ops.quant_matmul(x, weight).sin() + ops.lora_linear(x, weight, A, B, 2.0),
        lambda x, A, B: (x @ W.t()).sin() + x @ W.t() + 2 * x @ A.t() @ B.t(),
    ):
        first = torch.autograd.grad(call(x, A, B).square().sum(), [x, A, B], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, A, B])
        transformed = torch.func.grad(lambda x, call=call: call(x, A, B).square().sum())(x)
        results.append([*first, *second, transformed])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_under_autocast():
    x, A, B = (tensor(*shape).detach().float().requires_grad_() for shape in ((M, K), (R, K), (N, R)))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.lora_linear(x, W.float(), A, B, 1.5)
        assert torch.func.vmap(lambda x: ops.lora_linear(x, W.float(), A, B, 1.5))(x[None]).dtype == torch.bfloat16
        (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(ops.lora_linear(x, W.float(), A, B, 1.5).square().sum(), x)
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())
    first.sum().backward()
    assert A.grad.dtype == torch.float32


def test_a_usual_backward_keeps_no_graph():
    call, shapes = CASES["linear"]
    inputs = [tensor(*shape) for shape in shapes]
    grads = torch.autograd.grad(call(*inputs).sum(), inputs)
    assert not any(g.requires_grad for g in grads)


def test_training_compiled_with_second_derivatives_says_no():
    compiled = torch.compile(lambda x, A, B: ops.lora_linear(x, W, A, B, 1.5), fullgraph=True)
    x, A, B = tensor(M, K), tensor(R, K), tensor(N, R)
    (first,) = torch.autograd.grad(compiled(x, A, B).square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|once_differentiable|does not require grad"):
        first.sum().backward()
