"""The functional API on the torch route: values and every gradient against fp64, and what an op must do besides."""

import itertools

import bitsandbytes  # noqa: F401 - on a CPU `auto` dequantises with it where it is loaded
import pytest
import torch
import torch._dynamo.testing

from peft_fast import ops
from peft_fast.dispatch import use_route
from peft_fast.kernels import dropout, reference
from peft_fast.quant import bitsandbytes_kernels, blockwise, int8
from peft_fast.testing import assert_as_accurate_as_torch

from .lora_cases import LoraCase, autograd_truth, check_against_fp64, make_case

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("base", ["dense", "nf4", "fp4", "int8"])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 64, 64, 8), (7, 33, 71, 1), (64, 128, 96, 17), (0, 64, 32, 4)], ids=str)
def test_lora_linear(base, dtype, adapter, p, shape):
    case = make_case(*shape, dtype, adapter, base, p)
    for route in routes_of(case):
        check_against_fp64(case, backend="torch", route=route)


def test_fp32_x_is_kept_as_it_came_and_multiplied_in_the_dtype_asked_for():
    """As under prepare_model_for_kbit_training: a fp32 residual stream, 4-bit layers that compute in bf16."""
    case = make_case(33, 64, 96, 8, torch.float32, torch.float32, "nf4", 0.0)
    leaves = case.leaves(("x", "A", "B"))
    saved = saved_by(
        lambda: ops.lora_linear(leaves["x"], case.weight, leaves["A"], leaves["B"], 1.7, dtype=torch.bfloat16)
    )
    assert any(t.data_ptr() == case.x.data_ptr() for t in saved)
    assert not any(t.shape == case.x.shape and t.data_ptr() != case.x.data_ptr() for t in saved)  # no copy of x

    def run(x, A, B, cast, call):
        y = call(cast(x), A, B)
        return [y, *torch.autograd.grad(y, [x, A, B], case.d_y.to(y.dtype))]

    inputs = leaves["x"], leaves["A"], leaves["B"]
    ours = run(*inputs, lambda x: x, lambda x, A, B: ops.lora_linear(x, case.weight, A, B, 1.7, dtype=torch.bfloat16))
    casted = run(*inputs, lambda x: x.bfloat16(), lambda x, A, B: ops.lora_linear(x, case.weight, A, B, 1.7))
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(ours, casted))


def test_a_route_that_cannot_take_the_call_is_refused_with_the_reason():
    dense, case = (make_case(4, 32, 16, 2, torch.float32, torch.float32, base, 0.1) for base in ("dense", "nf4"))
    for route in ("merge", "fused"):
        with pytest.raises(ValueError, match=f"route {route} was asked for, but the weight is dense"):
            dense.run("torch", route=route)
    with pytest.raises(ValueError, match="route merge was asked for, but dropout is not a change of the weight"):
        case.run("torch", route="merge")
    with use_route("merge"), pytest.raises(ValueError, match="dropout"):
        case.run("torch")
    with pytest.raises(ValueError, match="route must be one of auto, split, merge, fused, got 'fast'"):
        case.run("torch", route="fast")


def test_merging_rounds_once():
    """An update far below half an ulp of the weight survives in the mean; on top of a rounded weight it would not."""
    weight = blockwise.quantize(torch.randn(64, 512) * 0.02, dtype=torch.bfloat16)
    A, B = torch.randn(8, 512) / 23, torch.randn(64, 8) * 1e-6
    W, delta = ops.dequantize(weight, torch.float32), B.bfloat16().float() @ A.bfloat16().float()
    assert delta.abs().median() < 0.1 * torch.finfo(torch.bfloat16).eps * W.abs().median() / 2
    merged, _ = reference.dequantize_merge(weight, A, B, 1.0, torch.bfloat16)
    rounded_first = (W.bfloat16() + delta.bfloat16()).bfloat16()

    def slope(changed, base):
        return ((changed.double() - base.double()) * delta).sum() / delta.double().square().sum()

    plain, _ = reference.dequantize_merge(weight, A, torch.zeros_like(B), 1.0, torch.bfloat16)
    assert torch.equal(plain, ops.dequantize(weight, torch.bfloat16))
    assert 0.8 < slope(merged, plain) < 1.2
    assert slope(rounded_first, W.bfloat16()) < 0.3


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_several_weights_are_dequantised_below_each_other(backend):
    formats = [(blockwise.quantize, ("nf4", 64, True)), (blockwise.quantize, ("fp4", 32, False)), (int8.quantize, ())]
    weights = [quantize(torch.randn(N, 192), *args) for N, (quantize, args) in zip((5, 64, 33), formats)]
    stacked = ops.dequantize(weights, torch.bfloat16, backend=backend)
    assert torch.equal(stacked, torch.cat([reference.dequantize(w, torch.bfloat16) for w in weights]))
    fmts = ";".join(str(w.format) for w in weights)
    tensors = [t for w in weights for t in w.tensors()]
    torch.library.opcheck(torch.ops.peft_fast.dequantize.default, (tensors, fmts, torch.float32, backend))
    with pytest.raises(ValueError, match=r"weights must have one K and one device, got \[\(\(5, 192\)"):
        ops.dequantize([weights[0], int8.quantize(torch.randn(3, 64))])


def test_row_norms_of_a_merged_weight():
    weight = blockwise.quantize(torch.randn(300, 70) * 0.02)
    A, B = torch.randn(4, 70), torch.randn(300, 4)
    merged, norms = reference.dequantize_merge(weight, A, B, 0.5, torch.float32, needs_norms=True)
    torch.testing.assert_close(norms, merged.norm(dim=1))


def test_every_subset_of_gradients():
    """What is not asked for is None and what is asked for does not change with the rest."""
    case = make_case(9, 32, 48, 4, torch.float32, torch.float32, "dense", 0.1)
    everything = case.run("torch", needs=("x", "A", "B", "bias", "weight"))
    names = ("x", "A", "B", "bias", "weight")
    for n in range(1, 6):
        for needs in itertools.combinations(names, n):
            grads = case.run("torch", needs=needs)
            assert set(grads) == {"y", *needs}
            for name in needs:
                torch.testing.assert_close(grads[name], everything[name])


def test_strided_and_broadcast_x():
    case = make_case(12, 64, 32, 8, torch.float32, torch.float32, "nf4", 0.0)
    strided = torch.randn(12, 128)[:, ::2]
    broadcast = torch.randn(1, 64).expand(12, 64)
    transposed = torch.randn(64, 12).t()
    for x in (strided, broadcast, transposed, torch.randn(2, 3, 2, 64)):
        y = ops.lora_linear(x, case.weight, case.A, case.B, case.scale, case.bias)
        assert y.shape == (*x.shape[:-1], 32)
        expected = ops.lora_linear(x.contiguous().view(-1, 64), case.weight, case.A, case.B, case.scale, case.bias)
        torch.testing.assert_close(y.reshape(-1, 32), expected)
    x = transposed.detach().requires_grad_()
    (dx,) = torch.autograd.grad(ops.lora_down(x, case.A).sum(), x)
    torch.testing.assert_close(dx, case.A.sum(0).expand(12, -1))
    assert dx.is_contiguous()  # as the op's fake says


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_the_two_halves(dtype, p):
    """lora_down and lora_up_add against fp64, bias on B included; y is not written to."""
    x, A = torch.randn(2, 7, 48, dtype=dtype), torch.randn(5, 48) / 7
    B, bias, y = torch.randn(36, 5), torch.randn(36), torch.randn(2, 7, 36, dtype=dtype)
    key = dropout.new_key("cpu")
    before, leaves = y.clone(), [t.requires_grad_() for t in (x, A, B, bias, y)]

    def halves(x, A, B, bias, y):
        s = ops.lora_down(x, A, dropout_p=p, dropout_key=key)
        return ops.lora_up_add(y, s, B, 1.5, bias)

    def plain(x, A, B, bias, y):
        s = reference.apply_dropout(x.reshape(14, 48), p, key) @ A.to(x.dtype).t()
        return y + bias.to(y.dtype) + 1.5 * (s @ B.to(s.dtype).t()).view(y.shape)

    d_out = torch.randn(2, 7, 36, dtype=dtype)
    results = [halves(*leaves), *torch.autograd.grad(halves(*leaves), leaves, d_out)]
    by_torch = [plain(*leaves), *torch.autograd.grad(plain(*leaves), leaves, d_out)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = [plain(*wide), *torch.autograd.grad(plain(*wide), wide, d_out.double())]
    for name, r, t, exact, leaf in zip(
        ["out", "dx", "dA", "dB", "dbias", "dy"], results, by_torch, truth, [y, *leaves]
    ):
        assert r.dtype == leaf.dtype
        assert_as_accurate_as_torch(name, r, t, exact)
    assert torch.equal(y, before)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_x_and_nothing_else(base, x_dtype):
    """fp32 A, B and base under bf16 autocast, x in fp32 or cast by the layer before: as accurate as torch under
    autocast, and no fp32 copy is kept."""
    case = make_case(33, 64, 96, 8, torch.float32, torch.float32, base, 0.0)
    case.x = case.x.to(x_dtype)
    saved = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        got = case.run("torch")
        by_torch = autograd_truth(case, lambda t: t, under_autocast=True)
    assert got["y"].dtype == torch.bfloat16
    truth = autograd_truth(case, torch.Tensor.double)
    for name, value in got.items():
        assert_as_accurate_as_torch(name, value, by_torch[name].to(value.dtype), truth[name])


def saved_by(call) -> list[torch.Tensor]:
    """What autograd keeps for the backward of this call."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return saved


def test_saved_for_backward_is_x_s_and_the_parameters():
    for base, p in itertools.product(("dense", "nf4"), (0.0, 0.1)):
        case = make_case(64, 128, 96, 8, torch.bfloat16, torch.float32, base, p)
        saved = saved_by(lambda case=case: case.call("torch", case.leaves(("x", "A", "B"))))
        known = {t.data_ptr() for t in [case.A, case.B, *case.weight_tensors()]}
        rest = sorted(t.nbytes for t in saved if t.data_ptr() not in known)
        assert rest == sorted([64 * 128 * 2, 64 * 8 * 2] + ([8] if p else []))  # x, s, the dropout key


def test_recomputation_under_checkpointing_draws_the_same_masks():
    case = make_case(16, 64, 32, 4, torch.float32, torch.float32, "dense", 0.3)

    def layer(x, A, B):
        key = ops.new_dropout_key("cpu")
        return ops.lora_linear(x, case.weight, A, B, 2.0, dropout_p=0.3, dropout_key=key).tanh()

    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(11)
        leaves = case.leaves(("x", "A", "B"))
        inputs = [leaves["x"], leaves["A"], leaves["B"]]
        if reentrant is None:
            y = layer(*inputs)
        else:
            y = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=reentrant)
        results.append(torch.autograd.grad(y.sum(), inputs) if not reentrant else _backward(y, inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def _backward(y, inputs):
    y.sum().backward()
    return [t.grad for t in inputs]


@pytest.mark.parametrize(("base", "route"), [("dense", "auto"), ("nf4", "auto"), ("nf4", "merge"), ("nf4", "fused")])
def test_compiles_whole_with_two_graphs_as_m_varies(base, route):
    case = make_case(8, 64, 32, 4, torch.float32, torch.float32, base, 0.0)
    p = 0.0 if route == "merge" else 0.1
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(x, A, B, key):
        y = ops.lora_linear(x, case.weight, A, B, 2.0, case.bias, dropout_p=p, dropout_key=key, route=route)
        return y.relu()

    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for M in (2, 5, 8, 16, 33, 64):
        x = torch.randn(M, 64)
        key, leaves = ops.new_dropout_key("cpu"), [t.clone().requires_grad_() for t in (x, case.A, case.B)]
        results = []
        for function in (compiled, f):
            y = function(*leaves, key)
            results.append([y, *torch.autograd.grad(y.sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_opcheck(base, p):
    opcheck_all(make_case(8, 64, 32, 4, torch.float32, torch.float32, base, p), "torch")


def routes_of(case: LoraCase) -> list[str]:
    """All that the case can take."""
    return ["auto", "split"] if not case.quantized else ["auto", "split", "fused", *(["merge"] if not case.p else [])]


def opcheck_all(case: LoraCase, backend: str) -> None:
    """torch's own checks of schema, fake tensors and tracing for every op, on one case."""
    tensors, fmt = (case.weight.tensors(), str(case.weight.format)) if case.quantized else ([case.weight], "")
    x, A, B, key, p = case.x, case.A, case.B, case.key if case.p else None, case.p
    s, dy = torch.randn(x.shape[0], A.shape[0]), torch.randn(x.shape[0], B.shape[0])
    lib = torch.ops.peft_fast
    calls = [
        *(
            (lib.lora_linear, (x, tensors, fmt, case.bias, A, B, 2.0, p, key, x.dtype, trained, backend, route))
            for trained in (True, False)
            for route in routes_of(case)
        ),
        *(
            (lib.lora_linear_backward, (dy, x, s, tensors, fmt, A, B, 2.0, p, key, needs, True, backend, route))
            for needs in ([True, True, True], [False, True, False])
            for route in routes_of(case)
        ),
        (lib.lora_down, (x, A, p, key, backend)),
        (lib.lora_down_backward, (s, x, A, p, key, [True, True], backend)),
        (lib.lora_down_backward, (s, x.t().contiguous().t(), A, p, key, [True, True], backend)),
        (lib.lora_up_add_, (dy.clone(), s, B, 2.0, case.bias, backend)),
        (lib.lora_up_backward, (dy, s, B, 2.0, [True, True], backend)),
    ]
    if fmt:
        calls += [
            (lib.dequantize, (tensors, fmt, torch.float32, backend)),
            (lib.quant_matmul, (x, tensors, fmt, case.bias, backend)),
            (lib.quant_matmul_dx, (dy, tensors, fmt, backend)),
        ]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in calls:
        # Merging leaves s uninitialised for the backward to fill: it cannot be compared with itself. The compiled
        # layer is (test_compiles_whole_with_two_graphs_as_m_varies).
        merges = op is lib.lora_linear and args[-1] == "merge"
        torch.library.opcheck(op.default, args, test_utils=tests[:3] if merges else tests)


def test_what_is_dropped_does_not_matter():
    """inf in a dropped element vanishes; multiplied by zero it would leave NaN."""
    key = dropout.new_key("cpu")
    x = torch.randn(8, 64)
    x[~dropout.mask(key, 8, 64, 0.5)] = float("inf")
    assert reference.lora_down(x, torch.randn(4, 64), 0.5, key).isfinite().all()
    assert reference.lora_down_backward(torch.randn(8, 4), x, torch.randn(4, 64), 0.5, key).isfinite().all()


def test_what_is_not_multiplied_in_is_refused():
    case = make_case(4, 32, 16, 2, torch.float32, torch.float32, "nf4", 0.0)
    x, W, A, B = case.x, case.weight, case.A, case.B
    for bad in (x.long(), x.to(torch.float8_e4m3fn)):
        with pytest.raises(TypeError, match=rf"x is {bad.dtype}, which is not multiplied in: cast it to one of"):
            ops.lora_linear(bad, W, A, B, 1.0)
        with pytest.raises(TypeError, match="x is"):
            ops.quant_matmul(bad, W)
    with pytest.raises(TypeError, match="A is torch.int8"):
        ops.lora_linear(x, W, A.to(torch.int8), B, 1.0)
    with pytest.raises(ValueError, match="x must have at least one dimension"):
        ops.lora_linear(torch.tensor(1.0), W, A, B, 1.0)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_own_product(quant_type, nested):
    """What its fused kernel is given; on a CPU its default implementation takes the same arguments."""
    weight = blockwise.quantize(torch.randn(48, 128), quant_type, 64, nested)
    x, bias = torch.randn(5, 128), torch.randn(48)
    for b in (None, bias):
        torch.testing.assert_close(bitsandbytes_kernels.matmul(x, weight, b), reference.quant_matmul(x, weight, b))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_takes_one_route(reentrant, monkeypatch):
    """Its first forward runs without gradients: that must not be taken for inference, which may merge."""
    from bench.counts import as_on_a_gpu
    from peft_fast.ops import table

    case = make_case(512, 64, 64, 8, torch.bfloat16, torch.float32, "nf4", 0.0)
    leaves, routes = case.leaves(("x", "A", "B")), []
    pick = table._linear
    monkeypatch.setattr(table, "_linear", lambda *args: routes.append(pick(*args).route) or pick(*args))
    monkeypatch.setattr(table._linear, "cache_clear", pick.cache_clear, raising=False)
    with as_on_a_gpu():
        y = torch.utils.checkpoint.checkpoint(
            lambda x, A, B: ops.lora_linear(x, case.weight, A, B, 1.0),
            *(leaves[name] for name in ("x", "A", "B")),
            use_reentrant=reentrant,
        )
        y.sum().backward()
    assert set(routes) == {"split"}
    assert len(routes) == 3  # forward, forward again, backward


def test_bad_calls_are_refused_with_the_rule_and_what_was_got():
    case = make_case(4, 32, 16, 2, torch.float32, torch.float32, "dense", 0.0)
    x, W, A, B = case.x, case.weight, case.A, case.B
    with pytest.raises(ValueError, match=r"x must have K=32 features .* got \(4, 31\)"):
        ops.lora_linear(x[:, 1:], W, A, B, 1.0)
    with pytest.raises(ValueError, match=r"A must be \[R, 32\] and B \[16, R\], got \(2, 31\)"):
        ops.lora_linear(x, W, A[:, 1:], B, 1.0)
    with pytest.raises(TypeError, match=r"x is torch.float16 but the weight is torch.float32: cast one"):
        ops.lora_linear(x.half(), W, A, B, 1.0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1.5"):
        ops.lora_linear(x, W, A, B, 1.0, dropout_p=1.5)
    with pytest.raises(ValueError, match=r"needs dropout_key"):
        ops.lora_linear(x, W, A, B, 1.0, dropout_p=0.5)
    key = dropout.new_key("cpu")
    for bad in (key[:1], key.long(), key.expand(2, 2)):
        with pytest.raises(ValueError, match=r"dropout_key must be int32 \[2\]"):
            ops.lora_linear(x, W, A, B, 1.0, dropout_p=0.5, dropout_key=bad)
    with pytest.raises(ValueError, match=r"bias must be \[16\], one value an output feature, got \(1,\)"):
        ops.lora_linear(x, W, A, B, 1.0, torch.zeros(1))
    with pytest.raises(ValueError, match=r"bias must be \[16\]"):
        ops.lora_up_add(torch.zeros(4, 16), x[:, :2], B, 1.0, torch.zeros(16, 1))
    for name, tensors in {"A": (W, A.to("meta"), B), "B": (W, A, B.to("meta")), "weight": (W.to("meta"), A, B)}.items():
        with pytest.raises(ValueError, match=rf"on one device: x is on cpu, {name} on meta"):
            ops.lora_linear(x, *tensors, 1.0)
    with pytest.raises(ValueError, match=r"on one device: x is on meta, weight on cpu"):
        ops.quant_matmul(x.to("meta"), blockwise.quantize(W))
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, torch, got 'cuda'"):
        ops.lora_linear(x, W, A, B, 1.0, backend="cuda")
    with pytest.raises(ValueError, match=r"A must be \[R, K\] with K=32"):
        ops.lora_down(x, A[:, 1:])
    with pytest.raises(ValueError, match=r"y must be \[..., 16\]"):
        ops.lora_up_add(x, x[:, :2], B, 1.0)
    with pytest.raises(TypeError, match=r"one dtype"):
        ops.lora_up_add(torch.zeros(4, 16), x[:, :2].half(), B, 1.0)
    with pytest.raises(ValueError, match=r"x must have K=32"):
        ops.quant_matmul(x[:, 1:], blockwise.quantize(W))


def test_a_weight_that_is_no_matrix():
    with pytest.raises(ValueError, match=r"weight must be a matrix \[N, K\], got \(8,\): flatten it"):
        ops.lora_linear(torch.zeros(3, 8), torch.zeros(8), torch.zeros(2, 8), torch.zeros(4, 2), 1.0)
