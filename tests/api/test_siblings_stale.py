"""Layers that share their input as one op: what changes between their group_calls does not go unnoticed."""

import copy
import inspect
import sys
import threading

import pytest
import torch
from torch import nn

from peft_fast import set_lora_groups
from peft_fast.tuners.lora.groups import shared_inputs

from .sibling_models import QKV, Attention, K, Plain, adapted, assert_equal, attention_of, results, row


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
    def test_changes_between_siblings(self, between, group_calls):
        model = adapted(Attention(between))
        plain = copy.deepcopy(model)
        set_lora_groups(plain, False)
        x = torch.randn(5, K)
        with torch.no_grad():
            torch.testing.assert_close(model(x.clone()), plain(x.clone()), rtol=1e-5, atol=1e-5)
        assert group_calls == [3]
        assert row(model) == (
            "layers",
            "q, k, v share their input: its layers were called with different inputs, or with changes in between",
        )
        model(x.clone())
        assert group_calls == [3]  # off for good
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

    def test_a_frozen_layer_between_may_read_the_input(self, group_calls):
        """Only q and v adapted, LoRA's most usual targets: k is called in between."""
        model = adapted(Plain(), target_modules=["q", "v"])
        with torch.inference_mode():
            model(torch.randn(5, K))
        assert group_calls == [2]

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
            except Exception as error:  # noqa: BLE001  asserted on below, in the test's own thread
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

    def test_a_layer_called_twice_computes_twice(self, group_calls):
        class Twice(Attention):
            def forward(self, x):
                q, k, v = self.q(x), self.k(x), self.v(x)
                again = [getattr(self, name)(x) for name in QKV]
                assert all(torch.equal(a, b) for a, b in zip((q, k, v), again))
                assert all(a.data_ptr() != b.data_ptr() for a, b in zip((q, k, v), again))
                return self.out(q * torch.cat([k, v], dim=-1))

        adapted(Twice())(torch.randn(3, K))
        assert group_calls == [3, 3]

    def test_nothing_is_kept_after_the_parents_forward(self):
        model, x = adapted(), torch.randn(3, K)
        model(x)
        assert all("group" not in vars(module) for module in model.modules())
        attention_of(model).between = lambda attention, x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(x)
        assert all("group" not in vars(module) for module in model.modules())
        assert row(model)[0] == "group"
