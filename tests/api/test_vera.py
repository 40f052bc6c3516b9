"""What is particular to VeRA: the projections that all layers share."""

import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_fast

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tuner_cases import BY_NAME, adapted, config

LIBRARIES = (peft_fast, peft)
VERA = BY_NAME["Vera"]
FILE = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def small(library, model, **options):
    return adapted(library, model, VERA, **{**VERA.llama, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projections_are_pefts(dtype, llama):
    """The numbers of the seed, in the size of the widest layer, on the tuner and in every layer."""
    shared = []
    for library in LIBRARIES:
        model = small(library, llama(dtype), projection_prng_key=11, r=5)
        layer = model.base_model.model.model.layers[0].self_attn.v_proj
        assert layer.vera_A is model.base_model.vera_A
        shared.append([getattr(model.base_model, name)["default"] for name in ("vera_A", "vera_B")])
        assert [name for name in model.state_dict() if name.startswith("base_model.vera_")] == [
            "base_model.vera_A.default", "base_model.vera_B.default",
        ]  # fmt: skip
    assert shared[0][0].shape == (5, 128)
    torch.testing.assert_close(*shared, rtol=0, atol=0)
    assert peft_fast.VeraModel.uses_shared_state is peft.VeraModel.uses_shared_state is True


def test_without_saved_projections(llama, tokens, tmp_path):
    """Drawn again from the seed, by either library; both say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {library: small(library, llama(), save_projection=False).eval() for library in LIBRARIES}
        for library, model in models.items():
            model.save_pretrained(tmp_path / library.__name__)
    assert not any(name.startswith("base_model.vera_") for name in models[peft_fast].state_dict())
    expected = models[peft](tokens).logits
    for saved in LIBRARIES:
        assert not any("vera_A" in key for key in load_file(tmp_path / saved.__name__ / FILE))
        for loading in LIBRARIES:
            with pytest.warns(UserWarning, match="drawn from|PRNG"):
                model = loading.PeftModel.from_pretrained(llama(), tmp_path / saved.__name__)
            torch.testing.assert_close(model.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_other_projections_than_the_seeds(llama, tokens, tmp_path):
    """What is saved counts, and the adapters of a model do not write into each other's."""
    model = small(peft_fast, llama()).eval()
    model.base_model.vera_A["default"].mul_(0.5)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    for library in LIBRARIES:
        loaded = library.PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(loaded.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    both = small(peft_fast, llama())
    alone = both.eval()(tokens).logits
    both.load_adapter(tmp_path, "loaded")
    torch.testing.assert_close(both(tokens).logits, alone, rtol=0, atol=0)
    both.set_adapter("loaded")
    torch.testing.assert_close(both(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [(2, 6), (4, 4)], ids=str)
@pytest.mark.parametrize("first", ["small", "large"])
def test_adapters_of_other_ranks_and_layers(first, ranks, llama, tokens, tmp_path):
    """In either order; peft refuses some, and fails in others' forward."""
    small_r, large_r = ranks
    options = {
        "small": {"r": small_r, "target_modules": ["q_proj"]},
        "large": {"r": large_r, "target_modules": ["down_proj"]},
    }
    expected = {}
    for name, given in options.items():
        alone = small(peft, llama(), **given).eval()
        expected[name] = alone(tokens).logits
        alone.save_pretrained(tmp_path / name)
    second = "large" if first == "small" else "small"
    model = peft_fast.PeftModel.from_pretrained(llama(), tmp_path / first, first)
    model.load_adapter(tmp_path / second, second)
    for name in options:
        model.set_adapter(name)
        torch.testing.assert_close(model.eval()(tokens).logits, expected[name], rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["small", "large"])
    with model.disable_adapter():
        plain = model(tokens).logits
    assert not torch.allclose(model(tokens).logits, plain, atol=1e-3)


def test_dropout(llama, tokens):
    """Masks differ from peft's; in eval mode there are none."""
    models = [small(library, llama(), vera_dropout=0.5) for library in LIBRARIES]
    model = models[0].train()
    torch.manual_seed(0)
    first = model(tokens).logits
    assert not torch.allclose(first, model(tokens).logits)
    torch.manual_seed(0)
    torch.testing.assert_close(model(tokens).logits, first, rtol=0, atol=0)
    torch.testing.assert_close(*(m.eval()(tokens).logits for m in models), rtol=1e-4, atol=1e-5)


def test_hooks_and_a_dropout_of_ones_own(llama, tokens):
    model = small(peft_fast, llama()).eval()
    expected = model(tokens).logits
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert seen
    assert layer.route(4).route == "added"
    layer.base_layer._forward_hooks.clear()
    layer.vera_dropout["default"] = torch.nn.Hardtanh(-1e9, 1e9)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert "not torch's own" in layer.route(4).because


def test_in_one_op(llama):
    """The base layer and the adapter in one op, and no gradient for A."""
    layer = small(peft_fast, llama()).base_model.model.model.layers[0].self_attn.q_proj
    assert "factors of rank 4" in layer.route(40).because
    A, B = layer.product("default")
    assert not A.requires_grad
    assert B.requires_grad
    assert A.data_ptr() == layer.vera_A["default"].data_ptr()


class TestFiles:
    def test_projections_that_are_not_there(self, llama, tmp_path, untouched):
        small(peft_fast, llama()).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / FILE)
        save_file({key: value for key, value in tensors.items() if "vera_A" not in key}, tmp_path / FILE)
        base = llama()
        with untouched(base, tmp_path), pytest.raises(ValueError, match="they are not in it: set save_projection to"):
            peft_fast.PeftModel.from_pretrained(base, tmp_path)

    def test_projections_that_are_too_small(self, llama, tmp_path, untouched):
        small(peft_fast, llama()).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / FILE)
        key = "base_model.vera_A"
        save_file({**tensors, key: tensors[key][:, :100].contiguous()}, tmp_path / FILE)
        base = llama()
        with untouched(base, tmp_path), pytest.raises(ValueError, match="do not fit"):
            peft_fast.PeftModel.from_pretrained(base, tmp_path)

    def test_projections_that_are_not_wanted(self, llama, tmp_path, tokens):
        small(peft_fast, llama()).save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="not saved"):
            given = config(peft_fast, VERA, **VERA.llama, save_projection=False)
        with pytest.warns(UserWarning, match="says to leave them"):
            model = peft_fast.PeftModel.from_pretrained(llama(), tmp_path, config=given)
        torch.testing.assert_close(model(tokens).logits, small(peft_fast, llama())(tokens).logits)


def test_alike_adapters_only(llama, untouched):
    model = small(peft_fast, llama())
    with untouched(model), pytest.raises(ValueError, match="projection_prng_key must be the same"):
        model.add_adapter("b", config(peft_fast, VERA, **VERA.llama, projection_prng_key=1))
    with pytest.warns(UserWarning, match="not saved"):
        unsaved = config(peft_fast, VERA, **VERA.llama, save_projection=False)
    with untouched(model), pytest.raises(ValueError, match="save_projection must be the same"):
        model.add_adapter("b", unsaved)


def test_injected(llama, tokens, tmp_path):
    """Without a PeftModel around the model: its files are the same."""
    whole = small(peft_fast, llama()).eval()
    torch.manual_seed(2)
    model = peft_fast.inject_adapter_in_model(config(peft_fast, VERA, **VERA.llama), llama())
    tensors = peft_fast.get_peft_model_state_dict(whole)
    result = peft_fast.set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    torch.testing.assert_close(model.eval()(tokens).logits, whole(tokens).logits)
    assert {key.removeprefix("base_model.model.") for key in tensors} == set(peft_fast.get_peft_model_state_dict(model))


def test_after_the_last_adapter_was_deleted(llama):
    model = small(peft_fast, llama())
    model.delete_adapter("default")
    assert not len(model.base_model.vera_A)
    with pytest.warns(UserWarning, match="not saved"):
        model.add_adapter("b", config(peft_fast, VERA, **VERA.llama, save_projection=False))
    assert not any(name.startswith("base_model.vera_") for name in model.state_dict())
