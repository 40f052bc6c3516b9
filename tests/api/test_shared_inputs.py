"""Which layers share their input, by the source of the forward that calls them."""

import inspect

import pytest
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.whisper.modeling_whisper import WhisperAttention

from peft_fast.tuners.lora.groups import shared_inputs


class TestSharedInputs:
    @pytest.mark.parametrize(
        ("attention", "groups"),
        [
            (LlamaAttention, (("q_proj", "k_proj", "v_proj"),)),
            (BertSelfAttention, (("query", "key", "value"),)),
            (WhisperAttention, (("k_proj", "v_proj"),)),  # q reads the decoder's states, k and v the encoder's
            (T5Attention, (("k", "v"),)),
        ],
    )
    def test_of_transformers(self, attention, groups):
        assert shared_inputs(inspect.unwrap(attention.forward)) == groups

    def test_assignments_branches_and_repetitions_part_calls(self):
        class Module:
            def assigned(self, x):
                q = self.q(x)
                x = q + 1
                k, v = self.k(x), self.v(x)
                return q, k, v

            def assigned_in_place(self, x):
                q = self.q(x)
                x += 1
                return q, self.k(x)

            def its_own_result(self, x):
                x = self.q(x)
                x = self.k(x)
                return x * 2

            def branches(self, x, y):
                q = self.q(x)
                if y is None:
                    k, v = self.k(x), self.v(x)
                else:
                    k, v = self.k2(x), self.v2(x)
                return q, k, v

            def repeated(self, x, y):
                q = self.q(x)
                k = self.k(x) if y is None else self.k(y)
                v = self.v(x)
                return q, k, v

            def later(self, x):
                return self.q(x), lambda: self.k(x)

            def more_arguments(self, x):
                return self.q(x, 2), self.k(x, scale=3), self.v(x + 1), self.out(x)

        assert shared_inputs(Module.assigned) == (("k", "v"),)
        assert shared_inputs(Module.assigned_in_place) == ()
        assert shared_inputs(Module.its_own_result) == ()
        assert shared_inputs(Module.branches) == (("k", "v"), ("k2", "v2"))
        assert shared_inputs(Module.repeated) == (("q", "v"),)
        assert shared_inputs(Module.later) == ()
        assert shared_inputs(Module.more_arguments) == ()

    def test_what_has_no_source_has_no_groups(self):
        assert shared_inputs(len) == ()
        assert shared_inputs(eval("lambda self, x: (self.q(x), self.k(x))")) == ()
