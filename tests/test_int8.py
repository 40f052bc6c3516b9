"""8-bit weights: the bytes against bitsandbytes, the values against the formula, and bitsandbytes' layer as it is
found before and after its own forward, copied, pickled and moved."""

import copy
import io
import pickle

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import numpy as np
import pytest
import torch
from torch import nn

from peft_fast import QuantizedLinear, ops, quantize_linear_layers
from peft_fast.quant import bitsandbytes, int8
from peft_fast.quant.bitsandbytes import read_linear, write_linear
from peft_fast.quant.state import from_state, state_keys, to_state
from peft_fast.quant.weight import DTYPES, Format, QuantizedWeight

SHAPES = [(1, 1), (1, 7), (3, 5), (33, 31), (64, 128), (130, 66), (7, 1000), (300, 1024)]


def random_weight(N: int, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(N, K) * 0.02).to(dtype)


def linear8bit(weight: torch.Tensor, has_fp16_weights: bool = False, bias: bool = False) -> nn.Module:
    N, K = weight.shape
    layer = bnb.nn.Linear8bitLt(K, N, bias=bias, has_fp16_weights=has_fp16_weights, threshold=6.0)
    layer.weight.data = weight.clone()
    return layer.to("cpu")


def linear(weight: torch.Tensor, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return a.format == b.format and all(torch.equal(*pair) for pair in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_gives_bitsandbytes_bytes(dtype):
    for N, K in SHAPES:
        w = random_weight(N, K, dtype)
        w[0] = 0
        codes, scales, _ = bnbf.int8_vectorwise_quant(w.half())
        mine = int8.quantize(w)
        assert torch.equal(mine.data.view(N, K), codes), (N, K)
        assert torch.equal(mine.absmax, scales)
        assert mine.check().format == Format("int8", N, K, K, dtype, 0)
        assert mine.nbytes == N * K + 4 * N


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_is_the_formula_and_bitsandbytes_bit_for_bit(dtype):
    for N, K in SHAPES:
        weight = int8.quantize(random_weight(N, K))
        scale = weight.absmax.numpy() * np.float32(1 / 127)
        values = weight.data.numpy().reshape(N, K).astype(np.float32) * scale[:, None].astype(np.float32)
        assert values.dtype == np.float32
        mine = ops.dequantize(weight, dtype)
        assert torch.equal(mine, torch.from_numpy(values).to(dtype)), (N, K)
        # what bitsandbytes multiplies by when it trains on a CPU, and in every backward
        theirs = weight.data.view(N, K).to(dtype).mul_(weight.absmax.unsqueeze(1).mul(1.0 / 127.0))
        assert torch.equal(mine, theirs), (N, K)


def first_forward(layer: nn.Module, training: bool) -> nn.Module:
    with torch.no_grad():
        layer.train(training)(torch.randn(2, layer.in_features))
    return layer


@pytest.mark.parametrize("when", ["before", "trained", "evaluated"])
def test_a_layer_of_bitsandbytes_is_read_in_place(when):
    """Its first forward moves the scales from the weight to the state."""
    w = random_weight(48, 64)
    layer = linear8bit(w)
    scales = layer.weight.SCB
    if when != "before":
        first_forward(layer, training=when == "trained")
        assert layer.weight.SCB is None
    for _ in range(2):
        weight = read_linear(layer).check()
        assert weight.data.data_ptr() == layer.weight.data_ptr()
        assert weight.absmax.data_ptr() == scales.data_ptr()
        assert same(weight, int8.quantize(w, dtype=torch.float16))
    first_forward(layer, training=True)  # nor does reading disturb it
    assert same(read_linear(layer), weight)


@pytest.mark.parametrize("used", [False, True])
def test_copied_pickled_cast_and_moved_layers_read_the_same(used):
    layer = linear8bit(random_weight(48, 64), bias=True)
    if used:
        first_forward(layer, training=True)
    expected = int8.quantize(ops.dequantize(read_linear(layer), torch.float32), dtype=torch.float16)
    copied = copy.deepcopy(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    others = {
        "copied": copied,
        "copied again": copy.deepcopy(copied),
        "pickled": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(file, weights_only=False),
        "half": nn.Sequential(copy.deepcopy(layer)).half()[0],
        "to": copy.deepcopy(layer).to("cpu"),
    }
    for name, other in others.items():
        weight = read_linear(other).check()
        assert weight.data.data_ptr() != read_linear(layer).data.data_ptr()
        assert same(weight, expected), name
        first_forward(other, training=True)
        assert same(read_linear(other), expected), name
    layer.weight = layer.weight.to("meta")  # torch cannot move the module itself there
    weight = read_linear(layer).check()
    assert {tensor.device.type for tensor in weight.tensors()} == {"meta"}
    assert layer.weight.dtype == torch.int8


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_written_is_what_bitsandbytes_computes_with(pickled, used, training):
    """A pickled layer has its codes twice: in the weight's own memory and in what its forward reads."""
    layer, x = linear8bit(random_weight(48, 64)), torch.randn(3, 64)
    if used:
        first_forward(layer, training)
    layer = pickle.loads(pickle.dumps(layer)) if pickled else layer
    new = int8.quantize(random_weight(48, 64), dtype=torch.float16)
    write_linear(layer, new)
    assert same(read_linear(layer), new)
    with torch.no_grad():
        y = layer.train(training)(x)
    torch.testing.assert_close(y, x @ ops.dequantize(new, torch.float32).t(), rtol=0, atol=1e-6 if training else 2e-2)
    assert same(read_linear(layer), new)
    for other in (int8.quantize(random_weight(48, 32), dtype=torch.float16), int8.quantize(random_weight(48, 64))):
        with pytest.raises(ValueError, match="must be equal"):
            write_linear(layer, other)


def test_layers_that_are_not_in_8_bits():
    with pytest.raises(ValueError, match="Linear8bitLt layer is not quantised yet"):
        read_linear(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))
    keeps = linear8bit(random_weight(48, 64), has_fp16_weights=True).requires_grad_(False)
    for _ in range(2):
        assert read_linear(keeps) is None
        assert not bitsandbytes.is_kbit(keeps)
        first_forward(keeps, training=False)
    assert keeps.state.CB is not None
    bitsandbytes.forget_codes(keeps)
    assert keeps.state.CB is None
    layer = first_forward(linear8bit(random_weight(4, 4)), training=True)
    bitsandbytes.forget_codes(layer)
    assert read_linear(layer).check()


def test_state_dicts_are_bitsandbytes_both_ways(tmp_path):
    w = random_weight(48, 64)
    theirs, ours = linear8bit(w, bias=True), QuantizedLinear.from_linear(linear(w, bias=True), "int8")
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict()) == ["weight", "bias", "SCB", "weight_format"]
    for key, value in theirs.state_dict().items():
        assert (state[key].dtype, state[key].shape) == (value.dtype, value.shape)
    other = linear8bit(random_weight(48, 64), bias=True)
    other.load_state_dict(state)
    assert same(read_linear(other), read_linear(theirs))
    mine = QuantizedLinear.from_linear(linear(torch.zeros(48, 64), bias=True), "int8")
    mine.load_state_dict(first_forward(theirs, training=True).state_dict())
    assert same(mine.quantized_weight, ours.quantized_weight)
    assert torch.equal(mine.bias, theirs.bias)
    assert mine.quantized_weight.data.data_ptr() != theirs.weight.data_ptr()


def test_states_that_are_wrong_leave_the_layer_as_it_was():
    layer = QuantizedLinear.from_linear(linear(random_weight(48, 64)), "int8")
    before, good = copy.deepcopy(layer).quantized_weight, layer.state_dict()
    wrong = {
        "SCB": {key: value for key, value in good.items() if key != "SCB"},
        r"absmax of a 48 x 64 int8 weight": good | {"SCB": good["SCB"][:-1]},
        r"must be \[N, K\], got \(3072,\)": good | {"weight": good["weight"].flatten()},
        "weight_format must be 0, got 2": good | {"weight_format": torch.tensor(2, dtype=torch.uint8)},
        r"\(48, 64\), got \(24, 128\)": good | {"weight": good["weight"].view(24, 128), "SCB": good["SCB"][:24]},
    }
    for message, state in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
        assert same(layer.quantized_weight, before)
    assert state_keys({"a.weight": 0, "a.SCB": 0, "a.weight_format": 0, "a.bias": 0, "ab.weight": 0}, "a.") == [
        "a.weight", "a.SCB", "a.weight_format"
    ]  # fmt: skip


def test_state_round_trip_keeps_the_dtype_that_is_asked_for():
    weight = int8.quantize(random_weight(5, 7, torch.bfloat16))
    assert from_state(to_state(weight)).dtype == torch.float16
    assert same(from_state(to_state(weight), int8_dtype=torch.bfloat16), weight)


def test_a_layer_of_ours_in_8_bits_computes_trains_moves_and_copies():
    dense = linear(random_weight(48, 96, torch.float32), bias=True)
    layer = QuantizedLinear.from_linear(dense, "int8")
    assert (layer.weight.dtype, tuple(layer.weight.shape)) == (torch.int8, (48, 96))
    assert repr(layer) == "QuantizedLinear(in_features=96, out_features=48, bias=True, int8 in rows)"
    dense.weight.data = ops.dequantize(layer.quantized_weight)
    dense.weight.requires_grad_(False)
    x = torch.randn(2, 5, 96, requires_grad=True)
    y, expected = layer(x), dense(x)
    torch.testing.assert_close(y, expected)
    assert torch.equal(layer.eval()(x), y)  # nothing is rounded in eval mode either
    dy = torch.randn_like(y)
    for g, e in zip(torch.autograd.grad(y, [x, layer.bias], dy), torch.autograd.grad(expected, [x, dense.bias], dy)):
        torch.testing.assert_close(g, e)
    before = layer.quantized_weight
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    moved.load_state_dict(layer.state_dict())
    for other in (moved, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).half().float()):
        assert same(other.quantized_weight, before)
    assert layer.to("meta")(torch.zeros(3, 96, device="meta")).shape == (3, 48)


def test_quantize_linear_layers_in_8_bits():
    def model():
        return nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(32, 64), "lm_head": nn.Linear(32, 64)})

    before = model()
    expected = int8.quantize(before["a"].weight)
    quantized = quantize_linear_layers(before, bits=8, skip_modules=["b"])
    assert quantized is before
    assert same(quantized["a"].quantized_weight, expected)
    assert type(quantized["b"]) is nn.Linear
    assert isinstance(quantized["lm_head"], QuantizedLinear)  # named otherwise, it is not left alone
    for options in ({"quant_type": "nf4"}, {"blocksize": 64}, {"double_quant": False}):
        with pytest.raises(ValueError, match=rf"8 bits come in one format.*leave out {{'{next(iter(options))}'"):
            quantize_linear_layers(model(), bits=8, **options)
    large = model()
    large["b"].weight.data[3, 4] = 70000.0
    with pytest.raises(ValueError, match=r"b\.weight holds values beyond fp16's 65504, which 8 bits cannot store"):
        quantize_linear_layers(large, bits=8)
    assert type(large["a"]) is nn.Linear
    quantize_linear_layers(large, bits=4)


def test_weights_that_int8_refuses():
    for bad in (float("inf"), float("nan"), 70000.0):
        with pytest.raises(ValueError, match=r"inf, NaN or a value beyond fp16's 65504"):
            int8.quantize(torch.full((2, 64), bad))
    with pytest.raises(ValueError, match=r"must be \[N, K\] in fp32"):
        int8.quantize(torch.zeros(4))
    good = int8.quantize(random_weight(3, 8))
    with pytest.raises(ValueError, match="one plain scale a row"):
        QuantizedWeight(good.data, good.absmax, None, (3, 8), 64, "int8", torch.float32).check()
