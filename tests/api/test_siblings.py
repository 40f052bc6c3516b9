"""Layers that share their input as one op: that it is the same function, when it stands down, and that it says so."""

import copy
import inspect
import pickle
import sys
import threading

import accelerate
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_fast import LoraConfig, explain, get_peft_model, ops, quantize_linear_layers, set_lora_groups
from peft_fast.tuners.lora.groups import shared_inputs

K = 32
QKV = ["q", "k", "v"]


class Attention(nn.Module):
    """Three layers of one input. `between` runs after the first of them: what must not go unnoticed happens there."""

    def __init__(self, between=None):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(K, K), nn.Linear(K, 16), nn.Linear(K, 16), nn.Linear(K, K)
        self.between = between

    def forward(self, x):
        q = self.q(x)
        if self.between is not None:
            self.between(self, x)
        k, v = self.k(x), self.v(x)
        return self.out(q * torch.cat([k, v.sin()], dim=-1))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x)


def adapted(attention=None, bits=16, **options):
    torch.manual_seed(3)
    block = Block(Attention() if attention is None else attention)
    if bits != 16:
        quantize_linear_layers(block, bits=bits, skip_modules=[])
    config = LoraConfig(**{"r": 4, "target_modules": [*QKV, "out"], "init_lora_weights": False, **options})
    return get_peft_model(block, config)


def attention_of(model):
    return model.base_model.model.attention


def row(model):
    """(route, because) of the group."""
    (found,) = [row for row in explain(model, show=False).rows if row.name.endswith("attention")]
    return found.route, found.because


def results(model, x, run=None):
    """Output and every gradient."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(5)
    y = (model if run is None else run)(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of lora_group had."""
    seen, original = [], ops.lora_group
    monkeypatch.setattr(
        ops, "lora_group", lambda x, parts, **options: seen.append(len(parts)) or original(x, parts, **options)
    )
    return seen


class TestSameFunction:
    @pytest.mark.parametrize("bits", [16, 8, 4])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_outputs_and_gradients(self, bits, autocast, calls):
        model, x = adapted(bits=bits), torch.randn(3, 7, K)
        tolerance = {"rtol": 0.03, "atol": 0.15} if autocast else {"rtol": 1e-5, "atol": 1e-4}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            together = results(model, x)
            assert calls == [3]
            set_lora_groups(model, False)
            assert_equal(together, results(model, x), **tolerance)
        assert calls == [3]
        assert row(model) == ("layers", "q, k, v share their input: switched off by set_lora_groups")
        set_lora_groups(model, True)
        assert row(model) == ("group", "q, k, v share their input: one op")

    @pytest.mark.usefixtures("keys_drawn_one_by_one")
    def test_dropout(self):
        model, x = adapted(lora_dropout=0.3), torch.randn(9, K)
        together = results(model, x)
        set_lora_groups(model, False)
        assert_equal(together, results(model, x), rtol=1e-5, atol=1e-4)

    def test_every_layer_has_a_mask_of_its_own(self):
        keys = ops.new_dropout_keys("cpu", 3)
        assert len({tuple(key.tolist()) for key in keys}) == 3
        assert all(key.dtype == torch.int32 and key.data_ptr() % 16 == 0 for key in keys)

    def test_two_runs_are_bit_for_bit_the_same(self):
        model, x = adapted(lora_dropout=0.2), torch.randn(9, K)
        first, again = results(model, x), results(model, x)
        assert all(torch.equal(first[name], again[name]) for name in first)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant, calls):
        model, x = adapted(lora_dropout=0.2), torch.randn(9, K)
        expected = results(model, x)
        del calls[:]
        recomputed = results(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
        assert calls == [3, 3]
        assert all(torch.equal(recomputed[name], expected[name]) for name in expected)
        assert row(model)[0] == "group"  # also where a recomputation stops early, by an exception

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode, calls):
        model, x = adapted(Plain()).eval(), torch.randn(3, K)
        expected = model(x)
        with mode():
            torch.testing.assert_close(model(x * 1), expected)
        assert calls == [3, 3]

    @pytest.mark.filterwarnings("ignore:.*set_peft_model_state_dict:UserWarning")
    @pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_have_groups_of_their_own(self, copy_of, calls):
        model, x = adapted(), torch.randn(3, K)
        other = copy_of(model)
        assert torch.equal(other(x), model(x))
        assert calls == [3, 3]
        set_lora_groups(other, False)
        assert row(model)[0] == "group"
        other.base_model.unload()
        model(x)
        assert calls == [3, 3, 3]

    def test_outputs_may_be_changed_in_place(self):
        class InPlace(Attention):
            def forward(self, x):
                q = self.q(x)
                k = self.k(x)
                v = self.v(x)
                return self.out(q.mul_(0.5) * torch.cat([k, v.sin_()], dim=-1))

        model, x = adapted(InPlace()), torch.randn(3, K)
        together = results(model, x)
        set_lora_groups(model, False)
        assert_equal(together, results(model, x), rtol=1e-5, atol=1e-5)

    def test_every_call_of_a_loop_over_chunks_is_a_group(self, calls):
        class Chunked(Attention):
            def forward(self, x):
                parts = []
                for part in x.chunk(3):
                    q, k, v = self.q(part), self.k(part), self.v(part)
                    parts.append(q * torch.cat([k, v], dim=-1))
                return self.out(torch.cat(parts))

        model, x = adapted(Chunked()), torch.randn(9, K)
        together = results(model, x)
        assert calls == [3, 3, 3]
        set_lora_groups(model, False)
        assert_equal(together, results(model, x), rtol=1e-5, atol=1e-4)

    def test_llama_trains_as_layer_by_layer(self, llama, calls):
        ids = torch.randint(0, 96, (2, 9))
        model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        together = results(model, torch.zeros(1), lambda x: model(input_ids=ids).logits + x)
        assert calls == [3, 3]
        set_lora_groups(model, False)
        separate = results(model, torch.zeros(1), lambda x: model(input_ids=ids).logits + x)
        assert_equal(together, separate, rtol=1e-4, atol=1e-4)


def _write_to_x(attention, x):
    x.detach().mul_(2)


def _write_to_b(attention, x):
    with torch.no_grad():
        attention.k.lora_B["default"].weight.add_(1)


def _replace_b(attention, x):
    attention.k.lora_B["default"].weight = nn.Parameter(torch.ones(16, 4))


def _write_to_base(attention, x):
    attention.k.base_layer.weight.data.add_(0)  # not counted by torch, and nothing changes
    with torch.no_grad():
        attention.k.base_layer.weight.add_(1)


def _other_scale(attention, x):
    attention.k.set_scale("default", 0.25)


def _other_scale_in_its_tensor(attention, x):
    attention.k.scaling["default"].fill_(0.25)


def _switched_off(attention, x):
    attention.k.enable_adapters(False)


def _other_backend(attention, x):
    attention.k.backend = "torch"


class Plain(Attention):
    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(q * torch.cat([k, v], dim=-1))


class ByMethod(Attention):
    def forward(self, x):
        q = self.q(x)
        x.mul_(2)
        return q + torch.cat([self.k(x), self.v(x)], dim=-1)


class ByIndex(Attention):
    def forward(self, x):
        q = self.q(x)
        x[..., 0] = 5
        return q + torch.cat([self.k(x), self.v(x)], dim=-1)


class ByOption(Attention):
    def forward(self, x):
        q = self.q(x)
        nn.functional.relu(input=x, inplace=True)
        return q + torch.cat([self.k(x), self.v(x)], dim=-1)


class ByOut(Attention):
    def forward(self, x):
        q = self.q(x)
        torch.add(q, 1, out=x)
        return q + torch.cat([self.k(x), self.v(x)], dim=-1)


class ThroughAView(Attention):
    def forward(self, x):
        flat = x.view(-1)
        q = self.q(x)
        flat += 2
        return q + torch.cat([self.k(x), self.v(x)], dim=-1)


class ByAFunction(Attention):
    def forward(self, x):
        q = self.q(x)
        double(x)
        return q + torch.cat([self.k(x), self.v(x)], dim=-1)


class ByAChild(Attention):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        q = self.q(x)
        self.act(x)
        return q + torch.cat([self.k(x), self.v(x)], dim=-1)


def double(x):
    x.mul_(2)


WRITERS = [ByMethod, ByIndex, ByOption, ByOut, ThroughAView, ByAFunction, ByAChild]


class TestNothingStale:
    @pytest.mark.parametrize(
        "between",
        [_write_to_x, _write_to_b, _replace_b, _write_to_base, _other_scale, _switched_off, _other_backend],
    )
    def test_changes_between_siblings(self, between, calls):
        model = adapted(Attention(between))
        plain = copy.deepcopy(model)
        set_lora_groups(plain, False)
        x = torch.randn(5, K)
        with torch.no_grad():
            torch.testing.assert_close(model(x.clone()), plain(x.clone()), rtol=1e-5, atol=1e-5)
        assert calls == [3]
        assert row(model) == (
            "layers",
            "q, k, v share their input: its layers were called with different inputs, or with changes in between",
        )
        model(x.clone())
        assert calls == [3]  # off for good
        attention_of(model).k.backend = None
        set_lora_groups(model, True)
        assert row(model)[0] == "group"

    def test_a_scale_that_is_a_tensor_is_changed_between(self):
        model = adapted(Attention(_other_scale_in_its_tensor))
        plain = copy.deepcopy(model)
        set_lora_groups(plain, False)
        results = []
        for one in (model, plain):
            for name in QKV:
                getattr(attention_of(one), name).scaling["default"] = torch.tensor(2.0)
            with torch.no_grad():
                results.append(one(torch.ones(5, K)))
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize("cls", WRITERS, ids=lambda cls: cls.__name__)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_an_input_that_is_written_to_between(self, cls, mode):
        """Tensors of inference_mode do not count what is written to them."""
        model = adapted(cls())
        plain = copy.deepcopy(model)
        set_lora_groups(plain, False)
        with mode():
            x = torch.randn(5, K)
            torch.testing.assert_close(model(x.clone()), plain(x.clone()), rtol=1e-5, atol=1e-5)

    def test_a_frozen_layer_between_may_read_the_input(self, calls):
        """Only q and v adapted, LoRA's most usual targets: k is called in between."""
        model = adapted(Plain(), target_modules=["q", "v"])
        with torch.inference_mode():
            model(torch.randn(5, K))
        assert calls == [2]

    def test_an_input_that_is_to_have_a_gradient_from_there_on(self):
        def between(attention, x):
            x.requires_grad_()

        model, x = adapted(Attention(between)), torch.randn(5, K)
        gradients = []
        for enabled in (True, False):
            set_lora_groups(model, enabled)
            given = x.clone()
            model(given).square().sum().backward()
            gradients.append(given.grad)
        torch.testing.assert_close(*gradients)

    def test_two_threads(self):
        """They share the layers, and what is open on them: a layer that finds nothing of its own computes alone."""
        model, xs = adapted(), [torch.randn(5, K), torch.randn(5, K)]
        with torch.no_grad():
            expected = [model(x) for x in xs]
        failures = []

        def run(x, y):
            try:
                for _ in range(150):
                    set_lora_groups(model, True)
                    with torch.no_grad():
                        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
            except BaseException as error:
                failures.append(error)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=run, args=pair) for pair in zip(xs, expected)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        assert not failures, failures[0]

    def test_grad_mode_changed_between(self):
        class Mixed(Attention):
            def forward(self, x):
                with torch.no_grad():
                    q = self.q(x)
                k, v = self.k(x), self.v(x)
                return self.out(q * torch.cat([k, v], dim=-1))

        model, x = adapted(Mixed()), torch.randn(5, K)
        assert shared_inputs(inspect.unwrap(Mixed.forward)) == (tuple(QKV),)
        together = results(model, x)
        set_lora_groups(model, False)
        assert_equal(together, results(model, x), rtol=1e-5, atol=1e-5)
        assert any("attention.k.lora_B" in name for name in together)

    def test_autocast_changed_between(self):
        class Mixed(Attention):
            def forward(self, x):
                with torch.autocast("cpu", torch.bfloat16):
                    q = self.q(x)
                k, v = self.k(x), self.v(x)
                assert (q.dtype, k.dtype) == (torch.bfloat16, torch.float32)
                return self.out(q.float() * torch.cat([k, v], dim=-1))

        adapted(Mixed())(torch.randn(5, K))

    def test_an_input_that_is_freed_and_whose_memory_is_used_again(self):
        """A cache keyed on addresses fails here."""
        model = adapted()
        attention = attention_of(model)
        for _ in range(50):
            x = torch.randn(5, K)
            expected = [attention.get_submodule(name)(x) for name in QKV]
            model(x)
            del x
            other = torch.randn(5, K)
            fresh = [attention.get_submodule(name)(other) for name in QKV]
            assert not any(torch.equal(a, b) for a, b in zip(expected, fresh))
            torch.testing.assert_close(
                model(other), attention.out(fresh[0] * torch.cat([fresh[1], fresh[2].sin()], -1))
            )

    def test_a_layer_called_twice_computes_twice(self, calls):
        class Twice(Attention):
            def forward(self, x):
                q, k, v = self.q(x), self.k(x), self.v(x)
                again = [getattr(self, name)(x) for name in QKV]
                assert all(torch.equal(a, b) for a, b in zip((q, k, v), again))
                assert all(a.data_ptr() != b.data_ptr() for a, b in zip((q, k, v), again))
                return self.out(q * torch.cat([k, v], dim=-1))

        adapted(Twice())(torch.randn(3, K))
        assert calls == [3, 3]

    def test_nothing_is_kept_after_the_parents_forward(self):
        model, x = adapted(), torch.randn(3, K)
        model(x)
        assert all("group" not in vars(module) for module in model.modules())
        attention_of(model).between = lambda attention, x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(x)
        assert all("group" not in vars(module) for module in model.modules())
        assert row(model)[0] == "group"


class TestStandingDown:
    def test_a_sibling_that_is_not_called(self, calls):
        class Skips(Attention):
            def forward(self, x):
                q, k = self.q(x), self.k(x)
                if self.training:
                    return self.out(q * torch.cat([k, k], dim=-1))
                v = self.v(x)
                return self.out(q * torch.cat([k, v], dim=-1))

        model, x = adapted(Skips()), torch.randn(3, K)
        grads = results(model, x)
        assert calls == [3]
        assert not any(".v." in name for name in grads)  # None, not zeros that weight decay would act on
        assert row(model) == (
            "layers",
            "q, k, v share their input: one of its layers was not called with the others' input",
        )

    @pytest.mark.parametrize(
        ("change", "because"),
        [
            (lambda a: a.k.register_forward_hook(lambda *_: None), "one op, without k"),
            (lambda a: a.k.merge(), "one op, without k"),
            (lambda a: [a.k.merge(), a.v.merge()], "one of them has merged adapters"),
            (lambda a: setattr(a.v, "backend", "torch"), "its layers have different backends"),
            (lambda a: a.v.base_layer.bfloat16(), "its layers multiply in different dtypes"),
            (lambda a: [getattr(a, n).enable_adapters(False) for n in QKV], "no adapters in effect"),
        ],
    )
    def test_reasons(self, change, because, calls):
        model = adapted()
        change(attention_of(model))
        assert row(model) == ("group" if "one op" in because else "layers", f"q, k, v share their input: {because}")
        if "dtypes" not in because:
            model(torch.randn(2, K))
            assert calls == ([2] if "one op" in because else [])

    def test_dora_and_offloaded_layers_are_called(self, calls):
        model = adapted(use_dora=True)
        model(torch.randn(2, K))
        model = adapted()
        for name in ("q", "k"):
            accelerate.hooks.add_hook_to_module(
                attention_of(model).get_submodule(name).base_layer,
                accelerate.hooks.AlignDevicesHook("cpu", offload=True),
            )
        model(torch.randn(2, K))
        assert row(model)[1].startswith("q, k, v share their input: one of them must be called: its base layer")
        assert calls == []

    def test_replicas_of_data_parallel(self, calls):
        model = adapted()
        attention_of(model)._is_replica = True
        model(torch.randn(2, K))
        assert calls == []

    def test_only_adapted_layers_take_part(self, calls):
        model = adapted(target_modules=["q", "v"])
        model(torch.randn(2, K))
        assert calls == [2]
        assert row(model) == ("group", "q, v share their input: one op")
        model.add_adapter("more", LoraConfig(r=2, target_modules=["k"], init_lora_weights=False))
        assert row(model) == ("group", "q, k, v share their input: one op, without k")
        model.base_model.set_adapter(["default", "more"])
        model(torch.randn(2, K))
        assert calls == [2, 3]

    def test_set_lora_groups_refuses_a_model_without_groups(self):
        with pytest.raises(ValueError, match="no LoRA layers that are known to share"):
            set_lora_groups(adapted(target_modules=["out"]), True)

    @pytest.mark.parametrize("end", ["unload", "merge_and_unload", "merge_to_16bit"])
    def test_unloading_leaves_no_hooks(self, end):
        model = adapted()
        plain = getattr(model, end)()
        for module in plain.modules():
            assert not any(module._forward_hooks | module._forward_pre_hooks | module._forward_hooks_always_called)
            assert "lora_siblings" not in vars(module)

    def test_state_dict_has_the_same_keys(self):
        assert adapted().state_dict().keys() == adapted(Attention(print)).state_dict().keys()
        assert not any("group" in key or "siblings" in key for key in adapted().state_dict())
