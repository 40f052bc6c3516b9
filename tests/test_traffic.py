"""Bytes of launches (bench/traffic.py): the rule on known cases, kernels by the addresses that they load and store in
the interpreter, and what a Llama layer moves beside HF PEFT's."""

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F

import peft_fast
from bench.counts import SHAPES_ONLY, base_bytes, layer_passes, llama_layer, measure, passes
from bench.traffic import BY_TABLE, KERNELS, extent, of_kernel
from peft_fast.dispatch import use_backend, use_route
from peft_fast.ops import group_rows, lora_embedding, lora_group, lora_up_add, scale_columns
from peft_fast.quant.bitsandbytes import read_linear

from . import embedding_cases, lora_cases, mlp_cases, test_lora_group
from .conftest import INTERPRETING


@pytest.fixture(autouse=True)
def _eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def nbytes(run) -> int:
    return measure(run)[1].nbytes.total()


def test_views_count_what_they_address():
    x = torch.zeros(6, 8)
    assert extent(x).nbytes == 6 * 8 * 4
    assert extent(x) == extent(x.t()) == extent(x.view(-1)) == extent(x.view(2, 3, 8)) == extent(x[None])
    assert extent(x[:, :3]).nbytes == 6 * 3 * 4
    assert extent(x[1:]) != extent(x[:-1])
    assert extent(x[1:]).nbytes == extent(x[:-1]).nbytes == 5 * 8 * 4
    assert extent(x[:1].expand(100, 8)).nbytes == 8 * 4
    assert extent(x[:, ::2]).nbytes == 6 * 4 * 4
    assert extent(x[:0]).nbytes == 0
    assert extent(x.half()).nbytes == 6 * 8 * 2
    assert extent(torch.tensor(1.0)).nbytes == 4


def test_ops_read_each_input_once_and_write_their_outputs():
    x, W, b = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    assert nbytes(lambda: F.linear(x, W, b)) == 4 * (4 * 8 + 6 * 8 + 6 + 4 * 6)
    assert nbytes(lambda: x + x) == 4 * 2 * 32
    assert nbytes(lambda: x @ x.t()) == 4 * (32 + 16)
    assert nbytes(lambda: x + x[:1]) == 4 * (32 + 8 + 32)
    assert nbytes(lambda: torch.cat([x, x, W])) == 4 * (32 + 48 + 14 * 8)
    assert nbytes(lambda: x.half()) == 32 * (4 + 2)
    assert nbytes(lambda: x.sum()) == 4 * (32 + 1)
    assert nbytes(lambda: x.view(2, 16).t()) == 0
    assert nbytes(lambda: torch.zeros(5, 5)) == 4 * 25


def test_in_place_ops_read_what_they_change_unless_they_overwrite_it():
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    assert nbytes(lambda: x.mul_(2)) == 4 * 2 * 32
    assert nbytes(lambda: x.add_(y)) == 4 * 3 * 32
    assert nbytes(lambda: x.copy_(y)) == 4 * 2 * 32
    assert nbytes(lambda: x.zero_()) == 4 * 32
    assert nbytes(lambda: torch.mm(x, y.t(), out=torch.empty(4, 4))) == 4 * (2 * 32 + 16)
    out = torch.randn(4, 4)
    assert nbytes(lambda: out.addmm_(x, y.t())) == 4 * (2 * 32 + 2 * 16)


def test_dropout_keeps_a_byte_an_element_as_on_a_gpu():
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    y, forward = measure(lambda: F.dropout(x, 0.5))
    assert forward.nbytes == {"aten.native_dropout": 32 * (2 + 2 + 1)}
    _, backward = measure(lambda: torch.autograd.grad(y, x, torch.ones_like(x)))
    assert backward.nbytes["aten.native_dropout_backward"] == 32 * (2 + 1 + 2)


@pytest.mark.parametrize("library", [peft, peft_fast], ids=["peft", "peft_fast"])
@pytest.mark.parametrize(("bits", "p"), [(4, 0.05), (16, 0.0)])
def test_what_is_not_carried_out_is_counted_alike(library, bits, p):
    model, x = llama_layer(library, 256, p, bits), torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    dy = [torch.randn(64, n, dtype=torch.bfloat16) for n in (64, 64, 256)]
    with use_route("split"):
        found = [passes(model, x, dy, triton=library is peft_fast, carried_out=n) for n in (SHAPES_ONLY, 1000)]
    for by_values, by_shapes in zip(*found):
        assert by_values.counted.ops == by_shapes.counted.ops
        assert by_values.counted.nbytes == by_shapes.counted.nbytes
        assert by_values.extra > 0


def test_what_is_not_carried_out_is_not():
    x = torch.ones(1024, 1024)
    measure(lambda: x.add_(1), carried_out=x.numel() - 1)
    assert x.max() == 1
    measure(lambda: x.add_(1), carried_out=x.numel())
    assert x.max() == 2


def test_bytes_of_the_base_layers():
    """q, k, v, o, gate, up and down of width 256: x, W and y in 16 bits; W in 4 bits with nested scales and in 16."""
    layers = [m.base_layer for m in llama_layer(peft, 256, 0.0, 4).modules() if hasattr(m, "base_layer")]
    sizes = [(256, 256), (64, 256), (64, 256), (256, 256), (896, 256), (896, 256), (256, 896)]
    products, dequantised = base_bytes(layers, 32)
    assert products == sum(2 * (32 * (N + K) + N * K) for N, K in sizes)
    assert dequantised == sum(read_linear(layer).nbytes for layer in layers) + sum(2 * N * K for N, K in sizes)
    weights = sum(N * K for N, K in sizes)
    assert 2.5 + 1 / 64 < dequantised / weights < 2.5 + 1 / 64 + 1 / 64 / 64 + 7 * 1200 / weights  # codebooks


@pytest.mark.parametrize(("p", "per_product"), [(0.0, 0), (0.05, 5)])
def test_pefts_extra_is_what_its_code_says(p, per_product):
    """A clone, the scaling, the sum and B's product: 16 bytes an element of y; A's product: 2 of x; dropout: 5 of x."""
    hidden, tokens, R = 256, 128, 16
    forward, _ = layer_passes(peft, tokens, 4, p, hidden)
    sizes = [(256, 256), (64, 256), (64, 256), (256, 256), (896, 256), (896, 256), (256, 896)]
    activations = tokens * sum(16 * N + (2 + per_product) * K for N, K in sizes)
    swiglu = tokens * 896 * (4 + 6)  # silu and its product with up's output, two launches
    factors = 2 * R * sum(N + K for N, K in sizes) + 2 * 2 * tokens * R * len(sizes)  # A, B; s written and read
    assert forward.extra == activations + swiglu + factors


# bits, dropout, route: the most of peft's extra bytes, forward and backward.
LIMITS = {(4, 0.0, "split"): (0.35, 0.45), (4, 0.05, "split"): (0.28, 0.38), (4, 0.0, "merge"): (0.16, 0.36)}


@pytest.mark.parametrize(
    ("bits", "p", "route"),
    [case if case[2] == "merge" else pytest.param(*case, marks=pytest.mark.slow) for case in LIMITS],
)
def test_extra_traffic_of_a_llama_layer(bits, p, route):
    """At Llama-3-8B's width and 4096 tokens."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # GB of it
    theirs, ours = (layer_passes(library, 4096, bits, p, route=route) for library in (peft, peft_fast))
    for their, our, most in zip(theirs, ours, LIMITS[bits, p, route]):
        assert our.extra <= most * their.extra, (our.extra / their.extra, our.counted.nbytes)
        if route == "split":  # merging is dequantising: its limits leave no room for it
            assert our.with_dequantising <= most * their.with_dequantising


class Accesses:
    """Within, every launch in the interpreter is checked against the rule: the bytes that it loads and stores."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []

    def __enter__(self):
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

        self.originals = load, store, run = (
            InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, InterpretedFunction.run,
        )  # fmt: skip

        def create_masked_load(builder, ptrs, mask, *rest):
            out = load(builder, ptrs, mask, *rest)
            self.read.append(addresses(ptrs.data, mask.data, out.data.itemsize))
            return out

        def create_masked_store(builder, ptrs, value, mask, *rest):
            itemsize = ptrs.get_element_ty().primitive_bitwidth // 8
            self.written.append(addresses(ptrs.data, mask.data, itemsize))
            return store(builder, ptrs, value, mask, *rest)

        def checked_run(kernel, *args, grid, warmup, **kwargs):
            self.read, self.written = [], []
            run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
            given = dict(zip(kernel.arg_names, args)) | kwargs
            self.check(kernel.fn.__name__.strip("_"), given)

        InterpreterBuilder.create_masked_load = create_masked_load
        InterpreterBuilder.create_masked_store = create_masked_store
        InterpretedFunction.run = checked_run
        return self

    def __exit__(self, *_):
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, InterpretedFunction.run = (
            self.originals
        )

    def check(self, name: str, given: dict) -> None:
        self.launches.append(name)
        tensors = {key: extent(value) for key, value in given.items() if isinstance(value, torch.Tensor)}
        moved = sum(np.unique(np.concatenate(found)).size for found in (self.read, self.written) if found)
        expected = of_kernel(name, tensors, given)
        if name == "lora_up_bwd_kernel" and not given["NEEDS_DS"]:
            unused = {e for key, e in tensors.items() if key.startswith("b")}  # loaded: the compiler leaves it out
            moved -= sum(e.nbytes for e in unused)
        entry = 0
        if "nested_code_ptr" in tensors:  # of 256 entries small weights have few; what lies outside reads the first
            entry = 4
            expected -= tensors["nested_code_ptr"].nbytes - entry * given["absmax_ptr"].unique().numel()
        assert expected <= moved <= expected + entry, name


def addresses(pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> np.ndarray:
    """Of every byte that is accessed."""
    first = np.unique(pointers[mask.astype(bool)].astype(np.int64))
    return (first[:, None] + np.arange(itemsize)).reshape(-1)


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.skipif(not INTERPRETING, reason="looks into the interpreter")
def test_kernels_load_and_store_what_the_rule_says():
    FP16, FP32 = torch.float16, torch.float32
    with Accesses() as seen, use_backend("triton"):
        for base, route, p in (
            ("dense", "split", 0.0), ("nf4", "split", 0.1), ("nf4", "merge", 0.0), ("nf4", "fused", 0.1),
            ("int8", "split", 0.0), ("int8", "fused", 0.0),
        ):  # fmt: skip
            for M in (3, 40):
                case = lora_cases.make_case(M, 64, 70, 17, FP32, FP32, base, p)
                case.run("triton", route=route)
                case.run("triton", needs=("A",), route=route)
                case.run("triton", needs=("x",), route=route)
        for kind in ("qkv", "mixed"):  # in one launch, and one by one
            cases = test_lora_group.make_group(kind, 40, 64, FP16, FP16, "cpu")
            leaves = [case.leaves() for case in cases]
            y = lora_group(leaves[0]["x"], test_lora_group.projections(kind, cases, leaves))
            torch.autograd.grad(y, leaves[0]["x"], [case.d_y for case in cases])
        lora_up_add(torch.randn(9, 33), torch.randn(9, 5), torch.randn(33, 5), 0.5, torch.randn(33))
        for ranks, dtype in (((4, 0, 4), FP32), ((4, 4, 4), FP16)):
            mlp_cases.make_case(20, 48, 64, ranks, dtype, dtype, "dense", 0.1).run()
        z, factor = torch.randn(70, 300, requires_grad=True), torch.randn(300, requires_grad=True)
        for wanted in ([z, factor], [z], [factor]):
            torch.autograd.grad(scale_columns(z, factor).sum(), wanted)
        case = embedding_cases.make_case(*embedding_cases.SHAPES[0], FP32, FP32, "cpu")
        V = case.A.shape[1]
        A, B = (t.detach().requires_grad_() for t in (case.A, case.B))
        y = lora_embedding(torch.randperm(V), case.weight, A, B, 1.0)
        torch.autograd.grad(y.sum(), [A, B])
        group_rows(torch.arange(3), 3)  # as many pieces as there can be
    assert set(seen.launches) == set(KERNELS) - BY_TABLE
