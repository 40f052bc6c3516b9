"""ops.lora_group: layers that share x, against fp64 and against lora_linear for each of them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peft_fast import ops
from peft_fast.kernels import reference
from peft_fast.testing import assert_as_accurate_as_torch

from .lora_cases import LoraCase, make_case

FP32, BF16 = torch.float32, torch.bfloat16
# (base, N, R, dropout) of each layer; rank 0 has no adapter
GROUPS = {
    "qkv": [("dense", 48, 8, 0.0), ("dense", 16, 8, 0.0), ("dense", 16, 8, 0.0)],
    "nf4": [("nf4", 48, 4, 0.1), ("nf4", 33, 17, 0.3), ("nf4", 16, 1, 0.0)],
    "mixed": [("nf4", 48, 4, 0.0), ("dense", 16, 0, 0.0), ("int8", 16, 4, 0.1)],
    "two": [("int8", 24, 4, 0.0), ("nf4", 16, 4, 0.0)],
    "bare": [("dense", 24, 0, 0.0), ("nf4", 16, 0, 0.0)],
}


def make_group(kind: str, M: int, K: int, dtype: torch.dtype, adapter: torch.dtype, device: str) -> list[LoraCase]:
    cases = [make_case(M, K, N, max(R, 1), dtype, adapter, base, p, device) for base, N, R, p in GROUPS[kind]]
    return [replace(case, x=cases[0].x) for case in cases]


def projections(kind: str, cases: list[LoraCase], leaves: Sequence[dict[str, Tensor]]) -> list[ops.Projection]:
    return [
        ops.Projection(
            case.weight, leaf["bias"], *((leaf["A"], leaf["B"]) if R else ()),
            scale=case.scale, dropout_p=p, dropout_key=case.key if p else None,
        )
        for case, leaf, (_, _, R, p) in zip(cases, leaves, GROUPS[kind])
    ]  # fmt: skip


def run(kind: str, cases: list[LoraCase], together: bool, backend: str, route: str | None = None) -> dict[str, Tensor]:
    leaves = [case.leaves() for case in cases]
    x = leaves[0]["x"]
    parts = projections(kind, cases, leaves)
    if together:
        y = ops.lora_group(x, parts, backend=backend, route=route)
    else:
        y = [_alone(x, part, backend, route) for part in parts]
    wanted = {"x": x}
    for j, (leaf, part) in enumerate(zip(leaves, parts)):
        wanted |= {f"{n}{j}": leaf[n] for n in (("A", "B", "bias") if part.A is not None else ("bias",))}
    grads = torch.autograd.grad(y, list(wanted.values()), [case.d_y for case in cases])
    return {f"y{j}": t.detach() for j, t in enumerate(y)} | dict(zip(wanted, grads))


def _alone(x: Tensor, part: ops.Projection, backend: str, route: str | None) -> Tensor:
    if part.A is None or part.B is None:
        W = part.weight if isinstance(part.weight, Tensor) else reference.dequantize(part.weight, x.dtype)
        return torch.nn.functional.linear(x, W, part.bias)
    return ops.lora_linear(
        x, part.weight, part.A, part.B, part.scale, part.bias, dropout_p=part.dropout_p, dropout_key=part.dropout_key,
        backend=backend, route=route,
    )  # fmt: skip


def truth(kind: str, cases: list[LoraCase], convert) -> dict[str, Tensor]:
    """The same quantities from plain torch under its own autograd."""
    x = convert(cases[0].x).requires_grad_()
    y, wanted = [], {"x": x}
    for j, (case, (_, _, R, p)) in enumerate(zip(cases, GROUPS[kind])):
        W = convert(reference.dequantize(case.weight, case.x.dtype) if case.quantized else case.weight)
        A, B, bias = (convert(t).requires_grad_() for t in (case.A.to(x.dtype), case.B.to(x.dtype), case.bias))
        if R:
            y.append(reference.lora_linear(x, W, A, B, case.scale, bias, p, case.key if p else None))
            wanted |= {f"A{j}": A, f"B{j}": B}
        else:
            y.append(torch.nn.functional.linear(x, W, bias))
        wanted[f"bias{j}"] = bias
    grads = torch.autograd.grad(y, list(wanted.values()), [convert(case.d_y) for case in cases])
    return {f"y{j}": t.detach() for j, t in enumerate(y)} | dict(zip(wanted, grads))


def check(kind: str, cases: list[LoraCase], backend: str, route: str | None = None) -> None:
    got = run(kind, cases, True, backend, route)
    by_torch, exact = truth(kind, cases, lambda t: t.detach()), truth(kind, cases, lambda t: t.detach().double())
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_as_accurate_as_torch(name, value, by_torch[name], exact[name], cases[0].x.dtype)


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize(("dtype", "adapter"), [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("M", [33, 0])
def test_torch(kind, dtype, adapter, M):
    check(kind, make_group(kind, M, 64, dtype, adapter, "cpu"), "torch")


@pytest.mark.kernel
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("dtype", [FP32, torch.float16], ids=str)
def test_triton(kind, dtype, device):
    check(kind, make_group(kind, 33, 64, dtype, dtype, device), "triton", "split")


@pytest.mark.parametrize("kind", ["qkv", "two", "mixed"])
def test_each_layer_gets_what_it_gets_alone(kind):
    cases = make_group(kind, 20, 64, FP32, FP32, "cpu")
    alone = run(kind, cases, False, "torch")
    for name, value in run(kind, cases, True, "torch").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("route", ["merge", "fused"])
def test_other_routes(route):
    cases = make_group("two", 20, 64, FP32, FP32, "cpu")
    expected = run("two", cases, True, "torch")
    for name, value in run("two", cases, True, "torch", route).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_every_subset_of_gradients():
    cases = make_group("nf4", 20, 64, FP32, FP32, "cpu")
    everything = run("nf4", cases, True, "torch")
    names = ("x", "A0", "B1", "bias2", "A2")
    for skipped in names:
        leaves = [case.leaves() for case in cases]
        wanted = {n: leaves[int(n[-1]) if n != "x" else 0][n.rstrip("012")] for n in names if n != skipped}
        for leaf in leaves:
            for tensor in leaf.values():
                tensor.requires_grad_(any(tensor is w for w in wanted.values()))
        y = ops.lora_group(leaves[0]["x"], projections("nf4", cases, leaves), backend="torch")
        grads = torch.autograd.grad(y, list(wanted.values()), [case.d_y for case in cases])
        for name, grad in zip(wanted, grads):
            torch.testing.assert_close(grad, everything[name], rtol=1e-5, atol=1e-5)


def test_one_output_alone_can_be_used_and_one_x_is_kept():
    cases = make_group("qkv", 20, 64, FP32, FP32, "cpu")
    leaves = [case.leaves() for case in cases]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.lora_group(leaves[0]["x"], projections("qkv", cases, leaves), dtype=BF16)
    activations = [t for t in kept if t.shape[:1] == (20,)]
    assert sorted(tuple(t.shape) for t in activations) == [(20, 24), (20, 64)]  # s of all three, and x
    y[1].float().sum().backward()
    alone, part = cases[1].leaves(), projections("qkv", cases, [case.leaves() for case in cases])[1]
    part = part._replace(A=alone["A"], B=alone["B"], bias=alone["bias"])
    y_alone = ops.lora_linear(alone["x"], part.weight, part.A, part.B, part.scale, part.bias, dtype=BF16)
    y_alone.float().sum().backward()
    assert torch.equal(y[1], y_alone)
    for name in ("x", "A", "B", "bias"):
        assert torch.equal((leaves[0] if name == "x" else leaves[1])[name].grad, alone[name].grad)
    assert all(leaf[name].grad is None for leaf in (leaves[0], leaves[2]) for name in ("A", "B", "bias"))  # not zeros


def test_no_output_used():
    cases = make_group("nf4", 5, 64, FP32, FP32, "cpu")
    leaves = [case.leaves() for case in cases]
    y = ops.lora_group(leaves[0]["x"], projections("nf4", cases, leaves))
    (zero,) = torch.autograd.grad(y[0].detach().sum() + y[1].sum() * 0, [leaves[0]["x"]])
    assert not zero.any()


@pytest.mark.parametrize("kind", ["qkv", "mixed"])
def test_opcheck(kind):
    opcheck_all(kind, "torch", "cpu")


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["qkv", "mixed"])
def test_opcheck_with_triton(kind, device):
    opcheck_all(kind, "triton", device)


def opcheck_all(kind: str, backend: str, device: str) -> None:
    """torch's own checks of schema, fake tensors and tracing, forward and backward."""
    cases = make_group(kind, 8, 64, FP32, FP32, device)
    parts = [p.tensors() for p in projections(kind, cases, [case.leaves(()) for case in cases])]
    tensors, counts, fmts = [t for part, _ in parts for t in part], [len(p) for p, _ in parts], [f for _, f in parts]
    scales, ps = [1.7] * 3, [p for *_, p in GROUPS[kind]]
    lib, rest = torch.ops.peft_fast, (True, backend, "auto")
    torch.library.opcheck(lib.lora_group.default, (cases[0].x, tensors, counts, fmts, scales, ps, FP32, *rest))
    s = torch.randn(8, sum(R for _, _, R, _ in GROUPS[kind]), device=device)
    needs = [True] + [need for _, _, R, _ in GROUPS[kind] for need in (bool(R), bool(R), True)]
    dy = [case.d_y for case in cases]
    args = (dy, cases[0].x, s, tensors, counts, fmts, scales, ps, needs, *rest)
    torch.library.opcheck(lib.lora_group_backward.default, args)


@pytest.mark.filterwarnings("ignore")
def test_compiles_whole_with_two_graphs_as_m_varies():
    from torch._dynamo.testing import CompileCounter

    cases = make_group("nf4", 20, 64, FP32, FP32, "cpu")
    leaves = [case.leaves() for case in cases]
    counter = CompileCounter()
    parts = projections("nf4", cases, leaves)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(x):
        return sum(y.square().sum() for y in ops.lora_group(x, parts))

    for M in (2, 5, 9, 20):
        x = torch.randn(M, 64, requires_grad=True)
        compiled(x).backward()
        expected = torch.randn(0)
        with torch.compiler.set_stance("force_eager"):
            again = x.detach().clone().requires_grad_()
            expected = sum(y.square().sum() for y in ops.lora_group(again, parts))
            expected.backward()
        torch.testing.assert_close(x.grad, again.grad)
    assert counter.frame_count <= 2


def test_bad_calls_are_refused_with_the_rule_and_what_was_got():
    cases = make_group("qkv", 4, 64, FP32, FP32, "cpu")
    parts = projections("qkv", cases, [case.leaves(()) for case in cases])
    x = cases[0].x
    with pytest.raises(ValueError, match="one to 3 layers, got 0"):
        ops.lora_group(x, [])
    with pytest.raises(ValueError, match="one to 3 layers, got 4"):
        ops.lora_group(x, [*parts, parts[0]])
    with pytest.raises(ValueError, match=r"layer 0 is \(48, 64\) and takes K=64 features, got x \(4, 32\)"):
        ops.lora_group(x[:, :32], parts)
    with pytest.raises(ValueError, match="1 has one of A and B"):
        ops.lora_group(x, [parts[0], parts[1]._replace(B=None)])
    with pytest.raises(TypeError, match="x is torch.bfloat16 but the weight of layer 0 is torch.float32"):
        ops.lora_group(x.bfloat16(), parts)
    trained = parts[2]._replace(weight=parts[2].weight.detach().requires_grad_())
    with pytest.raises(ValueError, match="the weight of 2 requires a gradient, which lora_group does not compute"):
        ops.lora_group(x, [*parts[:2], trained])
