"""What is particular to AdaLoRA: the term in the loss, the allotting of ranks, and files without what was dropped."""

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft_fast

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tuner_cases import BY_NAME, adapted, config

LIBRARIES = (peft_fast, peft)
ADALORA = BY_NAME["AdaLora"]
STEPS = {"init_r": 4, "target_r": 2, "total_step": 8, "tinit": 1, "tfinal": 2, "deltaT": 2, "orth_reg_weight": 0.3}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def small(library, model, **options):
    return adapted(library, model, ADALORA, **{**ADALORA.llama, "task_type": "CAUSAL_LM", **STEPS, **options})


def trained(library, model, tokens, steps=range(8)):
    """The states after each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    states = []
    for step in steps:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        pattern = model.peft_config["default"].rank_pattern
        own = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
        allocator = model.base_model.rankallocator
        importance = [dict(allocator.ipt), dict(allocator.exp_avg_ipt), dict(allocator.exp_avg_unc)]
        states.append((loss.detach(), json.dumps(pattern, sort_keys=True), own, importance))
    return states


def test_training_is_pefts(llama, tokens):
    """At every step the loss with its term, which values are dropped, and all weights."""
    ours, theirs = (trained(library, small(library, llama()), tokens) for library in LIBRARIES)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine[0], other[0], rtol=1e-4, atol=0)
        assert mine[1] == other[1]
        torch.testing.assert_close(mine[2], other[2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine[3], other[3], rtol=1e-3, atol=1e-7)
    kept = [sum(mask) for mask in json.loads(ours[-1][1]).values()]
    assert sum(kept) == 2 * len(kept)
    assert len(set(kept)) > 1


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_that_overflow(value, llama, tokens):
    """As in the first steps with a GradScaler, which leaves these out: what is dropped later is as if they were not."""
    patterns = []
    for overflows in (False, True):
        model = small(peft_fast, llama())
        if overflows:
            model(tokens, labels=tokens).loss.backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(value)
            model.base_model.update_and_allocate(0)
            model.zero_grad()
        patterns.append(json.loads(trained(peft_fast, model, tokens)[-1][1]))
    assert patterns[0] == patterns[1]
    assert sum(map(sum, patterns[1].values())) == 2 * len(patterns[1])


def test_the_term_in_the_loss(llama, tokens):
    """Only where the model's outputs have a loss, and only of the adapter that is trained."""
    models = [small(peft_fast, llama(), orth_reg_weight=weight) for weight in (0.0, 1.0)]
    plain, with_term = (model(tokens, labels=tokens).loss for model in models)
    expected = []
    for name, parameter in models[1].named_parameters():
        if "lora_A" in name or "lora_B" in name:
            matrix = parameter if "lora_A" in name else parameter.T
            expected.append((matrix @ matrix.T - torch.eye(len(matrix))).norm())
    torch.testing.assert_close(with_term - plain, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    assert models[1](tokens).loss is None


@pytest.mark.parametrize("steps", [range(3), range(8)])
def test_files_have_what_was_kept(steps, llama, tokens, tmp_path):
    outputs = {}
    for library in LIBRARIES:
        model = small(library, llama())
        trained(library, model, tokens, steps)
        model.eval().save_pretrained(tmp_path / library.__name__)
        outputs[library] = model(tokens).logits
    files = [load_file(tmp_path / library.__name__ / "adapter_model.safetensors") for library in LIBRARIES]
    assert {key: value.shape for key, value in files[0].items()} == {key: v.shape for key, v in files[1].items()}
    assert len({value.shape[0] for key, value in files[0].items() if "lora_E" in key}) > 1
    saved = [json.loads((tmp_path / l.__name__ / "adapter_config.json").read_text())["rank_pattern"] for l in LIBRARIES]
    assert saved[0] == saved[1]
    for folder in LIBRARIES:
        for loading in LIBRARIES:
            model = loading.PeftModel.from_pretrained(llama(), tmp_path / folder.__name__).eval()
            torch.testing.assert_close(model(tokens).logits, outputs[folder], rtol=1e-4, atol=1e-4)
    merged = peft_fast.PeftModel.from_pretrained(llama(), tmp_path / "peft").merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, outputs[peft], rtol=1e-4, atol=1e-4)


def test_a_config_used_again_starts_anew(llama, tokens):
    """Training writes rank_pattern into the config; the next model starts with all ranks, as in peft."""
    for library in LIBRARIES:
        model = small(library, llama())
        trained(library, model, tokens)
        again = library.get_peft_model(llama(), model.peft_config["default"])
        assert all(layer.shape[0] == 4 for name, layer in again.named_parameters() if "lora_E" in name)


def test_layers_of_which_nothing_is_left(llama, tokens, tmp_path):
    model = small(peft_fast, llama()).eval()
    kept = {}
    for name, parameter in model.base_model.model.named_parameters():
        if "lora_E" in name:
            kept[name] = [False] * 4 if "q_proj" in name else [True, False, True, False]
            parameter.data[~torch.tensor(kept[name])] = 0
    model.peft_config["default"].rank_pattern = kept
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = peft_fast.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    layer = loaded.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].shape == (0, 64)
    assert "all of its values were dropped" in layer.route(4).because
    torch.testing.assert_close(loaded.merge_and_unload()(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_comes_back_into_the_model_that_wrote_it(llama, tokens, tmp_path):
    """Trainer does so with the best model: the file has fewer values than the layers."""
    model = small(peft_fast, llama())
    trained(peft_fast, model, tokens)
    model.save_pretrained(tmp_path)
    expected = model.eval()(tokens).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 1
    model.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_training_a_loaded_one_further(llama, tokens, tmp_path):
    """peft allots among the ranks that it started with, and fails."""
    model = small(peft_fast, llama())
    trained(peft_fast, model, tokens)
    model.save_pretrained(tmp_path)
    again = peft_fast.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    again.peft_config["default"].target_r = 1
    again.base_model.rankallocator = type(again.base_model.rankallocator)(
        again.base_model.model, again.peft_config["default"], "default"
    )
    trained(peft_fast, again, tokens)
    expected = again.eval()(tokens).logits
    again.save_pretrained(tmp_path / "again")
    last = peft_fast.PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    torch.testing.assert_close(last(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert sum(len(p) for n, p in last.named_parameters() if "lora_E" in n) == 6


def test_one_is_trained(llama, tokens, untouched):
    model = small(peft_fast, llama())
    with untouched(model), pytest.raises(ValueError, match="trains one adapter of a model, and 'default' is trained"):
        model.add_adapter("b", config(peft_fast, ADALORA, **ADALORA.llama))
    model.add_adapter("b", config(peft_fast, ADALORA, **ADALORA.llama, inference_mode=True))
    with untouched(model), pytest.raises(ValueError, match="needs gradients"):
        model.base_model.update_and_allocate(0)
    model.delete_adapter("default")
    assert model.base_model.trainable_adapter_name is None
    assert model(tokens, labels=tokens).loss.isfinite()
    with pytest.raises(ValueError, match="no adapter is trained"):
        model.base_model.update_and_allocate(0)
    with pytest.raises(TypeError, match="cannot be combined"):
        model.base_model.add_weighted_adapter(["b"], [1.0], "c")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"total_step": None}, "needs total_step"),
        ({"tinit": 10}, "no step is left in which ranks are reduced"),
        ({"use_dora": True}, "has no DoRA"),
        ({"loftq_config": {"loftq_bits": 4}}, "has no LoftQ"),
        ({"target_parameters": ["x"]}, "adapts no target_parameters"),
        ({"init_r": 0}, "init_r must be a positive integer"),
        ({"deltaT": 0}, "deltaT must be a positive integer"),
        ({"tfinal": -1}, "tfinal must be an integer from 0 on"),
        ({"beta1": 1.0}, "beta1 must be between 0 and 1"),
        ({"orth_reg_weight": -1}, "orth_reg_weight must be a finite number"),
        ({"rank_pattern": {"x": [2]}}, "rank_pattern must be lists of True and False"),
    ],
)
def test_options_that_cannot_be(options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        peft_fast.AdaLoraConfig(**{"total_step": 10, **options})


def test_options_without_effect_are_named():
    for options, named in (
        ({"r": 4}, "does not use r"),
        ({"use_rslora": True, "init_lora_weights": "gaussian"}, "does not use use_rslora, init_lora_weights"),
    ):
        with pytest.warns(UserWarning, match=named):
            peft_fast.AdaLoraConfig(total_step=10, **options)


def test_groups_are_refused(untouched):
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with untouched(base), pytest.raises(ValueError, match="a convolution of 2 groups"):
        peft_fast.get_peft_model(base, config(peft_fast, ADALORA, target_modules=["0"]))


def test_dropout(llama, tokens):
    models = [small(library, llama(), lora_dropout=0.5) for library in LIBRARIES]
    torch.manual_seed(0)
    first = models[0].train()(tokens).logits
    assert not torch.allclose(first, models[0](tokens).logits)
    torch.testing.assert_close(*(m.eval()(tokens).logits for m in models), rtol=1e-4, atol=1e-5)


def test_scales(llama, tokens):
    model = small(peft_fast, llama(), lora_alpha=6).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.get_delta_weight("default")
    layer.set_scale("default", 2.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 2 * before)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), before)


def test_ranks_that_are_no_files(llama, tmp_path, untouched):
    """Before memory is taken for them, also where the file has a rank_pattern for other layers."""
    model = small(peft_fast, llama())
    model.peft_config["default"].rank_pattern = {"model.layers.0.self_attn.q_proj.lora_E.default": [True] * 4}
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_r": 10**9}))
    base = llama()
    with untouched(base, tmp_path), pytest.raises(ValueError, match="the config says rank 1000000000"):
        peft_fast.PeftModel.from_pretrained(base, tmp_path)
