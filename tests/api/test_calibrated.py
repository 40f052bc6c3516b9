"""Initialisations from sample data: CorDA and LoRA-GA."""

import dataclasses
import importlib
import sys
import types

import peft
import pytest
import torch

import peft_fast
from peft_fast.tuners.lora import CordaConfig, LoraGAConfig
from peft_fast.tuners.lora.corda import preprocess_corda

LIBRARIES = (peft, peft_fast)
# peft's module takes a dataclass decorator from the package attrs, which it does not ask to be installed.
sys.modules.setdefault("attr", types.ModuleType("attr")).dataclass = dataclasses.dataclass
pefts_corda = importlib.import_module("peft.tuners.lora.corda")
TARGETS = ["q_proj", "down_proj"]
CORDA = {peft: pefts_corda.preprocess_corda, peft_fast: preprocess_corda}


def corda_config(library, rank=4, **options):
    kind = peft.tuners.lora.config.CordaConfig if library is peft else CordaConfig
    more = {key: options.pop(key) for key in ("rank_pattern", "use_rslora", "use_dora") if key in options}
    return library.LoraConfig(
        r=rank, lora_alpha=6, target_modules=TARGETS, init_lora_weights="corda", corda_config=kind(**options), **more
    )


def lora_ga_config(library, rank=4, target_modules=TARGETS, **options):
    return library.LoraConfig(
        r=rank, lora_alpha=6, target_modules=target_modules, init_lora_weights="lora_ga",
        lora_ga_config=library.LoraGAConfig(**options),
    )  # fmt: skip


def samples(count=12):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 96, (1, 20), generator=generator) for _ in range(count)]


def running(base):
    def run_model():
        for tokens in samples():
            base(input_ids=tokens)

    return run_model


def stepping(base):
    def train_step():
        for tokens in samples(3):
            base(input_ids=tokens, labels=tokens).loss.backward()

    return train_step


def compare(models, tokens, atol=1e-5):
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models)):
        if "lora_" not in name:  # the singular vectors' signs are free
            torch.testing.assert_close(other, one, atol=atol, rtol=1e-3, msg=name)
    outputs = [model(input_ids=tokens).logits for model in models]
    torch.testing.assert_close(outputs[1], outputs[0], atol=atol, rtol=1e-3)
    return outputs[1]


class TestCorda:
    @pytest.mark.parametrize("method", ["ipm", "kpm"])
    @pytest.mark.parametrize("options", [{}, {"rank_pattern": {"q_proj": 2}}, {"use_rslora": True}], ids=str)
    def test_as_in_peft(self, method, options, llama, tokens):
        models = []
        for library in LIBRARIES:
            base, config = llama(), corda_config(library, corda_method=method, **options)
            expected = base(input_ids=tokens).logits
            CORDA[library](base, config, running(base))
            models.append(library.get_peft_model(base, config))
        output = compare(models, tokens)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-3)
        layers = [model.base_model.model.model.layers[0].self_attn.q_proj for model in models]
        deltas = [layer.get_delta_weight("default") for layer in layers]
        torch.testing.assert_close(*deltas, atol=1e-5, rtol=1e-2)
        assert not hasattr(layers[1].base_layer, "eigens")

    def test_the_largest_directions_are_those_of_the_data(self, llama):
        """Of all adapters of rank 4, this one has most of what the layer makes of the samples."""
        base = llama()
        seen = []
        layer = base.model.layers[0].self_attn.q_proj
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0].detach()))
        running(base)()
        handle.remove()
        x, weight = torch.cat(seen), layer.weight.detach().clone()
        left = {}
        for init in ("corda", "pissa"):
            model, config = llama(), corda_config(peft_fast)
            if init == "corda":
                preprocess_corda(model, config, running(model))
            else:
                config = peft_fast.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="pissa")
            adapted = peft_fast.get_peft_model(model, config)
            delta = adapted.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
            left[init] = float((x @ (weight - delta.detach()).t()).norm())
        assert left["corda"] < left["pissa"]

    def test_files(self, llama, tokens, tmp_path):
        """Covariances and results are kept; peft reads ours, and we read peft's."""
        files = {
            "covariance_file": str(tmp_path / "a" / "covariance.pt"),
            "cache_file": str(tmp_path / "b" / "cache.pt"),
        }
        models = []
        for library in LIBRARIES:
            for read in (False, True):
                base, config = llama(), corda_config(library, **files)
                CORDA[library](base, config, None if read else running(base))
                models.append(library.get_peft_model(base, config))
            for other in LIBRARIES:
                base, config = llama(), corda_config(other, **files)
                CORDA[other](base, config)
                models.append(other.get_peft_model(base, config))
                base, config = llama(), corda_config(other, covariance_file=files["covariance_file"])
                CORDA[other](base, config)
                models.append(other.get_peft_model(base, config))
            for file in files.values():
                (tmp_path / file).unlink()
        outputs = [model(input_ids=tokens).logits for model in models]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-3)

    def test_another_model_is_looked_at(self, llama, tokens):
        base, hooked, config = llama(), llama(), corda_config(peft_fast, prune_temporary_fields=False)
        preprocess_corda(base, config, running(hooked), hooked)
        assert not hooked.model.layers[0].self_attn.q_proj._forward_hooks
        layer = base.model.layers[0].self_attn.q_proj
        assert (layer.covariance_matrix.shape, layer.rank, layer.corda_method) == ((64, 64), 4, "ipm")
        expected = base(input_ids=tokens).logits
        model = peft_fast.get_peft_model(base, config)
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-3)

    def test_conversion_and_conv1d(self, load, tokens, trained, tmp_path):
        base = load("gpt2", None)
        config = peft_fast.LoraConfig(
            r=4, target_modules=["c_attn"], init_lora_weights="corda", corda_config={"corda_method": "kpm"},
            fan_in_fan_out=True,
        )  # fmt: skip
        preprocess_corda(base, config, running(base))
        model = peft_fast.get_peft_model(base, config)
        expected = load("gpt2", None)(input_ids=tokens).logits
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-3)
        model.save_pretrained(tmp_path / "initial")
        trained(model)
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
        for library in LIBRARIES:
            loaded = library.PeftModel.from_pretrained(load("gpt2", None), tmp_path / "plain")
            found = loaded(input_ids=tokens).logits
            torch.testing.assert_close(found, model(input_ids=tokens).logits, atol=1e-4, rtol=1e-3)

    def test_errors(self, llama, untouched, tmp_path):
        base, config = llama(), corda_config(peft_fast)
        with untouched(base):
            with pytest.raises(ValueError, match="needs what preprocess_corda leaves at the layers: call it first"):
                peft_fast.get_peft_model(base, config)
            with pytest.raises(ValueError, match="run_model is needed"):
                preprocess_corda(base, config)
            with pytest.raises(ValueError, match="did not run 4 of the layers, such as model.layers.0"):
                preprocess_corda(base, config, lambda: None)
            with pytest.raises(ValueError, match="corda_config=CordaConfig"):
                preprocess_corda(base, peft_fast.LoraConfig(target_modules=TARGETS), running(base))
            with pytest.raises(ValueError, match="name no dense linear layer"):
                preprocess_corda(base, peft_fast.LoraConfig(
                    target_modules=["embed_tokens"], init_lora_weights="corda", corda_config={}
                ), running(base))  # fmt: skip
            torch.save({"x": torch.zeros(1)}, tmp_path / "cache.pt")
            with pytest.raises(ValueError, match="was made for another model or config: .*q_proj.eigens"):
                preprocess_corda(base, corda_config(peft_fast, cache_file=str(tmp_path / "cache.pt")))
            with pytest.raises(ValueError, match="needs a rank of at most 64"):
                preprocess_corda(base, corda_config(peft_fast, rank=65), running(base))
        preprocess_corda(base, config, running(base))
        with untouched(base), pytest.raises(ValueError, match="is for another layer or rank: U .64, 4."):
            peft_fast.get_peft_model(base, corda_config(peft_fast, rank=3))
        assert hasattr(base.model.layers[0].self_attn.q_proj, "eigens")
        base.model.embed_tokens.weight.data[:] = 0
        with pytest.raises(ValueError, match="hold inf or NaN: check the sample data"):
            preprocess_corda(base, config, running(base))
        assert not base.model.layers[0].self_attn.q_proj._forward_hooks


class TestLoraGA:
    @pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
    @pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
    def test_as_in_peft(self, direction, scale, llama, tokens):
        models = []
        for library in LIBRARIES:
            base, config = llama(), lora_ga_config(library, direction=direction, scale=scale)
            expected = base(input_ids=tokens).logits
            torch.manual_seed(1)
            library.preprocess_loraga(base, config, stepping(base))
            models.append(library.get_peft_model(base, config))
        output = compare(models, tokens)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-3)
        layers = [model.base_model.model.model.layers[0].self_attn.q_proj for model in models]
        for name in ("lora_A", "lora_B"):
            one, other = (getattr(layer, name)["default"].weight.detach() for layer in layers)
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-2)
        assert not hasattr(layers[1].base_layer, "_peft_loraga_grad")

    def test_the_first_step_follows_the_gradient(self, llama):
        """With A and B along the gradient's singular vectors, what they can change has most of it."""
        base = llama()
        config = lora_ga_config(peft_fast, direction="ArB2r")
        peft_fast.preprocess_loraga(base, config, stepping(base))
        gradient = base.model.layers[0].self_attn.q_proj._peft_loraga_grad.clone()
        model = peft_fast.get_peft_model(base, config)
        A = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach()
        Q, _ = torch.linalg.qr(A.t())
        best = torch.linalg.svdvals(gradient)[:4].norm()
        torch.testing.assert_close((gradient @ Q).norm(), best, rtol=1e-3, atol=0)

    def test_the_model_is_as_it_was(self, llama, untouched):
        base = llama().eval()
        frozen = base.model.embed_tokens.weight.requires_grad_(False)
        base.lm_head.weight.grad = kept = torch.ones_like(base.lm_head.weight)
        weight = base.model.layers[0].self_attn.q_proj.weight
        weight.grad = own = torch.ones_like(weight)
        with untouched(base):
            peft_fast.preprocess_loraga(base, lora_ga_config(peft_fast), stepping(base))
            found = base.model.layers[0].self_attn.q_proj._peft_loraga_grad
            for module in base.modules():
                vars(module).pop("_peft_loraga_grad", None)
        assert base.lm_head.weight.grad is kept
        assert weight.grad is own
        fresh = llama()
        peft_fast.preprocess_loraga(fresh, lora_ga_config(peft_fast), stepping(fresh))
        torch.testing.assert_close(found, fresh.model.layers[0].self_attn.q_proj._peft_loraga_grad)
        assert fresh.model.layers[0].self_attn.q_proj.weight.grad is None
        assert not frozen.requires_grad
        assert not any(module._backward_hooks for module in base.modules())

    def test_a_file(self, llama, tokens, tmp_path):
        file, outputs = str(tmp_path / "sub" / "gradients.pt"), []
        for library in (*LIBRARIES, *LIBRARIES):
            base, config = llama(), lora_ga_config(library)
            (tmp_path / "sub").mkdir(exist_ok=True)
            library.preprocess_loraga(base, config, stepping(base) if not outputs else None, file)
            torch.manual_seed(2)
            model = library.get_peft_model(base, config)
            outputs.append(model.disable_adapter and model.base_model.model.model.layers[0].self_attn.q_proj.weight)
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-3)

    def test_a_trained_adapter_is_converted(self, llama, trained, tokens, tmp_path):
        base, config = llama(), lora_ga_config(peft_fast)
        peft_fast.preprocess_loraga(base, config, stepping(base))
        model = peft_fast.get_peft_model(base, config)
        model.save_pretrained(tmp_path / "initial")
        expected = trained(model)(input_ids=tokens).logits
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
        for library in LIBRARIES:
            loaded = library.PeftModel.from_pretrained(llama(), tmp_path / "plain")
            torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-3)

    def test_conv1d(self, load, tokens):
        base = load("gpt2", None)
        config = lora_ga_config(peft_fast, target_modules=["c_attn"])
        config.fan_in_fan_out = True
        expected = base(input_ids=tokens).logits
        peft_fast.preprocess_loraga(base, config, stepping(base))
        model = peft_fast.get_peft_model(base, config)
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-3)

    def test_without_gradients_it_starts_plainly_and_says_so(self, llama, tokens):
        base = llama()
        expected = base(input_ids=tokens).logits
        with pytest.warns(UserWarning, match="preprocess_loraga has left none at these layers"):
            model = peft_fast.get_peft_model(base, lora_ga_config(peft_fast))
        assert torch.equal(model(input_ids=tokens).logits, expected)

    def test_errors(self, llama, untouched):
        base = llama()

        def failing():
            raise KeyError("step")

        with untouched(base):
            with pytest.raises(ValueError, match="lora_ga_config=LoraGAConfig"):
                peft_fast.preprocess_loraga(base, peft_fast.LoraConfig(target_modules=TARGETS), stepping(base))
            with pytest.raises(ValueError, match="gave 4 of the layers no gradient, such as model.layers.0"):
                peft_fast.preprocess_loraga(base, lora_ga_config(peft_fast), lambda: None)
            with pytest.raises(KeyError, match="step"):
                peft_fast.preprocess_loraga(base, lora_ga_config(peft_fast), failing)
        small = peft_fast.quantize_linear_layers(llama(), 4)
        with untouched(small), pytest.raises(ValueError, match="name no dense linear layer"):
            peft_fast.preprocess_loraga(small, lora_ga_config(peft_fast), stepping(small))
        config = lora_ga_config(peft_fast, rank=40)
        peft_fast.preprocess_loraga(base, config, stepping(base))
        with untouched(base), pytest.raises(ValueError, match="at most half of its smaller side, got 40"):
            peft_fast.get_peft_model(base, config)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CordaConfig(corda_method="x"), ValueError, "corda_method must be one of ipm, kpm, got 'x'"),
        (lambda: LoraGAConfig(direction="x"), ValueError, "direction must be one of ArBr, .*, got 'x'"),
        (lambda: LoraGAConfig(scale="x"), ValueError, "scale must be one of stable, .*, got 'x'"),
        (lambda: LoraGAConfig(stable_gamma=0), ValueError, "stable_gamma must be a positive number, got 0"),
        (lambda: peft_fast.LoraConfig(lora_ga_config=3), TypeError, "lora_ga_config must be a LoraGAConfig, or a dict"),
        (lambda: peft_fast.LoraConfig(lora_ga_config={"x": 1}), TypeError, r"dict of its options .*got {'x': 1}"),
    ],
)
def test_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_configs_travel(tmp_path):
    for library, other in (LIBRARIES, LIBRARIES[::-1]):
        for config in (corda_config(library, corda_method="kpm"), lora_ga_config(library, direction="ArBr")):
            config.save_pretrained(tmp_path)
            read = other.PeftConfig.from_pretrained(tmp_path)
            assert {**read.to_dict(), "peft_version": 0} == {**config.to_dict(), "peft_version": 0}
