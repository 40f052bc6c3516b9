"""LoRA-FA and Riemannian preconditioning beside peft's."""

import copy

import peft
import peft.optimizers
import pytest
import torch
from torch import nn

import peft_fast
import peft_fast.optimizers

LIBRARIES = (peft, peft_fast)
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


def adapted(library, base, **options):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return library.get_peft_model(base, library.LoraConfig(**config | options))


def steps(model, optimizer, tokens, count=4):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def same(theirs, ours, atol=1e-6, rtol=1e-3):
    assert theirs.keys() == ours.keys()
    for name, change in theirs.items():
        torch.testing.assert_close(ours[name], change, atol=atol, rtol=rtol, msg=name)


def lorafa(library, model, **options):
    given = {"r": 4, "lora_alpha": 6, "lr": 1e-3} | options
    return library.optimizers.create_lorafa_optimizer(model, **given)


class TestLoraFA:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
            {"modules_to_save": ["norm"], "target_modules": ["embed_tokens", "v_proj"]},
        ],
        ids=str,
    )
    def test_steps_are_pefts(self, options, llama, tokens, monkeypatch):
        monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
        found = []
        for library in LIBRARIES:
            model = adapted(library, llama(), **options)
            found.append(steps(model, lorafa(library, model, weight_decay=0.1), tokens))
        same(*found)
        moved = {name for name, change in found[1].items() if change.any()}
        assert any("lora_B" in name or "embedding_B" in name for name in moved)
        assert not any("_A." in name for name in moved)

    def test_peft_rounds_to_bf16_on_the_way(self, llama, tokens):
        found = []
        for library in LIBRARIES:
            model = adapted(library, llama())
            found.append(steps(model, lorafa(library, model), tokens, 1))
        for name, change in found[0].items():
            if change.any():
                assert torch.cosine_similarity(change.flatten(), found[1][name].flatten(), 0) > 0.99, name

    def test_the_step_is_the_whole_weights_closest(self, llama, tokens):
        """scale * g A is the projection of the weight's gradient onto the rows of A."""
        base = llama()
        model = adapted(peft_fast, base, target_modules=["layers.1.mlp.down_proj"])
        layer = model.base_model.model.model.layers[1].mlp.down_proj
        optimizer = lorafa(peft_fast, model)
        seen = {}
        optimizer._update = lambda parameter, gradient, group: seen.update({parameter: gradient})
        layer.base_layer.weight.requires_grad_(True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        A, scale = layer.lora_A["default"].weight.detach(), layer.scaling["default"]
        projection = layer.base_layer.weight.grad @ A.t() @ torch.linalg.inv(A @ A.t()) @ A
        step = scale * seen[layer.lora_B["default"].weight] @ A
        torch.testing.assert_close(step, projection, atol=1e-6, rtol=1e-3)

    def test_what_peft_takes_for_pairs_and_is_none(self, llama, tokens):
        """Magnitudes, biases of B and other adapters."""
        for options in ({"use_dora": True}, {"lora_bias": True}):
            model = adapted(peft_fast, llama(attention_bias=True), target_modules=["q_proj"], **options)
            model.add_adapter("other", peft_fast.LoraConfig(target_modules=["q_proj"]))
            changes = steps(model, lorafa(peft_fast, model), tokens)
            moved = {name.split("q_proj.")[-1] for name, change in changes.items() if change.any()}
            extra = "lora_magnitude_vector.default.weight" if "use_dora" in options else "lora_B.default.bias"
            assert moved == {"lora_B.default.weight", extra}

    def test_convolutions_and_16_bits(self):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)).bfloat16()
        config = peft_fast.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
        model = peft_fast.get_peft_model(base, config, autocast_adapter_dtype=False)
        optimizer = lorafa(peft_fast, model, lr=0.1)
        model(torch.randn(2, 3, 8, 8).bfloat16()).square().mean().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {name.rpartition("model.")[2] for name in moved} == {
            "0.lora_B.default.weight", "1.lora_B.default.weight",
        }  # fmt: skip

    def test_a_changed_a_and_a_resumed_optimiser(self, llama, tokens):
        model = adapted(peft_fast, llama())
        optimizer = lorafa(peft_fast, model)
        steps(model, optimizer, tokens, 2)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.data.mul_(0.5).add_(0.01)
        twin = copy.deepcopy(model)
        resumed = lorafa(peft_fast, twin)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        same(steps(twin, resumed, tokens, 2), steps(model, optimizer, tokens, 2), atol=0, rtol=0)

    def test_refused(self, llama):
        model = adapted(peft_fast, llama())
        with pytest.raises(ValueError, match="use_rslora is True here"):
            lorafa(peft_fast, model, use_rslora=True)
        with pytest.warns(FutureWarning, match="no effect"):
            lorafa(peft_fast, model, use_rslora=False)
        for wrong, match in (({"lr": -1}, "lr must be"), ({"weight_decay": -0.1}, "weight_decay must be")):
            with pytest.raises(ValueError, match=match):
                lorafa(peft_fast, adapted(peft_fast, llama()), **wrong)
        with pytest.raises(ValueError, match="found none"):
            lorafa(peft_fast, llama())


class TestRiemannian:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            (SGD, {}),
            (ADAMW, {"rank_pattern": {"q_proj": 2}, "use_dora": True}),
            (SGD, {"target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["norm"]}),
        ],
        ids=str,
    )
    def test_steps_are_pefts(self, kind, options, llama, tokens):
        found = []
        for library in LIBRARIES:
            model = adapted(library, llama(), **options)
            optimizer = library.optimizers.create_riemannian_optimizer(model, kind, lr=1e-3, reg=0.1, weight_decay=0.01)
            assert isinstance(optimizer, kind)
            found.append(steps(model, optimizer, tokens))
        same(*found, atol=2e-6)
        plain = adapted(peft_fast, llama(), **options)
        trained = [p for p in plain.parameters() if p.requires_grad]
        other = steps(plain, kind(trained, lr=1e-3, weight_decay=0.01), tokens)
        assert any(not torch.allclose(other[name], change, rtol=0.1) for name, change in found[1].items())

    def test_refused(self, llama):
        create = peft_fast.optimizers.create_riemannian_optimizer
        model = adapted(peft_fast, llama())
        with pytest.raises(TypeError, match="optimizer_cls"):
            create(model, "AdamW", lr=1)
        with pytest.raises(ValueError, match="LBFGS"):
            create(model, torch.optim.LBFGS, lr=1)
        with pytest.raises(ValueError, match="reg must be"):
            create(model, SGD, lr=1, reg=-1)
        with pytest.raises(ValueError, match="that is trained"):
            create(llama(), SGD, lr=1)
        with pytest.raises(ValueError, match="closure"):
            create(model, SGD, lr=1).step(lambda: 0)
        create(model, SGD, lr=1).step(None)  # as accelerate calls it
