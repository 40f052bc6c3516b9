"""RandLoRA and FourierFT: what is particular to them, and that a method of their kind is a small folder."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_fast

LIBRARIES = (peft_fast, peft)
FOLDER = Path(peft_fast.__file__).parent / "tuners"


@pytest.mark.parametrize("name", ["randlora", "fourierft"])
def test_a_research_method_takes_less_than_150_lines(name):
    lines = [len(path.read_text().splitlines()) for path in (FOLDER / name).glob("*.py")]
    assert 0 < sum(lines) < 150


def base():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 12))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def randlora(library, *targets, **options):
    options = {"r": 3, "randlora_alpha": 6, "init_weights": False, **options}
    return library.RandLoraConfig(target_modules=list(targets), **options)


def model_of(library, *targets, **options):
    torch.manual_seed(2)
    return library.get_peft_model(base(), randlora(library, *targets, **options))


class TestRandLora:
    def test_dropout(self):
        models = [model_of(library, "0", "2", randlora_dropout=0.4).train() for library in LIBRARIES]
        for seed in range(3):
            outputs = []
            for model in models:
                torch.manual_seed(seed)
                outputs.append(model(X))
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(outputs[0], models[0].eval()(X), atol=1e-3)

    def test_bases_are_shared(self):
        model = model_of(peft_fast, "0", "2")
        layers = [model.base_model.model[index] for index in (0, 2)]
        assert layers[0].randlora_A is layers[1].randlora_A
        model.add_adapter("other", randlora(peft_fast, "2"))
        assert layers[1].randlora_A["other"] is layers[1].randlora_A["default"]
        model.add_adapter("finer", randlora(peft_fast, "2", r=2))
        assert layers[1].randlora_A["finer"].shape == (2, 1, 6)
        model.add_adapter("wider", randlora(peft_fast, "4"))
        assert model.base_model.model[4].randlora_B["wider"].shape == (12, 4, 3)
        model.set_adapter("wider")
        model(X).sum().backward()
        model.delete_adapter("default")
        assert "default" not in layers[0].randlora_A
        model.base_model.set_adapter(["other", "finer"])
        model(X)

    @pytest.mark.parametrize("save_projection", [True, False])
    def test_files_of_a_second_adapter(self, save_projection, tmp_path):
        """Whose bases are as large as the first one needed."""
        model = model_of(peft_fast, "0", "2", save_projection=save_projection)
        model.add_adapter("other", randlora(peft_fast, "0", save_projection=save_projection))
        model.set_adapter("other")
        expected = model.eval()(X)
        model.save_pretrained(tmp_path, selected_adapters=["other"])
        loaded = peft_fast.PeftModel.from_pretrained(base(), tmp_path / "other").eval()
        torch.testing.assert_close(loaded(X), expected)
        keys = load_file(tmp_path / "other" / "adapter_model.safetensors").keys()
        assert any("randlora_A" in key for key in keys) == save_projection

    def test_the_files_bases_count(self, tmp_path):
        """And not those that its seed gives here."""
        model = model_of(peft, "0", "2").eval()
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        tensors = {key: -value if "randlora_A" in key else value for key, value in load_file(path).items()}
        save_file(tensors, path)
        outputs = [library.PeftModel.from_pretrained(base(), tmp_path).eval()(X) for library in LIBRARIES]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(outputs[0], model(X), atol=1e-2)

    @pytest.mark.parametrize("options", [{"projection_prng_key": 5}, {"save_projection": False}])
    def test_adapters_that_do_not_go_together(self, options, untouched):
        model = model_of(peft_fast, "0")
        with untouched(model), pytest.raises(ValueError, match="must be the same for all adapters"):
            model.add_adapter("other", randlora(peft_fast, "0", **options))

    def test_bf16(self):
        """A model in bf16 gets bases that are in bf16, kept in fp32."""
        results = []
        for library in LIBRARIES:
            torch.manual_seed(2)
            model = library.get_peft_model(base().bfloat16(), randlora(library, "0", "2", sparse=True))
            layer = model.base_model.model[0]
            results.append((layer.randlora_A["default"], layer.randlora_B["default"], model(X.bfloat16()).float()))
        torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
        assert results[0][0].dtype == torch.float32
        assert torch.equal(results[0][0], results[1][0])

    def test_unsaved_bases_are_warned_of(self):
        with pytest.warns(UserWarning, match="save_projection=False"):
            randlora(peft_fast, "0", save_projection=False)


class TestFourierFT:
    def test_too_many_frequencies(self, untouched):
        model = base()
        config = peft_fast.FourierFTConfig(target_modules=["0"], n_frequency=49)
        with untouched(model), pytest.raises(ValueError, match="n_frequency must be at most 48 for a layer of 6 x 8"):
            peft_fast.get_peft_model(model, config)

    def test_all_frequencies(self):
        """The update's transform has the learned numbers where they belong."""
        torch.manual_seed(2)
        model = peft_fast.get_peft_model(base(), peft_fast.FourierFTConfig(target_modules=["0"], n_frequency=48))
        layer = model.base_model.model[0]
        spectrum = torch.zeros(6, 8)
        spectrum[tuple(layer.indices["default"])] = layer.fourierft_spectrum["default"].detach()
        assert (spectrum != 0).all()
        expected = torch.fft.ifft2(spectrum).real * 150
        torch.testing.assert_close(layer.get_delta_weight("default"), expected)

    def test_bf16(self):
        results = []
        for library in LIBRARIES:
            torch.manual_seed(2)
            config = library.FourierFTConfig(target_modules=["0", "2"], n_frequency=20, scaling=10.0)
            model = library.get_peft_model(base().bfloat16(), config, autocast_adapter_dtype=False)
            assert model.base_model.model[0].fourierft_spectrum["default"].dtype == torch.bfloat16
            results.append(model(X.bfloat16()).float())
        torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)

    def test_trained_biases(self, tmp_path):
        """By peft's name for the option, which is not the method's."""
        results = []
        for library in LIBRARIES:
            torch.manual_seed(2)
            config = library.FourierFTConfig(target_modules=["0", "2"], n_frequency=5, bias="fourier_only")
            model = library.get_peft_model(base(), config)
            results.append({n: p for n, p in model.named_parameters() if p.requires_grad})
            with torch.no_grad():
                model.base_model.model[2].base_layer.bias.add_(1)
            model.save_pretrained(tmp_path / library.__name__)
            loaded = [other.PeftModel.from_pretrained(base(), tmp_path / library.__name__) for other in LIBRARIES]
            for other in loaded:
                torch.testing.assert_close(other(X), model(X))
        torch.testing.assert_close(*results)
        assert "base_model.model.2.base_layer.bias" in results[0]

    def test_patterns(self):
        results = []
        for library in LIBRARIES:
            config = library.FourierFTConfig(
                target_modules=["0", "2", "4"], n_frequency=5, n_frequency_pattern={"2": 7, "(3|4)": 9}
            )
            model = library.get_peft_model(nn.ModuleDict({"a": base()}), config)
            results.append({n: p.shape for n, p in model.named_parameters() if p.requires_grad})
        assert results[0] == results[1]
        assert {shape[0] for shape in results[0].values()} == {5, 7, 9}

    def test_patterns_without_end(self, untouched, monkeypatch):
        monkeypatch.setattr("peft_fast.tuners.slow_patterns.SECONDS", 0.5)
        model = nn.ModuleDict({"a" * 40: nn.Linear(8, 8)})
        config = peft_fast.FourierFTConfig(target_modules=["a" * 40], n_frequency=5, n_frequency_pattern={"(a|a)*b": 7})
        with untouched(model), pytest.raises(ValueError, match="n_frequency_pattern must be a regular expression that"):
            peft_fast.get_peft_model(model, config)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_kbit_bases(self, bits):
        """Which peft takes for dense ones, and fails to merge."""
        layers = nn.Sequential(nn.Linear(64, 64))
        peft_fast.quantize_linear_layers(layers, bits=bits)
        x = torch.randn(3, 64)
        plain = layers(x)
        model = peft_fast.get_peft_model(layers, peft_fast.FourierFTConfig(target_modules=["0"], n_frequency=9))
        torch.testing.assert_close(model(x) - plain, x @ model.base_model.model[0].get_delta_weight("default").T)
