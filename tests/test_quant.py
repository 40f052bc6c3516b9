"""4-bit weights: the bytes against bitsandbytes, the values against an oracle written from the format alone."""

import copy
import io
import itertools
import pickle

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_fast import LoraConfig, get_peft_model, ops
from peft_fast.quant import blockwise
from peft_fast.quant.bitsandbytes import read_linear, write_linear
from peft_fast.quant.codebooks import codebook, dynamic_map
from peft_fast.quant.state import from_state, to_state
from peft_fast.quant.weight import BLOCKSIZES, DTYPES, Format, QuantizedWeight
from peft_fast.quantized_linear import QuantizedLinear, quantize_linear_layers

SHAPES = [(1, 1), (1, 7), (3, 5), (8, 64), (33, 31), (16, 4096), (130, 66), (64, 128), (7, 100), (1, 8193), (65, 192)]


def oracle(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Element by element, from the description of the format in weight.py, in numpy: nothing of the library's."""
    N, K = weight.shape
    data, absmax = weight.data.numpy(), weight.absmax.numpy()
    e = np.arange(N * K)
    nibble = np.where(e % 2 == 0, data[e // 2] >> 4, data[e // 2] & 15)
    block = e // weight.blocksize
    if weight.nested is None:
        scale = absmax[block]
    else:
        inner = weight.nested
        product = (inner.code.numpy()[absmax] * inner.absmax.numpy()[np.arange(absmax.size) // 256]).astype(np.float32)
        scale = (product + np.float32(inner.offset.item())).astype(np.float32)[block]
    values = weight.code.numpy()[nibble] * scale
    assert values.dtype == np.float32
    return torch.from_numpy(values).to(dtype).view(N, K)


@pytest.fixture(autouse=True)
def _bitsandbytes_in_eager_mode():
    """bitsandbytes compiles its CPU dequantisation anew for every shape: 40 s for this file."""
    with torch.compiler.set_stance("force_eager"):
        yield


def random_weight(N: int, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(N, K) * 0.02).to(dtype)


def as_linear4bit(weight: torch.Tensor, quant_type: str, blocksize: int, nested: bool, storage=torch.uint8):
    N, K = weight.shape
    layer = bnb.nn.Linear4bit(K, N, bias=False, quant_type=quant_type, quant_storage=storage)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested,
        quant_storage=storage, module=layer,
    )  # fmt: skip
    return layer.to("cpu")


def test_tables_are_bitsandbytes_own():
    for name in ("nf4", "fp4"):
        assert torch.equal(codebook(name), bnbf.get_4bit_type(name, device="cpu"))
    assert torch.equal(dynamic_map(), bnbf.create_dynamic_map())
    assert str(codebook("fp4")[8].item()) == "-0.0"


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_equals_the_oracle_bit_for_bit(quant_type, dtype):
    """2 types x 3 stored dtypes x 8 block sizes x nesting x 11 shapes x 3 output dtypes = 3168 cases."""
    for G, nested, shape in itertools.product(BLOCKSIZES, (False, True), SHAPES):
        weight = blockwise.quantize(random_weight(*shape, dtype), quant_type, G, nested)
        for out in DTYPES:
            assert torch.equal(ops.dequantize(weight, out), oracle(weight, out)), (G, nested, shape, out)
        assert ops.dequantize(weight).dtype == dtype


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_a_layer_of_bitsandbytes_is_read_in_place_and_exactly(quant_type, dtype, storage):
    """Against bitsandbytes' own dequantisation wherever it is right: not where 16 divides K and the block does not."""
    compared = 0
    for G, nested, (N, K) in itertools.product(BLOCKSIZES, (False, True), SHAPES):
        if (N * K + 1) // 2 % storage.itemsize:
            continue  # the bytes do not fill whole elements of this storage: bitsandbytes refuses them itself
        layer = as_linear4bit(random_weight(N, K, dtype), quant_type, G, nested, storage)
        weight = read_linear(layer).check()
        assert weight.data.data_ptr() == layer.weight.data_ptr()
        assert weight.absmax.data_ptr() == layer.weight.quant_state.absmax.data_ptr()
        mine = ops.dequantize(weight)
        assert torch.equal(mine, oracle(weight, dtype))
        if K % 16 or K % G == 0 or G >= 2048 or N * K <= G:
            theirs = bnbf.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(mine, theirs.view(N, K)), (G, nested, N, K)
            compared += 1
    assert compared > 80


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_gives_bitsandbytes_bytes(quant_type, dtype):
    far, scales = 0, 0
    for G, nested, shape in itertools.product(BLOCKSIZES, (False, True), [*SHAPES, (256, 512)]):
        w = random_weight(*shape, dtype)
        w[0, : shape[1] // 2] = 0  # blocks of zeros have scale zero
        data, state = bnbf.quantize_4bit(w, blocksize=G, quant_type=quant_type, compress_statistics=nested)
        mine = blockwise.quantize(w, quant_type, G, nested)
        assert torch.equal(mine.data, data.flatten()), (G, nested, shape)
        if not nested:
            assert torch.equal(mine.absmax, state.absmax)
            continue
        assert torch.equal(mine.nested.absmax, state.state2.absmax)
        assert torch.equal(mine.nested.offset, state.offset)
        # A group of equal scales has nothing left to encode: any code times zero will do.
        used = mine.nested.absmax.repeat_interleave(256)[: mine.absmax.numel()] > 0
        off = (mine.absmax.int() - state.absmax.int()) * used
        assert off.abs().max() <= 1
        far, scales = far + int(off.ne(0).sum()), scales + off.numel()
    # bitsandbytes' CPU library rounds nested scales by a table: near a midpoint it may take the farther code.
    assert far <= scales * 0.005


def test_our_layers_state_dict_is_linear4bits():
    w = random_weight(48, 128)
    ours = QuantizedLinear.from_linear(_linear(w))
    theirs = as_linear4bit(w, "nf4", 64, True).state_dict()
    mine = ours.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        if "quant_state" not in key and "nested" not in key:
            assert mine[key].shape == value.shape, key
            assert mine[key].dtype == value.dtype, key
    # bitsandbytes reads ours
    stats = {k.removeprefix("weight."): v for k, v in mine.items() if k != "weight"}
    param = bnb.nn.Params4bit.from_prequantized(mine["weight"], stats, device="cpu")
    assert torch.equal(bnbf.dequantize_4bit(param.data, param.quant_state), ops.dequantize(ours.quantized_weight))
    # and ours reads theirs, into another layer
    other = QuantizedLinear.from_linear(_linear(torch.zeros(48, 128)))
    other.load_state_dict(theirs)
    assert torch.equal(ops.dequantize(other.quantized_weight), ops.dequantize(from_state(theirs)))


def test_a_foreign_state_leaves_the_layer_as_it_was():
    layer = QuantizedLinear.from_linear(_linear(random_weight(48, 128)))
    before = ops.dequantize(layer.quantized_weight)
    good = layer.state_dict()
    missing = {k: v for k, v in good.items() if k != "weight.absmax"}
    with pytest.raises(RuntimeError, match="weight.absmax"):
        layer.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="absmax of a 48 x 128 nf4 weight"):
        layer.load_state_dict({**good, "weight.absmax": good["weight.absmax"][:-1]})
    larger = QuantizedLinear.from_linear(_linear(random_weight(64, 128))).state_dict()
    with pytest.raises(RuntimeError, match=r"\(48, 128\), got \(64, 128\)"):
        layer.load_state_dict(larger)
    assert torch.equal(ops.dequantize(layer.quantized_weight), before)


def _linear(weight: torch.Tensor, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def test_quantized_linear_computes_keeps_and_trains_like_a_linear():
    layer = _linear(random_weight(48, 96), bias=True)
    quantized = QuantizedLinear.from_linear(layer)
    layer.weight.data = ops.dequantize(quantized.quantized_weight)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 5, 96, requires_grad=True)
    y, expected = quantized(x), layer(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, quantized.bias], dy)
    for g, e in zip(got, torch.autograd.grad(expected, [x, layer.bias], dy)):
        torch.testing.assert_close(g, e)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quantized(x)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in quantized.quantized_weight.tensors()}
    assert torch.equal(quantized.half()(x.half()), quantized(x.half()))
    assert quantized.quantized_weight.absmax.dtype == torch.uint8
    assert quantized.quantized_weight.nested.absmax.dtype == torch.float32


def test_quantize_linear_layers():
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "lm_head": nn.Linear(32, 64), "norm": nn.LayerNorm(64)})
    ids = {id(m) for m in model.modules()}
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        quantize_linear_layers(model, bits=3)
    with pytest.raises(ValueError, match="blocksize must be one of"):
        quantize_linear_layers(model, blocksize=63)
    model["a"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"a\.weight holds inf or NaN"):
        quantize_linear_layers(model)
    assert {id(m) for m in model.modules()} == ids
    model["a"].weight.data[0, 0] = 0
    assert quantize_linear_layers(model) is model
    assert isinstance(model["a"], QuantizedLinear)
    assert type(model["lm_head"]) is nn.Linear
    with pytest.raises(ValueError, match=r"no nn.Linear to quantise"):
        quantize_linear_layers(model)
    assert model["a"].quantized_weight.nbytes < 64 * 32 * 0.53 + 1100  # the tables of 272 fp32 are fixed costs


def test_quantised_layers_move_copy_and_save_without_a_second_copy(tmp_path):
    layer = QuantizedLinear.from_linear(_linear(random_weight(256, 512)))
    expected = ops.dequantize(layer.quantized_weight)
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    moved.load_state_dict(layer.state_dict())
    assigned = copy.deepcopy(layer).to("meta")
    with pytest.raises(RuntimeError, match="assign=True"):
        assigned.load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for other in (copy.deepcopy(layer), moved, assigned, pickle.loads(pickle.dumps(layer))):
        assert torch.equal(ops.dequantize(other.quantized_weight), expected)
        file = io.BytesIO()
        torch.save(other, file)
        assert file.tell() < layer.quantized_weight.nbytes + 8000
    moved.weight.data.zero_()  # loading copied: the source is another layer's
    assert torch.equal(ops.dequantize(layer.quantized_weight), expected)
    model = nn.Sequential(layer, copy.deepcopy(layer))
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # refuses tensors that share memory
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(ops.dequantize(model[1].quantized_weight), expected)
    assert layer.to("meta")(torch.zeros(3, 512, device="meta")).shape == (3, 256)


def test_what_quantize_linear_layers_refuses_or_leaves():
    def model():
        return nn.ModuleDict({"a": nn.Linear(64, 32), "lm_head": nn.Linear(32, 64)})

    with pytest.raises(TypeError, match="got the string 'lm_head'"):
        quantize_linear_layers(model(), skip_modules="lm_head")
    with pytest.raises(ValueError, match=r"skip_modules \['lm_heed'\] name no module"):
        quantize_linear_layers(model(), skip_modules=["lm_heed"])
    with pytest.raises(ValueError, match="model is itself a layer"):
        quantize_linear_layers(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="has adapters already"):
        quantize_linear_layers(get_peft_model(model(), LoraConfig(target_modules=["a"])))
    with pytest.raises(ValueError, match="dtype must be one of"):
        blockwise.quantize(torch.ones(2, 64), dtype=torch.int8)
    shared = nn.Linear(64, 64)
    tied = quantize_linear_layers(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(64, 64)}))
    assert tied["a"] is tied["b"]
    assert tied["c"] is not tied["a"]
    assert all(isinstance(module, QuantizedLinear) for module in tied.values())
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )
    quantize_linear_layers(t5)
    assert type(t5.encoder.block[0].layer[1].DenseReluDense.wo) is nn.Linear  # its code reads wo.weight.dtype
    assert isinstance(t5.encoder.block[0].layer[1].DenseReluDense.wi, QuantizedLinear)


def test_state_round_trip_and_format_text():
    for quant_type, nested in itertools.product(("nf4", "fp4"), (False, True)):
        weight = blockwise.quantize(random_weight(33, 31, torch.bfloat16), quant_type, 128, nested)
        again = from_state(to_state(weight))
        assert again.format == weight.format == Format.parse(str(weight.format))
        assert torch.equal(ops.dequantize(again), ops.dequantize(weight))


def test_packed_for_cpu_is_undone_with_a_warning():
    layer = as_linear4bit(random_weight(64, 128), "nf4", 64, True)
    exact = ops.dequantize(read_linear(layer))
    layer.eval()
    with torch.no_grad():
        packed_output = layer(torch.eye(128, dtype=torch.bfloat16))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no avx512_bf16: bitsandbytes does not repack here")
    with pytest.warns(UserWarning, match="rounds their scales to bf16"):
        weight = read_linear(layer).check()
    again = ops.dequantize(weight)
    assert ((again - exact).abs() <= exact.abs() * 2**-8).all()
    torch.testing.assert_close(packed_output.t(), again.bfloat16(), rtol=1e-2, atol=1e-3)
    x = torch.randn(3, 128, requires_grad=True)
    layer.train()(x).sum().backward()  # bitsandbytes itself works again, gradients included
    torch.testing.assert_close(x.grad, again.sum(0).expand(3, -1), rtol=2e-2, atol=5e-3)  # computed in bf16


def test_a_parameter_stripped_by_fsdp_is_read_through_the_module():
    layer = as_linear4bit(random_weight(64, 128), "nf4", 64, True)
    expected = ops.dequantize(read_linear(layer))
    layer.quant_state = layer.weight.quant_state
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(ops.dequantize(read_linear(layer)), expected)


def test_write_linear():
    layer = as_linear4bit(random_weight(64, 128), "nf4", 64, True, torch.bfloat16)
    new = blockwise.quantize(random_weight(64, 128))
    write_linear(layer, new)
    assert torch.equal(ops.dequantize(read_linear(layer)), ops.dequantize(new))
    with pytest.raises(ValueError, match="must be equal"):
        write_linear(layer, blockwise.quantize(random_weight(64, 128), blocksize=128))


def test_unquantised_layers_and_bad_weights_are_refused():
    with pytest.raises(ValueError, match="not quantised yet"):
        read_linear(bnb.nn.Linear4bit(64, 64))
    assert read_linear(nn.Linear(4, 4)) is None
    with pytest.raises(ValueError, match="inf or NaN"):
        blockwise.quantize(torch.full((2, 64), float("inf")))
    with pytest.raises(ValueError, match=r"must be \[N, K\] in fp32"):
        blockwise.quantize(torch.zeros(2, 2, 2))
    with pytest.raises(TypeError, match="dtype must be one of"):
        ops.dequantize(blockwise.quantize(torch.ones(2, 64)), torch.float64)
    good = blockwise.quantize(torch.ones(2, 64))
    with pytest.raises(ValueError, match="data of a 2 x 64 nf4 weight"):
        QuantizedWeight(
            good.data[1:], good.absmax, good.code, good.shape, 64, "nf4", torch.float32, good.nested
        ).check()
