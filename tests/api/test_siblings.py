"""Layers that share their input as one op: that it is the same function, when it stands down, and that it says so."""

import copy
import pickle

import accelerate
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peft_fast import LoraConfig, get_peft_model, ops, set_lora_groups

from .sibling_models import QKV, Attention, K, Plain, adapted, assert_equal, attention_of, results, row


class TestSameFunction:
    @pytest.mark.parametrize("bits", [16, 8, 4])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_outputs_and_gradients(self, bits, autocast, group_calls):
        model, x = adapted(bits=bits), torch.randn(3, 7, K)
        tolerance = {"rtol": 0.03, "atol": 0.15} if autocast else {"rtol": 1e-5, "atol": 1e-4}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            together = results(model, x)
            assert group_calls == [3]
            set_lora_groups(model, False)
            assert_equal(together, results(model, x), **tolerance)
        assert group_calls == [3]
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
    def test_checkpointing(self, reentrant, group_calls):
        model, x = adapted(lora_dropout=0.2), torch.randn(9, K)
        expected = results(model, x)
        del group_calls[:]
        recomputed = results(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
        assert group_calls == [3, 3]
        assert all(torch.equal(recomputed[name], expected[name]) for name in expected)
        assert row(model)[0] == "group"  # also where a recomputation stops early, by an exception

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode, group_calls):
        model, x = adapted(Plain()).eval(), torch.randn(3, K)
        expected = model(x)
        with mode():
            torch.testing.assert_close(model(x * 1), expected)
        assert group_calls == [3, 3]

    @pytest.mark.filterwarnings("ignore:.*set_peft_model_state_dict:UserWarning")
    @pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_have_groups_of_their_own(self, copy_of, group_calls):
        model, x = adapted(), torch.randn(3, K)
        other = copy_of(model)
        assert torch.equal(other(x), model(x))
        assert group_calls == [3, 3]
        set_lora_groups(other, False)
        assert row(model)[0] == "group"
        other.base_model.unload()
        model(x)
        assert group_calls == [3, 3, 3]

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

    def test_every_call_of_a_loop_over_chunks_is_a_group(self, group_calls):
        class Chunked(Attention):
            def forward(self, x):
                parts = []
                for part in x.chunk(3):
                    q, k, v = self.q(part), self.k(part), self.v(part)
                    parts.append(q * torch.cat([k, v], dim=-1))
                return self.out(torch.cat(parts))

        model, x = adapted(Chunked()), torch.randn(9, K)
        together = results(model, x)
        assert group_calls == [3, 3, 3]
        set_lora_groups(model, False)
        assert_equal(together, results(model, x), rtol=1e-5, atol=1e-4)

    def test_llama_trains_as_layer_by_layer(self, llama, group_calls):
        ids = torch.randint(0, 96, (2, 9))
        model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        together = results(model, torch.zeros(1), lambda x: model(input_ids=ids).logits + x)
        assert group_calls == [3, 3]
        set_lora_groups(model, False)
        separate = results(model, torch.zeros(1), lambda x: model(input_ids=ids).logits + x)
        assert_equal(together, separate, rtol=1e-4, atol=1e-4)


class TestStandingDown:
    def test_a_sibling_that_is_not_called(self, group_calls):
        class Skips(Attention):
            def forward(self, x):
                q, k = self.q(x), self.k(x)
                if self.training:
                    return self.out(q * torch.cat([k, k], dim=-1))
                v = self.v(x)
                return self.out(q * torch.cat([k, v], dim=-1))

        model, x = adapted(Skips()), torch.randn(3, K)
        grads = results(model, x)
        assert group_calls == [3]
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
    def test_reasons(self, change, because, group_calls):
        model = adapted()
        change(attention_of(model))
        assert row(model) == ("group" if "one op" in because else "layers", f"q, k, v share their input: {because}")
        if "dtypes" not in because:
            model(torch.randn(2, K))
            assert group_calls == ([2] if "one op" in because else [])

    def test_dora_and_offloaded_layers_are_called(self, group_calls):
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
        assert group_calls == []

    def test_replicas_of_data_parallel(self, group_calls):
        model = adapted()
        attention_of(model)._is_replica = True
        model(torch.randn(2, K))
        assert group_calls == []

    def test_only_adapted_layers_take_part(self, group_calls):
        model = adapted(target_modules=["q", "v"])
        model(torch.randn(2, K))
        assert group_calls == [2]
        assert row(model) == ("group", "q, v share their input: one op")
        model.add_adapter("more", LoraConfig(r=2, target_modules=["k"], init_lora_weights=False))
        assert row(model) == ("group", "q, k, v share their input: one op, without k")
        model.base_model.set_adapter(["default", "more"])
        model(torch.randn(2, K))
        assert group_calls == [2, 3]

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
