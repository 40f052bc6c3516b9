"""LoftQ: as a start from a dense base, and for the adapters of a model that has few bits already."""

import importlib.util
import types

import peft
import pytest
import torch
from peft.utils import loftq_utils
from torch import nn

import peft_fast
from peft_fast import ops
from peft_fast.tuners.lora.initialisation import replace_loftq

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def pefts_on_the_cpu(monkeypatch):
    """peft's LoftQ with the name of its device changed: it is written for CUDA and XPU only. It also asks for scipy,
    which it does not use."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "scipy" or find(name, *more))
    for name in ("loftq_init", "_loftq_init_new"):
        function = getattr(loftq_utils, name).__wrapped__
        code = function.__code__
        moved = code.replace(co_consts=tuple("cpu" if value == "cuda" else value for value in code.co_consts))
        assert moved.co_consts != code.co_consts
        moved_function = types.FunctionType(moved, function.__globals__)
        moved_function.__defaults__ = function.__defaults__
        monkeypatch.setattr(loftq_utils, name, torch.no_grad()(moved_function))
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", loftq_utils.loftq_init)


def config(library, bits: int, steps: int, **more):
    loftq = library.LoftQConfig(loftq_bits=bits, loftq_iter=steps)
    return library.LoraConfig(
        r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights="loftq", loftq_config=loftq, **more
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("steps", [1, 3])
def test_weights_and_outputs_are_pefts(bits, steps, llama, tokens, pefts_on_the_cpu):
    models = [library.get_peft_model(llama(), config(library, bits, steps)) for library in (peft, peft_fast)]
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models)):
        if "lora_" not in name:
            torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5, msg=name)
    layers = [model.base_model.model.model.layers[0].self_attn.q_proj for model in models]
    deltas = [layer.get_delta_weight("default") for layer in layers]
    torch.testing.assert_close(deltas[1], deltas[0], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(*(model(input_ids=tokens).logits for model in models), atol=1e-5, rtol=1e-3)
    assert models[1].peft_config["default"].loftq_config == models[0].peft_config["default"].loftq_config


@pytest.mark.parametrize("bits", [4, 8])
def test_the_base_can_be_quantised_without_a_loss(bits, llama):
    base = llama()
    before = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = peft_fast.get_peft_model(base, config(peft_fast, bits, 4))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    kind = "nf4" if bits == 4 else "int8"
    again = peft_fast.QuantizedLinear.from_linear(layer.base_layer, kind, double_quant=False)
    torch.testing.assert_close(ops.dequantize(again.quantized_weight), layer.weight.detach(), atol=1e-7, rtol=1e-5)
    plain = nn.Linear(64, 64, bias=False)
    plain.weight.data = before
    plainly = ops.dequantize(peft_fast.QuantizedLinear.from_linear(plain, kind).quantized_weight)
    error = (layer.weight + layer.get_delta_weight("default") - before).norm()
    assert error < 0.9 * (plainly - before).norm()


def test_a_file_loads_in_both(llama, tokens, trained, tmp_path, pefts_on_the_cpu):
    model = trained(peft_fast.get_peft_model(llama(), config(peft_fast, 4, 1))).eval()
    model.save_pretrained(tmp_path)
    for library in (peft, peft_fast):
        loaded = library.PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-5, rtol=0)


def test_a_weight_of_few_bits_is_refused(llama_4bit, untouched):
    with untouched(base := llama_4bit()), pytest.raises(ValueError, match="then replace_lora_weights_loftq"):
        peft_fast.get_peft_model(base, config(peft_fast, 4, 1))


def test_a_scale_that_is_not_one_is_warned_of(llama):
    plain = config(peft_fast, 4, 1)
    plain.lora_alpha = 8
    with pytest.warns(UserWarning, match="at a scale of 1, as in peft, and this adapter's is 2"):
        peft_fast.get_peft_model(llama(), plain)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "needs loftq_config"),
        ({"loftq_bits": 3}, ValueError, "loftq_bits must be 4 or 8, got 3"),
        ({"loftq_iter": 0}, ValueError, "loftq_iter must be an integer from 1 to 999, got 0"),
        ({"loftq_iter": True}, ValueError, "loftq_iter must be an integer from 1 to 999, got True"),
        ({"bits": 4}, TypeError, r"has loftq_bits and loftq_iter, got \['bits'\] too"),
        ([4], TypeError, "must be a LoftQConfig or a dict"),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        peft_fast.LoraConfig(init_lora_weights="loftq", loftq_config=options)


class TestReplacing:
    @pytest.fixture
    def original(self, folders):
        return folders["llama"]

    @staticmethod
    def adapted(library, base, **more):
        torch.manual_seed(1)
        return library.get_peft_model(base, library.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, **more))

    def test_factors_are_pefts(self, load, tokens, original, pefts_on_the_cpu):
        outputs = []
        for library in (peft, peft_fast):
            model = self.adapted(library, load("llama", 4).train())
            library.replace_lora_weights_loftq(model, str(original / "model.safetensors"))
            outputs.append(model(input_ids=tokens).logits)
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_our_layers(self, bits, load):
        model = self.adapted(peft_fast, peft_fast.quantize_linear_layers(load("llama", None), bits))
        peft_fast.replace_lora_weights_loftq(model)  # the model says where it came from
        self.check_weights(model, load("llama", None), 0.95)

    @staticmethod
    def check_weights(model, exact, factor):
        layers = dict(model.base_model.layers())
        assert len(layers) == 4
        for path, layer in layers.items():
            weight = exact.get_submodule(path).weight.detach()
            weight = weight.t() if hasattr(exact.get_submodule(path), "nf") else weight
            plain = ops.dequantize(layer.base_weight(), torch.float32)
            error = (plain + layer.get_delta_weight("default") - weight).norm()
            assert error < factor * (plain - weight).norm()

    def test_sharded_files_and_conv1d(self, load, tmp_path):
        base = load("gpt2", None)
        base.save_pretrained(tmp_path, max_shard_size="100KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
        model = peft_fast.get_peft_model(
            load("gpt2", 4), peft_fast.LoraConfig(r=8, lora_alpha=8, target_modules=["c_attn", "c_fc"])
        )
        peft_fast.replace_lora_weights_loftq(model, tmp_path)
        self.check_weights(model, base, 0.95)

    def test_a_callback_decides_layer_by_layer(self, load):
        model, seen = self.adapted(peft_fast, load("llama", 4)), []

        def callback(whole, name):
            assert whole is model
            seen.append(name)
            return name == "model.layers.1.mlp.down_proj"

        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        peft_fast.replace_lora_weights_loftq(model, callback=callback)
        changed = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
        prefix = "base_model.model.model.layers.1.mlp.down_proj"
        assert changed == {f"{prefix}.lora_A.default.weight", f"{prefix}.lora_B.default.weight"}
        names = ("self_attn.q_proj", "mlp.down_proj")
        assert sorted(seen) == sorted(f"model.layers.{i}.{name}" for i in (0, 1) for name in names)

    def test_whatever_fails_leaves_the_adapters(self, load, untouched, tmp_path, folders, monkeypatch):
        model = self.adapted(peft_fast, load("llama", 4))
        replace = peft_fast.replace_lora_weights_loftq

        def callback(whole, name):
            if "layers.1" in name:
                raise KeyError(name)
            return True

        with untouched(model):
            with pytest.raises(KeyError, match="layers.1"):
                replace(model, callback=callback)
            with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
                replace(model, tmp_path)
            with pytest.raises(ValueError, match="must be the checkpoint of this very model"):
                replace(model, folders["gpt2"])
            with pytest.raises(ValueError, match="'other' does not exist"):
                replace(model, adapter_name="other")
        monkeypatch.setattr(model.get_base_model(), "name_or_path", "nobody/nothing-there")
        with untouched(model), pytest.raises(FileNotFoundError, match="neither a folder nor in the Hub's cache"):
            replace(model)
        monkeypatch.setattr(model.get_base_model(), "name_or_path", "")
        with untouched(model), pytest.raises(ValueError, match="model_path is needed"):
            replace(model)

    def test_weights_of_another_size(self, load, tmp_path, llama, untouched):
        llama(hidden_size=32, intermediate_size=64).save_pretrained(tmp_path)
        model = self.adapted(peft_fast, load("llama", 4))
        with untouched(model), pytest.raises(ValueError, match=r"is \(32, 32\) in .* and \(64, 64\) in the model"):
            peft_fast.replace_lora_weights_loftq(model, tmp_path)

    def test_a_dense_model(self, llama, untouched):
        model = self.adapted(peft_fast, llama())
        with untouched(model), pytest.raises(ValueError, match="no k-bit linear layer has an adapter"):
            peft_fast.replace_lora_weights_loftq(model)
        with pytest.raises(TypeError, match="must be a PeftModel, got Linear"):
            peft_fast.replace_lora_weights_loftq(nn.Linear(2, 2))

    def test_nothing_is_kept_of_the_files(self, load, original):
        """Tensors are read one at a time."""
        files = replace_loftq._Checkpoint(load("llama", 4), original)
        assert all(isinstance(value, str) for value in files.places.values())
