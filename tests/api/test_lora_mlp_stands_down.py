"""When an MLP that could run as one op is run layer by layer instead, and that it says why."""

import accelerate
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

import peft_fast
from peft_fast import LoraConfig, set_lora_mlp
from peft_fast.dispatch import use_backend

from .lora_mlp_models import TARGETS, Gated, K, adapted, mlp_of, row


def _hook_on(name):
    def change(model):
        mlp_of(model).get_submodule(name).register_forward_hook(lambda module, args, out: out * 1.5)

    return change


def _own_forward(model):
    """As Liger and kernels do it."""
    mlp = mlp_of(model)
    mlp.forward = lambda x: 2 * mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def _two_active(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def _offloaded(model):
    base = mlp_of(model).up_proj.base_layer
    accelerate.hooks.add_hook_to_module(base, accelerate.hooks.AlignDevicesHook("cpu", offload=True))


def _one_merged(model):
    mlp_of(model).up_proj.merge()


def _trainable_weight(model):
    mlp_of(model).up_proj.base_layer.weight.requires_grad_(True)


def _own_backend(model):
    mlp_of(model).up_proj.backend = "torch"


class _Wrapper(nn.Module):  # FSDP's stands for the module, too
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x) * 1.5


def _wrapped(model):
    mlp_of(model).up_proj = _Wrapper(mlp_of(model).up_proj)


def _other_kind_of_layer(model):
    class Dora(type(mlp_of(model).up_proj)):
        def forward(self, x):
            return 1.5 * super().forward(x)

    mlp_of(model).up_proj.__class__ = Dora


def _activation_hook(model):
    mlp_of(model).act_fn.register_forward_hook(lambda module, args, out: out * 1.5)


STANDS_DOWN = [
    (_hook_on("gate_proj"), "gate_proj has hooks or a forward of its own"),
    (_hook_on("up_proj.base_layer"), "up_proj must be called: its base layer, a Linear, has hooks"),
    (_activation_hook, "its activation is none of"),
    (_own_forward, "its forward was replaced"),
    (_two_active, "gate_proj has several active adapters"),
    (_offloaded, "up_proj must be called: its base layer, a Linear, has hooks or a forward of its own"),
    (_one_merged, "up_proj has merged adapters"),
    (_trainable_weight, "up_proj has a weight that is trained"),
    (_own_backend, "its layers have different backends"),
    (_wrapped, "up_proj must be called: its base layer, a _Wrapper, has"),
    (_other_kind_of_layer, "up_proj is a Dora"),
    (lambda model: model.base_model.disable_adapter_layers(), "no adapter is in effect"),
    (lambda model: model.base_model.model.mlp.up_proj.to(torch.float64), "its layers multiply in different dtypes"),
    (lambda model: set_lora_mlp(model, "off"), "switched off by set_lora_mlp"),
]


class TestStandingDown:
    @pytest.mark.parametrize(("change", "because"), STANDS_DOWN, ids=[because for _, because in STANDS_DOWN])
    def test_a_reason_is_given_and_the_layers_are_called(self, change, because, monkeypatch):
        model, x = adapted(), torch.randn(3, K)
        change(model)
        route, reason = row(model)
        assert route == "layers"
        assert reason.startswith(because)
        called = []
        monkeypatch.setattr(peft_fast.ops, "lora_mlp", lambda *args, **kwargs: called.append(1))
        mlp = mlp_of(model)
        if "different dtypes" in because:
            with pytest.raises((RuntimeError, TypeError)):  # as it would without us
                model(x)
            return
        y = model(x)
        expected = vars(mlp).get("forward", lambda x: Gated.forward(mlp, x))(x)
        torch.testing.assert_close(y, expected)
        assert not called

    def test_layers_that_are_called_have_the_activation_and_the_product_in_one_op(self):
        """Which keeps less for the backward than the MLP's own forward, and gives the same."""
        model, x = adapted(), torch.randn(30, K)
        mlp = mlp_of(model)
        mlp.up_proj.register_forward_hook(lambda *_: None)
        assert row(model)[1].endswith("silu and the product are one op")
        results, kept = [], []
        for run in (model, lambda x: Gated.forward(mlp, x)):
            saved = {}

            def keep(t, saved=saved):
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            model.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                y = run(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            kept.append(sum(saved.values()))
        for mine, expected in zip(*results, strict=True):
            torch.testing.assert_close(mine, expected)
        assert kept[0] < kept[1]

    def test_everything_merged(self):
        model, x = adapted(), torch.randn(3, K)
        y = model(x)
        model.merge_adapter()
        assert row(model) == ("layers", "gate_proj has merged adapters")
        torch.testing.assert_close(model(x), y)
        model.unmerge_adapter()
        assert row(model)[0] == "mlp"

    def test_keyword_arguments_and_wrong_inputs_go_to_the_mlps_own_forward(self):
        mlp, x = mlp_of(adapted()), torch.randn(3, K)
        assert torch.allclose(mlp(hidden=x), mlp(x))
        with pytest.raises(TypeError, match="positional argument"):
            mlp(x, x)
        with pytest.raises(TypeError, match="x is torch.bfloat16 but the weight is torch.float32"):
            mlp(x.bfloat16())

    def test_hooks_for_all_modules(self):
        model, seen = adapted(), []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        try:
            assert row(model) == ("layers", "there are hooks for all modules")
            model(torch.randn(3, K))
        finally:
            handle.remove()
        assert nn.SiLU in seen
        assert row(model)[0] == "mlp"

    def test_a_class_that_is_patched_afterwards(self, monkeypatch):
        class Patched(Gated):
            pass

        model, x = adapted(Patched()), torch.randn(3, K)
        y = model(x)
        monkeypatch.setattr(Gated, "forward", lambda self, x: 2 * y)
        assert row(model) == ("layers", "its class's forward was replaced")
        assert torch.equal(model(x), 2 * y)

    def test_a_backend_asked_for_by_name_is_refused_where_it_cannot_run(self):
        model = adapted()
        with use_backend("triton"), pytest.raises(peft_fast.dispatch.TritonUnsupported):
            model(torch.randn(2, K))
