"""lora_mlp: three projections and their activation as one function, against fp64 and against the layers one by one."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing

from peft_fast import ops
from peft_fast.dispatch import TritonUnsupported
from peft_fast.kernels import triton_ops
from peft_fast.quant import bitsandbytes_kernels
from peft_fast.testing import assert_as_accurate_as_torch

from .mlp_cases import ACTIVATIONS, NAMES, MlpCase, autograd_truth, check_against_fp64, make_case, truth

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16)]
RANKS = [(5, 8, 17), (8, 0, 4), (0, 8, 0), (0, 0, 4)]  # 0: no adapter


def routes_of(base: str, p: float) -> list[str]:
    return ["auto"] if base == "dense" else ["auto", "fused", *([] if p else ["merge"])]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_output_and_gradients(base, dtype, adapter, p, recompute):
    for ranks, route in itertools.product(RANKS, routes_of(base, p)):
        case = make_case(33, 40, 71, ranks, dtype, adapter, base, p)
        check_against_fp64(case, backend="torch", route=route, recompute=recompute)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_activations(activation, dtype):
    check_against_fp64(make_case(33, 64, 96, (8, 8, 8), dtype, FP32, "dense", 0.0, activation))


def test_no_tokens():
    case = make_case(0, 32, 64, (4, 4, 4), FP32, FP32, "nf4", 0.1)
    for recompute in (False, True):
        got = case.run(recompute=recompute)
        assert got["y"].shape == (0, 32)
        assert all(not grad.any() for grad in got.values())


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_fp32_residual_stream(base, p):
    """Layers that compute in bf16 inside a fp32 stream: at most 1.5 times the error of the unfused layers, which take
    the activation of rounded g and u in fp32 and round h once, too."""
    case = make_case(64, 64, 128, (8, 8, 8), FP32, FP32, base, p)
    by_torch, exact = autograd_truth(case, lambda t: t, product_dtype=BF16), truth(case)
    got = case.run(dtype=BF16)
    assert {name: t.dtype for name, t in got.items()} == {"y": BF16, **dict.fromkeys(case.leaves(), FP32)}
    for name, value in got.items():
        assert_as_accurate_as_torch(name, value, by_torch[name].to(value.dtype), exact[name], BF16)


@pytest.mark.parametrize("x_dtype", [FP32, BF16], ids=str)
def test_autocast(x_dtype):
    """fp32 weights, and an x that may have been cast already by the layer before."""
    case = make_case(64, 64, 128, (8, 8, 8), FP32, FP32, "dense", 0.1)
    case = replace(case, x=case.x.to(x_dtype))
    with torch.autocast("cpu", BF16):
        got = case.run()
        by_torch = autograd_truth(case, lambda t: t)
    exact = autograd_truth(case, torch.Tensor.double)
    assert got["y"].dtype == BF16
    for name, value in got.items():
        assert_as_accurate_as_torch(name, value, by_torch[name].to(value.dtype), exact[name], BF16)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_every_subset_of_gradients(base, recompute):
    """What is not asked for is None, and what is asked for does not change with the rest."""
    case = make_case(9, 32, 48, (4, 4, 4), FP32, FP32, base, 0.1)
    everything, names = case.run(), list(case.leaves())
    subsets = [s for n in (1, 2, 9) for s in itertools.combinations(names, n)]
    for route, needs in itertools.product(routes_of(base, 0.1)[:2], subsets):
        leaves = case.fresh(needs)
        case.call(leaves, recompute=recompute, route=route).backward(case.d_y)
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needs)
        for name in needs:
            torch.testing.assert_close(leaves[name].grad, everything[name])


def test_a_kept_graph_can_be_run_again():
    """Nothing that was saved is written over."""
    for base, recompute, route in [("dense", False, "auto"), ("nf4", True, "auto"), ("nf4", False, "merge")]:
        case = make_case(9, 32, 48, (4, 4, 4), FP32, FP32, base, 0.0)
        leaves = case.fresh(list(case.leaves()))
        y = case.call(leaves, recompute=recompute, route=route)
        first = torch.autograd.grad(y, list(leaves.values()), case.d_y, retain_graph=True)
        again = torch.autograd.grad(y, list(leaves.values()), case.d_y)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def saved_by(case: MlpCase, **options) -> list[torch.Tensor]:
    """What autograd keeps for the backward, but for the case's own tensors."""
    leaves, saved = case.fresh(list(case.leaves())), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.call(leaves, **options)
    parts = [tensor for p in case.projections.values() for tensor in p.tensors()[0] if tensor is not None]
    known = {t.data_ptr() for t in [case.x, *parts]}
    return [t for t in saved if t.data_ptr() not in known and t.numel()]


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_kept_for_the_backward(base, p):
    case = make_case(64, 32, 48, (4, 8, 2), FP32, FP32, base, p)
    kept = sorted((tuple(t.shape), t.dtype) for t in saved_by(case, dtype=BF16))
    assert kept == sorted([((64, 48), BF16), ((64, 48), BF16), ((64, 4 + 8), BF16), ((64, 2), BF16)])
    assert saved_by(case, dtype=BF16, recompute=True) == []


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same():
    case = make_case(9, 32, 48, (4, 4, 4), FP32, FP32, "nf4", 0.0)
    expected = case.run()["y"]
    with torch.no_grad():
        assert torch.equal(case.call(case.fresh([])), expected)
    y = case.call(case.fresh([]))
    assert y.grad_fn is None
    assert torch.equal(y, expected)


def test_strided_x_and_more_axes():
    case = make_case(12, 32, 48, (4, 4, 4), FP32, FP32, "dense", 0.0)
    for x in (torch.randn(12, 64)[:, ::2], torch.randn(1, 32).expand(12, 32), torch.randn(2, 3, 2, 32)):
        y = replace(case, x=x).call({**case.fresh([]), "x": x})
        assert y.shape == x.shape
        expected = case.call({**case.fresh([]), "x": x.contiguous().view(-1, 32)})
        torch.testing.assert_close(y.reshape(-1, 32), expected)


def test_recomputation_under_checkpointing():
    case = make_case(16, 32, 48, (4, 4, 4), FP32, FP32, "dense", 0.3)
    names = list(case.leaves())

    def layer(*tensors):
        key = ops.new_dropout_key("cpu")
        case.projections["down"] = case.projections["down"]._replace(dropout_key=key)
        return case.call(dict(zip(names, tensors))).tanh()

    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(11)
        inputs = list(case.fresh(names).values())
        if reentrant is None:
            layer(*inputs).sum().backward()
        else:
            torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=reentrant).sum().backward()
        results.append([t.grad for t in inputs])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_compiles_whole_with_two_graphs_as_m_varies(base, recompute):
    case = make_case(8, 32, 48, (4, 0, 4), FP32, FP32, base, 0.1)
    names = list(case.leaves())
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(*tensors):
        return case.call(dict(zip(names, tensors)), recompute=recompute).relu()

    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for M in (2, 5, 8, 16, 33):
        leaves = {**case.fresh(names), "x": torch.randn(M, 32, requires_grad=True)}
        results = []
        for function in (compiled, f):
            y = function(*leaves.values())
            results.append([y, *torch.autograd.grad(y.sum(), list(leaves.values()))])
        assert all(torch.equal(a, b) for a, b in zip(*results))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_opcheck(base):
    for ranks, p in (((4, 0, 4), 0.1), ((4, 4, 4), 0.0)):
        opcheck_all(make_case(8, 32, 48, ranks, FP32, FP32, base, p), "torch")


KINDS = list(itertools.product((False, True), repeat=2))


def opcheck_all(case: MlpCase, backend: str, kinds: list[tuple[bool, bool]] = KINDS) -> None:
    """torch's own checks of schema, fake tensors and tracing, forward (training, recompute: `kinds`) and backward."""
    packed = [case.projections[name].tensors() for name in NAMES]
    tensors, fmts = [part for part, _ in packed], [fmt for _, fmt in packed]
    scales, ps = ([getattr(p, part) for p in case.projections.values()] for part in ("scale", "dropout_p"))
    given = (*tensors, fmts, scales, ps, case.activation)
    F, none = tensors[0][4].shape[0] if not fmts[0] else 48, case.x.new_empty(0)
    g, u = torch.randn(2, case.x.shape[0], F, dtype=case.x.dtype)
    of_gate, of_up, of_down = (0 if t[0] is None else t[0].shape[0] for t in tensors)
    s = [torch.randn(case.x.shape[0], R, dtype=case.x.dtype) for R in (of_gate + of_up, of_down)]
    lib = torch.ops.peft_fast
    for training, recompute in kinds:
        torch.library.opcheck(
            lib.lora_mlp.default, (case.x, *given, case.x.dtype, training, recompute, True, backend, "auto")
        )
    needs = [True] * 4 + [of_up > 0] * 2 + [True] * 4
    for recompute, kept in [(False, (g, u, s)), (True, (none, none, [none] * 2))]:
        args = (case.d_y, case.x, *kept, *given, needs, recompute, True, backend, "auto")
        torch.library.opcheck(lib.lora_mlp_backward.default, args)


def test_bad_calls_are_refused_with_the_rule_and_what_was_got():
    case = make_case(4, 32, 48, (2, 2, 2), FP32, FP32, "dense", 0.0)
    parts = list(case.projections.values())
    gate, up, down = parts

    def call(*given, activation="silu", x=case.x, **options):
        return ops.lora_mlp(x, *given, activation, **options)

    with pytest.raises(ValueError, match="activation must be one of silu, gelu, gelu_tanh, got 'relu'"):
        call(*parts, activation="relu")
    with pytest.raises(ValueError, match=r"\[F, K\] and down \[N, F\], got \(48, 32\), \(32, 48\) and \(32, 48\)"):
        call(gate, down, down)
    with pytest.raises(ValueError, match=r"x must have K=32 features .* got \(4, 31\)"):
        call(*parts, x=case.x[:, 1:])
    with pytest.raises(ValueError, match="up has one of A and B"):
        call(gate, up._replace(A=None), down)
    with pytest.raises(ValueError, match=r"gate: A must be \[R, 32\] and B \[48, R\], got \(2, 31\)"):
        call(gate._replace(A=gate.A[:, 1:]), up, down)
    with pytest.raises(ValueError, match=r"bias must be \[32\]"):
        call(gate, up, down._replace(bias=gate.bias))
    with pytest.raises(ValueError, match="needs dropout_key"):
        call(gate, up, down._replace(dropout_p=0.5, dropout_key=None))
    with pytest.raises(ValueError, match=r"x is on cpu, up.B on meta"):
        call(gate, up._replace(B=up.B.to("meta")), down)
    with pytest.raises(ValueError, match="the weight of gate requires a gradient"):
        call(gate._replace(weight=gate.weight.detach().requires_grad_()), up, down)
    with pytest.raises(TypeError, match="x is torch.float16 but the weight of gate is torch.float32"):
        call(*parts, x=case.x.half())
    with pytest.raises(ValueError, match="route merge was asked for, but the weight is dense"):
        call(*parts, route="merge")
    with pytest.raises(TritonUnsupported):
        call(*parts, backend="triton")


@pytest.mark.kernel
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_triton_route(base, dtype, p, device):
    for recompute, ranks, route in [(False, (5, 8, 17), "auto"), (True, (8, 0, 4), routes_of(base, p)[-1])]:
        case = make_case(33, 40, 72, ranks, dtype, FP32, base, p, device=device)
        check_against_fp64(case, backend="triton", recompute=recompute, route=route)


def gates(monkeypatch) -> list[str]:
    """Fills with "in one" for every backward through the gate in one launch, "alone" for every other."""
    found: list[str] = []

    def watch(name: str, kind: str) -> None:
        original = getattr(triton_ops, name)
        monkeypatch.setattr(triton_ops, name, lambda *args, **options: found.append(kind) or original(*args, **options))

    watch("lora_glu_backward_", "in one")
    watch("glu_backward_", "alone")
    return found


@pytest.mark.kernel
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_gate_in_one_launch(base, p, recompute, device, monkeypatch):
    """Where all three layers have adapters; the gradients do not change with what is asked for, nor when a graph is run
    again, and what forward and backward agree on does not hang on bitsandbytes being imported in between."""
    case = make_case(17, 40, 48, (5, 8, 17), FP16, FP32, base, p, device=device)
    found = gates(monkeypatch)
    check_against_fp64(case, backend="triton", recompute=recompute)
    assert set(found) == {"in one"}
    everything, names = case.run(backend="triton", recompute=recompute), list(case.leaves())
    del found[:]
    of_down = [name for name in names if name.startswith("down")]
    for needs in (["x"], ["gate.B"], ["up.A", "down.B"], ["down.A"], ["down.B"], of_down, names):
        leaves = case.fresh(needs)
        monkeypatch.setattr(bitsandbytes_kernels, "is_loaded", lambda: False)
        y = case.call(leaves, backend="triton", recompute=recompute)
        monkeypatch.setattr(bitsandbytes_kernels, "is_loaded", lambda: True)
        for _ in range(2):
            grads = torch.autograd.grad(y, [leaves[name] for name in needs], case.d_y, retain_graph=True)
            for name, grad in zip(needs, grads):  # down's alone take another way: dA's rows are added in another order
                tolerance = dict(rtol=1e-3, atol=1e-3) if needs[0].startswith("down") else dict(rtol=0, atol=0)
                torch.testing.assert_close(grad, everything[name], **tolerance)
    assert found == ["in one"] * 8


@pytest.mark.kernel
def test_the_gate_alone(device, monkeypatch):
    """What the kernel does not take goes through the gate by itself, after LoRA's parts."""
    found = gates(monkeypatch)
    cases = [
        (make_case(9, 32, 48, (4, 4, 0), FP16, FP16, "dense", 0.0, device=device), {}),
        (make_case(9, 32, 48, (4, 0, 4), FP16, FP16, "dense", 0.0, device=device), {}),
        (make_case(9, 32, 48, (4, 4, 65), FP16, FP16, "dense", 0.0, device=device), {}),
        (make_case(9, 32, 72, (4, 4, 4), FP16, FP16, "dense", 0.0, device=device), {}),
        (make_case(9, 32, 48, (4, 4, 4), FP32, FP32, "dense", 0.0, device=device), {}),
        (make_case(17, 64, 64, (4, 4, 4), FP16, FP16, "nf4", 0.0, device=device), {"route": "merge"}),
    ]
    for case, options in cases:
        check_against_fp64(case, backend="triton", **options)
    assert found == ["alone"] * len(cases)


@pytest.mark.kernel
def test_the_triton_route_for_no_tokens(device):
    case = make_case(0, 32, 64, (4, 4, 4), FP32, FP32, "dense", 0.1, device=device)
    assert all(not grad.any() for grad in case.run(backend="triton").values())


@pytest.mark.kernel
@pytest.mark.slow
def test_opcheck_of_the_triton_route(device):
    if device == "cpu":
        opcheck_all(make_case(8, 32, 48, (4, 0, 4), FP32, FP32, "dense", 0.1), "triton", [(True, False)])
        opcheck_all(make_case(8, 32, 48, (4, 4, 4), FP32, FP32, "nf4", 0.0), "triton", [(True, True), (False, False)])
        opcheck_all(make_case(8, 32, 48, (4, 4, 4), FP16, FP32, "dense", 0.1), "triton", [(True, False), (True, True)])
