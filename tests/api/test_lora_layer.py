"""LoRA around one linear layer, dense or 4-bit: what it computes, and merging."""

import copy
import warnings

import bitsandbytes
import pytest
import torch
from torch import nn

from peft_fast import LoraConfig, ops
from peft_fast.dispatch import use_backend
from peft_fast.quant import blockwise, int8
from peft_fast.quant.bitsandbytes import read_linear
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.quantized_linear import QuantizedLinear
from peft_fast.tuners.lora import Linear

K, N, R = 64, 48, 4
LOOSE = {"rtol": 1e-2, "atol": 1e-2}
KBIT = ("bitsandbytes", "ours", "bitsandbytes-int8", "ours-int8")
BASES = ("dense", *KBIT)


def base_layer(kind: str, dtype=torch.float32, bias=True) -> nn.Module:
    linear = nn.Linear(K, N, bias, dtype=dtype).requires_grad_(False)
    if kind.startswith("ours"):
        return QuantizedLinear.from_linear(linear, "int8" if kind == "ours-int8" else "nf4")
    if kind == "dense":
        return linear
    if kind == "bitsandbytes":
        layer = bitsandbytes.nn.Linear4bit(K, N, bias, compute_dtype=dtype, quant_type="nf4")
    else:
        layer = bitsandbytes.nn.Linear8bitLt(K, N, bias, has_fp16_weights=kind == "bitsandbytes-fp16", threshold=6.0)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").requires_grad_(False)


def lora(kind="dense", dtype=torch.float32, bias=True, **options) -> Linear:
    """A layer whose adapter does something."""
    config = LoraConfig(**{"r": R, "lora_alpha": 8, "init_lora_weights": False, **options})
    layer = Linear(base_layer(kind, dtype, bias), "default", config=config, r=config.r, lora_alpha=config.lora_alpha)
    layer.set_adapter("default")
    return layer


def base_matrix(layer: Linear) -> torch.Tensor:
    weight = layer.base_weight()
    return ops.dequantize(weight, torch.float32) if isinstance(weight, QuantizedWeight) else weight


def expected(layer: Linear, x: torch.Tensor, names=("default",)) -> torch.Tensor:
    y = nn.functional.linear(x, base_matrix(layer), layer.bias)
    for name in names:
        y = y + layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x))
    return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora_bias", [True, False])
@pytest.mark.parametrize("kind", BASES)
def test_forward_and_gradients_are_the_formulas(kind, bias, lora_bias):
    layer = lora(kind, bias=bias, lora_bias=lora_bias)
    layer.update_layer("other", 3, 5, LoraConfig(init_lora_weights=False, lora_bias=lora_bias))
    for names in (["default"], ["default", "other"], ["other"], ["default", "absent"]):
        layer.set_adapter(names)
        present = [name for name in names if name != "absent"]
        grads = []
        for function in (layer, lambda x, present=present: expected(layer, x, present)):
            x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
            layer.zero_grad()
            y = function(x)
            (y * torch.linspace(-1, 1, N)).sum().backward()
            grads.append([y, x.grad, *(p.grad.clone() for n in present for p in layer.adapter_parameters(n))])
        for ours, theirs in zip(*grads):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_disabled_and_merged_layers_are_base_layers(kind):
    layer, x = lora(kind), torch.randn(3, K)
    plain = nn.functional.linear(x, base_matrix(layer), layer.bias)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), plain)
    layer.enable_adapters(True)
    with_adapter = layer(x)
    assert not torch.allclose(with_adapter, plain, atol=1e-2)
    layer.merge()
    merged = nn.functional.linear(x, base_matrix(layer), layer.bias)
    torch.testing.assert_close(layer(x), merged)
    if kind == "dense":
        torch.testing.assert_close(merged, with_adapter)
    layer.enable_adapters(False)  # a merged adapter is taken out to be disabled
    if kind == "dense":
        torch.testing.assert_close(layer(x), plain)
    assert not (layer(x), layer.merged)[1]


def test_a_4bit_layer_that_is_read_does_not_run_bitsandbytes_own_forward():
    """It would repack the weight in eval mode on CPUs with bf16 instructions, and lose gradients from then on."""
    layer = lora("bitsandbytes").eval()
    before = read_linear(layer.base_layer)
    with torch.no_grad():
        layer(torch.randn(2, K))
        layer.enable_adapters(False)
        layer(torch.randn(2, K))
    after = read_linear(layer.base_layer)
    assert after.data.data_ptr() == before.data.data_ptr()
    layer.enable_adapters(True)
    x = torch.randn(2, K, requires_grad=True)
    layer.train()(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["dense", "ours"])
def test_dropout_is_the_adapters_own_and_only_in_training(kind):
    layer, x = lora(kind, lora_dropout=0.5), torch.ones(200, K)
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer(x), expected(layer, x))
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    torch.testing.assert_close(first.mean(0), expected(layer, x)[0], atol=0.2, rtol=0)
    layer.lora_dropout["default"].p = 1.0
    torch.testing.assert_close(layer(x), nn.functional.linear(x, base_matrix(layer), layer.bias))


def test_dropout_of_a_second_adapter():
    layer, x = lora(lora_dropout=0.5), torch.ones(200, K)
    layer.update_layer("other", 3, 5, LoraConfig(init_lora_weights=False, lora_dropout=0.5))
    layer.set_adapter(["default", "other"])
    assert not torch.equal(layer(x), layer(x))
    layer.lora_dropout["default"].p = layer.lora_dropout["other"].p = 1.0
    torch.testing.assert_close(layer(x), nn.functional.linear(x, base_matrix(layer), layer.bias))


def test_one_call_does_the_base_layer_and_the_adapter(monkeypatch):
    calls = []
    for name in ("lora_linear", "lora_down", "lora_up_add", "quant_matmul"):
        function = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, f=function, n=name, **k: calls.append((n, k["backend"])) or f(*a, **k)
        )
    layer = lora(lora_bias=True)
    layer.backend = "torch"
    layer(torch.randn(2, K))
    assert calls == [("lora_linear", "torch")]
    layer.update_layer("other", 3, 5, LoraConfig())
    layer.set_adapter(["default", "other"])
    layer(torch.randn(2, K))
    assert [name for name, _ in calls[1:]] == ["lora_linear", "lora_down", "lora_up_add"]
    calls.clear()
    quantized = lora("ours")
    quantized.enable_adapters(False)
    quantized(torch.randn(2, K))
    assert calls == [("quant_matmul", None)]


@pytest.mark.parametrize("kind", BASES)
def test_route(kind):
    layer = lora(kind)
    with use_backend("auto"):
        choice = layer.route(512)
    assert choice.route == "reference"
    assert choice.because.startswith("the tensors are on the CPU")
    layer.backend = "torch"
    assert layer.route(512).because == "backend torch was asked for"
    handle = layer.base_layer.register_forward_hook(lambda *args: None)
    assert layer.route(512).route == "added"
    handle.remove()
    layer.set_adapter([])
    assert layer.route(512).route == "base"
    assert layer.route(512).because.startswith("the adapters are not active here")
    layer.set_adapter("default")
    layer.enable_adapters(False)
    assert layer.route(512).because.startswith("the adapters are switched off")
    layer.enable_adapters(True)
    layer.merge()
    assert layer.route(512).because.startswith("the adapters are merged")


def test_a_base_layer_that_does_more_than_multiply_is_called():
    x = torch.randn(2, K)
    layer = lora()
    right = expected(layer, x)
    handle = layer.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(layer(x), right + 1)
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layer.base_layer.__class__ = Doubled
    torch.testing.assert_close(layer(x), right + nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", BASES)
def test_dtypes(kind):
    half = lora(kind, torch.bfloat16)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        getattr(half, name)["default"].float()
    assert half(x).dtype == torch.bfloat16
    if kind == "bitsandbytes":  # its compute_dtype decides, and the result comes back in x's dtype
        assert half(x.float()).dtype == torch.float32
        torch.testing.assert_close(half(x.float()), half(x).float())
    full = lora(kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert full(torch.randn(3, K)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", BASES)
def test_merging(kind):
    layer, x = lora(kind), torch.randn(3, K)
    before, delta = base_matrix(layer).clone(), layer.get_delta_weight("default")
    torch.testing.assert_close(delta, 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    layer.merge(safe_merge=True)
    assert (layer.merged, layer.merged_adapters) == (True, ["default"])
    if kind == "dense":
        torch.testing.assert_close(base_matrix(layer), before + delta)
    else:
        again = int8.quantize(before + delta) if kind.endswith("int8") else blockwise.quantize(before + delta)
        assert torch.equal(base_matrix(layer), ops.dequantize(again, torch.float32))
    with pytest.warns(UserWarning, match="merged already: nothing to merge"):
        layer.merge()
    layer.unmerge()
    assert not layer.merged
    if kind == "dense":
        torch.testing.assert_close(base_matrix(layer), before)
    with pytest.warns(UserWarning, match="no adapter is merged"):
        layer.unmerge()
    assert layer(x).shape == (3, N)


def test_merging_rounds_once():
    """bf16(fp32(W) + delta), not bf16(W) + bf16(delta)."""
    layer = lora(dtype=torch.bfloat16)
    for name in ("lora_A", "lora_B"):
        getattr(layer, name)["default"].float()
    weight = layer.weight.clone()
    layer.merge()
    exact = weight.double() + layer.get_delta_weight("default").double()
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))


def test_two_adapters_are_merged_in_one_sum():
    layer = lora(dtype=torch.bfloat16, lora_bias=True)
    layer.update_layer("other", 3, 5, LoraConfig(init_lora_weights=False, lora_bias=True))
    layer.set_adapter(["default", "other"])
    weight, bias = layer.weight.float(), layer.bias.float()
    layer.merge()
    delta = sum(layer.get_delta_weight(name) for name in ("default", "other"))
    assert torch.equal(layer.weight, (weight + delta).to(torch.bfloat16))
    torch.testing.assert_close(layer.bias.float(), bias + sum(map(layer.get_delta_bias, ("default", "other"))), **LOOSE)
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(layer.weight.float(), weight, **LOOSE)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite(kind, value, untouched):
    layer = lora(kind)
    layer.lora_B["default"].weight.data[3, 1] = value
    with untouched(layer), pytest.raises(ValueError, match="inf or NaN"):
        layer.merge(safe_merge=True)


def test_merging_a_bias():
    layer, x = lora(lora_bias=True), torch.randn(3, K)
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before)
    layer.unmerge()
    torch.testing.assert_close(layer(x), before)


def test_a_bias_with_nothing_to_merge_into(untouched):
    layer = lora(bias=False, lora_bias=True)
    with untouched(layer), pytest.raises(ValueError, match="has a bias and the base layer has none"):
        layer.merge()


def test_merging_takes_a_list_of_names():
    with pytest.raises(TypeError, match="must be a list of names"):
        lora().merge(adapter_names="default")


def test_layers_can_be_copied():
    layer, x = lora("ours", lora_dropout=0.1).eval(), torch.randn(3, K)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.lora_B["default"].weight.data.zero_()
    assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("kind", BASES)
def test_compiles_into_one_graph(kind):
    layer, x = lora(kind, lora_dropout=0.1), torch.randn(3, K)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (layer, compiled):
        layer.zero_grad()
        torch.manual_seed(2)
        y = function(x)
        y.square().sum().backward()
        grads.append([y, *(parameter.grad.clone() for parameter in layer.adapter_parameters("default"))])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal, nn.utils.weight_norm]
)
def test_a_weight_that_is_computed_cannot_be_merged_into(wrap):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old weight_norm is deprecated
        base = wrap(nn.Linear(K, N))
    layer = Linear(base, "default", config=LoraConfig(init_lora_weights=False), r=R, lora_alpha=8)
    layer.set_adapter("default")
    x = torch.randn(2, K)
    before = layer(x)
    with pytest.raises(ValueError, match="computed from others"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_base_layer_run(register):
    layer, calls = lora(), []
    getattr(layer.base_layer, register)(lambda *args: calls.append(args[0]))
    layer(torch.randn(2, K, requires_grad=True)).sum().backward()
    assert calls == [layer.base_layer]
