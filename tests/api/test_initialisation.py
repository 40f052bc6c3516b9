"""Initialisations that read the base weight: PiSSA, OLoRA, orthogonal. LoftQ's are in test_loftq.py."""

import copy
import warnings

import bitsandbytes
import peft
import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_fast
from peft_fast import ops, transaction
from peft_fast.tuners.lora.initialisation.start import Change

LIBRARIES = (peft, peft_fast)
INITS = ["pissa", "pissa_niter_4", "olora", "orthogonal"]
SUBTRACTING = ["pissa", "pissa_niter_4", "olora"]
TARGETS = ["q_proj", "down_proj"]


def options(init: str, **more) -> dict:
    return {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": init, **more}


def adapted(library, base: nn.Module, init: str, **more):
    torch.manual_seed(5)
    arguments = {"autocast_adapter_dtype": more.pop("autocast_adapter_dtype", True)}
    return library.get_peft_model(base, library.LoraConfig(**options(init, **more)), **arguments)


@pytest.mark.parametrize("init", INITS)
def test_the_same_seed_gives_pefts_weights_outputs_and_gradients(init, llama, tokens):
    models = [adapted(library, llama(), init) for library in LIBRARIES]
    theirs, ours = (dict(model.named_parameters()) for model in models)
    assert list(theirs) == list(ours)
    losses = [model(input_ids=tokens, labels=tokens).loss for model in models]
    assert torch.allclose(*losses, atol=1e-6)
    for loss in losses:
        loss.backward()
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].detach(), parameter.detach(), atol=1e-6, rtol=1e-5)
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name].grad, parameter.grad, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_base_and_adapter_are_together_what_the_base_was(init, dtype, llama, tokens):
    base = llama(dtype)
    expected = base(input_ids=tokens).logits
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = adapted(peft_fast, base, init, use_rslora=True)
    if dtype != torch.bfloat16:
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=2e-6, rtol=1e-5)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    total = layer.weight.double() + layer.get_delta_weight("default").double()
    step = torch.finfo(dtype).eps * weight.abs().max()  # what the base weight is rounded by
    assert float((total - weight.double()).abs().max()) <= max(float(step), 1e-7)
    assert torch.equal(layer.weight, weight) == (init == "orthogonal")


def test_of_16_bits_more_is_kept_than_in_peft(llama):
    """peft rounds the factors to 16 bits and takes the unrounded ones out of the base weight."""
    weight = llama(torch.bfloat16).model.layers[0].self_attn.q_proj.weight.detach().double()
    errors = []
    for library in LIBRARIES:
        model = adapted(library, llama(torch.bfloat16), "pissa")
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.lora_A["default"].weight.dtype == torch.float32
        A, B = (f["default"].weight.detach().double() for f in (layer.lora_A, layer.lora_B))
        errors.append(float((layer.weight.detach().double() + 1.5 * B @ A - weight).norm()))
    assert errors[1] < 0.9 * errors[0]
    model = adapted(peft_fast, llama(torch.bfloat16), "pissa", autocast_adapter_dtype=False)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("init", INITS)
def test_conv1d(init):
    x, results = torch.randn(3, 24), []
    for library in LIBRARIES:
        torch.manual_seed(2)
        base = nn.Sequential(Conv1D(32, 24))
        expected = base(x)
        config = library.LoraConfig(target_modules=["0"], r=4, init_lora_weights=init, fan_in_fan_out=True)
        results.append(library.get_peft_model(base, config))
        # peft's OLoRA decomposes the weight as it lies, [K, N], and its factors then do not fit
        if not (init == "olora" and library is peft):
            torch.testing.assert_close(results[-1](x), expected, atol=2e-6, rtol=1e-5)
    if init != "olora":
        for one, other in zip(*(model.parameters() for model in results)):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("init", SUBTRACTING)
def test_dora_starts_as_the_base_model(init, llama, tokens):
    base = llama()
    expected = base(input_ids=tokens).logits
    models = [adapted(library, llama(), init, use_dora=True) for library in LIBRARIES]
    torch.testing.assert_close(models[1](input_ids=tokens).logits, expected, atol=2e-6, rtol=1e-5)
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models)):
        torch.testing.assert_close(other, one, atol=2e-6, rtol=1e-5, msg=name)
    wide = adapted(peft_fast, llama(torch.bfloat16), init, use_dora=True)
    layer = wide.base_model.model.model.layers[0].self_attn.q_proj
    whole = layer.weight.double() + layer.get_delta_weight("default").double()
    norms = torch.linalg.norm(whole, dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.double(), norms, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_olora_of_bitsandbytes_layers_is_pefts(bits, load, tokens):
    # In eval mode bitsandbytes repacks 4-bit weights on CPUs, which rounds their scales.
    models = [adapted(library, load("llama", bits).train(), "olora") for library in LIBRARIES]
    layers = [model.base_model.model.model.layers[0].self_attn.q_proj for model in models]
    for one, other in zip(*(layer.parameters() for layer in layers)):
        torch.testing.assert_close(other.float(), one.float(), atol=1 if bits == 8 else 1e-5, rtol=1e-4)
    codes = [layer.base_layer.weight.data for layer in layers]
    assert float((codes[0] == codes[1]).float().mean()) > 0.999
    outputs = [model(input_ids=tokens).logits for model in models]
    # bitsandbytes rounds activations to 8 bits, ours does not.
    torch.testing.assert_close(outputs[1], outputs[0], atol=0.05 if bits == 8 else 1e-4, rtol=0)


@pytest.mark.parametrize("init", SUBTRACTING)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_k_bit_base_is_quantised_again_without_the_adapter(init, bits, llama):
    """Ours and bitsandbytes' layers get the same bytes. What is rounded once more is small beside what quantising the
    whole weight took from it; for 8 bits it is about as much."""
    torch.manual_seed(3)
    U, V = torch.linalg.qr(torch.randn(64, 64))[0], torch.linalg.qr(torch.randn(64, 64))[0]
    linear = nn.Linear(64, 64)
    linear.weight.data = U @ torch.diag(0.5 ** torch.arange(64.0)) @ V
    own = nn.Sequential(copy.deepcopy(linear))
    own[0] = peft_fast.QuantizedLinear.from_linear(linear, "nf4" if bits == 4 else "int8", double_quant=False)
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    more = {"quant_type": "nf4", "compress_statistics": False} if bits == 4 else {"has_fp16_weights": False}
    bnb = kind(64, 64, **more)
    bnb.load_state_dict(linear.state_dict())
    other = nn.Sequential(bnb.to("cpu"))
    layers = [adapted(peft_fast, base, init, target_modules=["0"]).base_model.model[0] for base in (own, other)]
    weights = [layer.base_weight() for layer in layers]
    assert torch.equal(weights[0].data, weights[1].data)
    assert torch.equal(weights[0].absmax, weights[1].absmax)
    before = ops.dequantize(peft_fast.QuantizedLinear.from_linear(linear, weights[0].quant_type).quantized_weight)
    total = ops.dequantize(weights[0], torch.float32) + layers[0].get_delta_weight("default")
    assert (total - before).norm() < (0.6 if bits == 4 else 1.5) * (before - linear.weight.detach()).norm()


class TestFiles:
    """A file has the trained factors; the base loses the initial ones again when it is loaded."""

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_adapters_travel(self, init, low_cpu_mem_usage, llama, tokens, trained, tmp_path):
        for writer in LIBRARIES:
            model = trained(adapted(writer, llama(), init)).eval()
            expected = model(input_ids=tokens).logits
            model.save_pretrained(tmp_path / writer.__name__)
            more = {"low_cpu_mem_usage": low_cpu_mem_usage}
            loaded = peft_fast.PeftModel.from_pretrained(llama(), tmp_path / writer.__name__, **more)
            torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=2e-6, rtol=1e-5)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "peft_fast")
        torch.testing.assert_close(theirs(input_ids=tokens).logits, expected, atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize("bits", [None, 4])
    def test_a_broken_file_leaves_the_base_weights_alone(self, bits, llama, llama_4bit, tmp_path, untouched):
        build = llama if bits is None else llama_4bit
        adapted(peft_fast, build(), "pissa").save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        save_file({key: value[..., :3].contiguous() for key, value in load_file(path).items()}, path)
        base = build()
        with untouched(base), pytest.raises(ValueError, match="do not fit"):
            peft_fast.PeftModel.from_pretrained(base, tmp_path)
        model = adapted(peft_fast, build(), True)
        with untouched(model), pytest.raises(ValueError, match="do not fit"):
            model.load_adapter(tmp_path, "other")

    def test_a_second_adapter_is_of_what_the_first_has_left(self, llama, tokens):
        for init in SUBTRACTING:
            models = [adapted(library, llama(), init) for library in LIBRARIES]
            for library, model in zip(LIBRARIES, models):
                torch.manual_seed(9)
                model.add_adapter("other", library.LoraConfig(**options("pissa_niter_4")))
                model.set_adapter("other")
            outputs = [model(input_ids=tokens).logits for model in models]
            torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)


def test_an_error_in_the_last_layer_leaves_the_first_alone(llama, untouched):
    base = llama()
    base.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    with untouched(base), pytest.raises(ValueError, match="holds inf or NaN"):
        adapted(peft_fast, base, "olora")
    with untouched(base := llama()), pytest.raises(ValueError, match="needs a rank of at most 64 .* got 65"):
        adapted(peft_fast, base, "pissa", r=2, rank_pattern={"layers.1.mlp.down_proj": 65})


@pytest.mark.parametrize("bits", [None, 4])
def test_a_write_that_fails_is_undone(bits, llama, llama_4bit, monkeypatch):
    base = llama() if bits is None else llama_4bit()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    write, seen = Change.write, []

    def failing(change):
        seen.append(change)
        if len(seen) == 3:
            raise MemoryError("no room")
        write(change)

    monkeypatch.setattr(Change, "write", failing)
    with pytest.raises(MemoryError):
        adapted(peft_fast, base, "pissa")
    assert not any(isinstance(module, peft_fast.tuners.lora.LoraLayer) for module in base.modules())
    for name, value in base.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-7 if bits is None else 0, rtol=0)


def test_writes_wait_for_the_outermost_block():
    log, model = [], nn.Linear(1, 1)
    with transaction.unchanged_on_error(model):
        with transaction.unchanged_on_error(model):
            transaction.at_end(lambda: log.append("write"), lambda: log.append("undo"))
        assert log == []
    assert log == ["write"]
    transaction.at_end(lambda: log.append("at once"), lambda: None)
    assert log == ["write", "at once"]
    with pytest.raises(ZeroDivisionError), transaction.unchanged_on_error(model):
        _write_and_fail(log)
    assert log == ["write", "at once"]


def _write_and_fail(log):
    transaction.at_end(lambda: log.append("never"), lambda: None)
    raise ZeroDivisionError


def test_offloaded_layers(llama, tokens):
    base = llama()
    expected = base(input_ids=tokens).logits
    cpu_offload(base, torch.device("cpu"))
    model = adapted(peft_fast, base, "pissa")
    assert model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.is_meta
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=2e-6, rtol=1e-5)
    weight = base.model.layers[0].self_attn.q_proj.base_layer._hf_hook.weights_map["weight"]
    assert not torch.allclose(weight, llama().model.layers[0].self_attn.q_proj.weight, atol=1e-3)


def test_the_accelerator_is_asked_for_only_with_ephemeral_gpu_offload(llama, monkeypatch):
    """Without one here: a device that stands for it."""
    asked = []
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: asked.append(check_available)
    )
    adapted(peft_fast, llama(), "pissa_niter_2")
    assert True not in asked
    runtime = peft_fast.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    adapted(peft_fast, llama(), "pissa_niter_2", runtime_config=runtime)
    assert asked.count(True) == 4


@pytest.mark.parametrize(
    ("layer", "init"),
    [(nn.Embedding(10, 8), "pissa"), (nn.Conv2d(4, 4, 3), "olora"), (nn.MultiheadAttention(8, 2), "orthogonal")],
)
def test_other_layers_refuse_by_name(layer, init):
    base = nn.Sequential(layer)
    with pytest.raises(ValueError, match=f"'{init}' is for linear layers, and this is .* {type(layer).__name__}"):
        peft_fast.get_peft_model(base, peft_fast.LoraConfig(target_modules=["0"], r=4, init_lora_weights=init))
    assert base[0] is layer


def test_a_merged_model_refuses(llama, untouched):
    model = adapted(peft_fast, llama(), True)
    model.merge_adapter()
    with untouched(model), pytest.raises(ValueError, match="call unmerge_adapter first"):
        model.add_adapter("other", peft_fast.LoraConfig(**options("pissa")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"init_lora_weights": "pissa_niter_x"}, "must be True, .* one of pissa, .* got 'pissa_niter_x'"),
        ({"init_lora_weights": "pissa_niter_99999"}, "pissa_niter_<0 to 999>, .* got 'pissa_niter_99999'"),
        ({"init_lora_weights": 3}, "got 3"),
        ({"init_lora_weights": None}, "got None"),
    ],
)  # fmt: skip
def test_names_that_are_none(more, message):
    with pytest.raises(ValueError, match=message):
        peft_fast.LoraConfig(**more)


@pytest.mark.parametrize(
    ("init", "more", "message"),
    [("orthogonal", {"r": 3}, "even rank"), ("pissa", {"lora_alpha": -1}, "needs a scale above 0, got -0.25")],
)
def test_numbers_that_do_not_fit(init, more, message, llama, untouched):
    with untouched(base := llama()), pytest.raises(ValueError, match=message):
        adapted(peft_fast, base, init, **more)


def test_rank_stabilised_patterns_warn_as_in_peft():
    for library in LIBRARIES:
        with pytest.warns(UserWarning, match="path_initial_model_for_weight_conversion"):
            library.LoraConfig(use_rslora=True, rank_pattern={"q": 2}, init_lora_weights="olora")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_fast.LoraConfig(use_rslora=True, init_lora_weights="olora")
