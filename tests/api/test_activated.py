"""Activated LoRA (alora_invocation_tokens) beside peft's: which tokens the adapter is there for."""

import copy

import peft
import pytest
import torch
from torch import nn

import peft_fast
from peft_fast import ops
from peft_fast.utils.hotswap import hotswap_adapter

LIBRARIES = (peft, peft_fast)
INVOCATION = [11, 12]
TARGETS = ["q_proj", "v_proj", "up_proj", "gate_proj", "down_proj"]
OPTIONS = {"target_modules": TARGETS, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def adapted(library, base, *more, **options):
    """An activated adapter, and others "b", "c", ... of the configs in `more`."""
    torch.manual_seed(1)
    model = library.get_peft_model(
        base, library.LoraConfig(**{"r": 4, "alora_invocation_tokens": INVOCATION, **OPTIONS, **options})
    )
    for name, config in zip("bcd", more):
        model.add_adapter(name, library.LoraConfig(**{**OPTIONS, **config}))
    return model


@pytest.fixture
def ids():
    """Invoked in the middle, twice, at the end, at once, and never."""
    tokens = torch.randint(13, 96, (5, 12), generator=torch.Generator().manual_seed(3))
    for sample, places in enumerate([(5,), (2, 8), (10,), (0,)]):
        for place in places:
            tokens[sample, place : place + 2] = torch.tensor(INVOCATION)
    tokens[4, 11] = INVOCATION[0]  # and the other is not there
    return tokens


STARTS = [5, 8, 10, 0, 12]


def outputs_and_gradients(model, ids, **inputs):
    out = model(input_ids=ids, labels=ids, **inputs)
    out.loss.backward()
    return out.logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def same(theirs, ours, atol=1e-5):
    torch.testing.assert_close(ours[0], theirs[0], atol=atol, rtol=1e-4)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, atol=atol, rtol=1e-3, msg=name)


CASES = [
    {},
    {"use_rslora": True, "lora_bias": True, "alora_invocation_tokens": [12]},
    {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "o_proj"]},
    {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_training_as_in_peft(options, checkpointed, llama, ids):
    found = []
    for library in LIBRARIES:
        base = llama()
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(outputs_and_gradients(adapted(library, base, **options).train(), ids))
    same(*found)


def test_tokens_before_are_the_base_models(llama, ids):
    base = llama().eval()
    expected = base(input_ids=ids).logits
    model = adapted(peft_fast, base).eval()
    found = model(input_ids=ids).logits
    for sample, start in enumerate(STARTS):
        torch.testing.assert_close(found[sample, :start], expected[sample, :start], atol=1e-6, rtol=1e-5)
        if start < 12:
            assert not torch.allclose(found[sample, start:], expected[sample, start:], atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)
    # The base model's cache serves what comes before the invocation.
    one = ids[:1]
    with model.disable_adapter():
        cache = model(input_ids=one[:, :3], use_cache=True).past_key_values
    rest = model(input_ids=one[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(rest, found[:1, 3:], atol=1e-5, rtol=1e-4)


def test_one_op_a_layer_and_only_the_rows_that_are_invoked(llama, ids, monkeypatch):
    seen = []
    op = ops.lora_linear_multi

    def counted(x, weight, adapters, segments, *args, **kwargs):
        seen.append(segments.lengths)
        return op(x, weight, adapters, segments, *args, **kwargs)

    monkeypatch.setattr(ops, "lora_linear_multi", counted)
    adapted(peft_fast, llama()).eval()(input_ids=ids)
    assert seen == [(sum(12 - start for start in STARTS),)] * (2 * len(TARGETS))


def test_k_bit_base(llama_4bit, ids):
    """As peft's ops do it, layer by layer: bitsandbytes' product on a CPU is another in eval mode."""
    found = [outputs_and_gradients(adapted(library, llama_4bit()).train(), ids) for library in LIBRARIES]
    same(*found, atol=2e-4)


class TestGenerate:
    def test_as_in_peft(self, llama, ids):
        mask = torch.ones_like(ids)
        mask[0, :3] = 0  # padded on the left
        found = [
            adapted(library, llama(eos_token_id=None)).eval().generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False
            )
            for library in LIBRARIES
        ]  # fmt: skip
        assert torch.equal(*found)
        assert found[0].shape == (5, 18)

    def test_without_a_cache(self, llama, ids):
        """Each step computes all tokens again: in peft the adapter then loses its first tokens, one a step."""
        model = adapted(peft_fast, llama(eos_token_id=None)).eval()
        options = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))

    def test_beams(self, llama, ids):
        """In peft an error. Each sample as alone, and both ways of giving the ids."""
        model = adapted(peft_fast, llama(eos_token_id=None)).eval()
        options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
        together = model.generate(ids, **options)
        for sample in range(5):
            assert torch.equal(model.generate(inputs=ids[sample : sample + 1], **options)[0], together[sample])
        assert not torch.equal(together, model.generate(ids, alora_offsets=[None] * 5, **options))

    def test_offsets_of_ones_own(self, llama, ids):
        offsets = [12 - start or None for start in STARTS]
        model = adapted(peft_fast, llama(eos_token_id=None)).eval()
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), model.generate(ids, alora_offsets=offsets, **options))
        embeddings = model.get_input_embeddings()(ids)
        by_offset = model(inputs_embeds=embeddings, alora_offsets=torch.tensor([12 - start for start in STARTS]))
        torch.testing.assert_close(by_offset.logits, model(input_ids=ids).logits)


class TestMixedBatches:
    NAMES = ("default", "b", "__base__", "c", "default")
    MORE = ({"r": 2}, {"r": 3, "alora_invocation_tokens": [11], "target_modules": ["v_proj", "o_proj"]})

    def test_as_in_peft(self, llama, ids):
        models = [adapted(library, llama(eos_token_id=None), *self.MORE).eval() for library in LIBRARIES]
        outputs = [model(input_ids=ids, adapter_names=list(self.NAMES)).logits for model in models]
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)
        offsets = [3, None, None, 5, 20]
        outputs = [m(input_ids=ids, adapter_names=list(self.NAMES), alora_offsets=offsets).logits for m in models]
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)
        steps = [
            m.generate(input_ids=ids, adapter_names=list(self.NAMES), max_new_tokens=4, do_sample=False) for m in models
        ]
        assert torch.equal(*steps)
        ours = models[1]
        beams = ours.generate(ids, adapter_names=list(self.NAMES), max_new_tokens=4, num_beams=2, do_sample=False)
        for sample, name in enumerate(self.NAMES):
            alone = ours.generate(
                ids[sample : sample + 1], adapter_names=[name], max_new_tokens=4, num_beams=2, do_sample=False
            )
            assert torch.equal(alone[0], beams[sample])

    def test_other_layers_and_whole_modules(self, llama, ids):
        more = ({"r": 2, "target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},)
        names = ["default", "b", "__base__", "b", "default"]
        outputs = []
        for library in LIBRARIES:
            model = adapted(library, llama(), *more, modules_to_save=["lm_head"]).eval()
            for name, copied in model.lm_head.modules_to_save.items():
                nn.init.normal_(copied.weight, generator=torch.Generator().manual_seed(len(name)))
            outputs.append(model(input_ids=ids, adapter_names=names).logits)
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)

    def test_trained_together_as_alone(self, llama, ids):
        """peft has no mixed batches in training. With dropout: it is of each adapter's own."""
        model = adapted(peft_fast, llama(), *self.MORE, lora_dropout=0.3).train()

        def gradients(names, rows):
            model.enable_mixed_batch_training(seeds={"default": 1, "b": 2, "c": 3})
            model.zero_grad()
            logits = model(input_ids=ids[rows], adapter_names=names).logits
            logits.square().sum().backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        together = gradients(list(self.NAMES), range(5))
        for adapter in ("default", "b", "c"):
            rows = [i for i, name in enumerate(self.NAMES) if name == adapter]
            for name, gradient in gradients([adapter] * len(rows), rows).items():
                if f".{adapter}." in name:
                    torch.testing.assert_close(together[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_beside_another_active_adapter(llama, ids):
    outputs = []
    for library in LIBRARIES:
        model = adapted(library, llama(), {"r": 2}).eval()
        model.base_model.set_adapter(["b", "default"])
        outputs.append(outputs_and_gradients(model, ids))
    same(*outputs)
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    called = model(input_ids=ids).logits  # that layer's modules are called
    torch.testing.assert_close(called, outputs[1][0], atol=1e-5, rtol=1e-4)


def test_no_ids_no_adapter_and_gradients_of_zero(llama, ids):
    for library in LIBRARIES:
        model = adapted(library, llama()).train()
        embeddings = model.get_input_embeddings()(ids).detach()
        with pytest.warns(UserWarning, match="input_ids|inputs_embeds"):
            logits = model(inputs_embeds=embeddings).logits
        logits.sum().backward()
        with model.disable_adapter():
            torch.testing.assert_close(logits, model(input_ids=ids).logits, atol=1e-6, rtol=1e-5)
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer(embeddings), layer.base_layer(embeddings))  # which knows of no tokens


def test_files(llama, ids, tmp_path):
    for library in LIBRARIES:
        model = adapted(library, llama()).eval()
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / library.__name__)
        for other in LIBRARIES:
            loaded = other.PeftModel.from_pretrained(llama(), tmp_path / library.__name__)
            assert loaded.peft_config["default"].alora_invocation_tokens == INVOCATION
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-5)


def test_explained(llama):
    rows = peft_fast.explain(adapted(peft_fast, llama()))
    assert "is there from its invocation on" in str(rows)


def test_an_adapter_of_the_same_name_without_an_invocation(llama, ids):
    model = adapted(peft_fast, llama(), {"r": 2}).eval()
    model.delete_adapter("default")
    model.add_adapter("default", peft_fast.LoraConfig(**OPTIONS))
    model.set_adapter("default")
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-3)


class TestRefused:
    @pytest.mark.parametrize("name", ["merge_adapter", "merge_and_unload", "merge_to_16bit"])
    def test_merging(self, name, llama, untouched):
        model = adapted(peft_fast, llama())
        with untouched(model), pytest.raises(NotImplementedError, match="cannot be merged"):
            getattr(model, name)()

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"target_modules": ["embed_tokens"]}, "for linear layers, and this is LoRA around a Embedding"),
            ({"use_dora": True}, "not supported with use_dora"),
            ({"alora_invocation_tokens": [1.5]}, "a list of token ids"),
            ({"alora_invocation_tokens": 3}, "a list of token ids"),
        ],
        ids=str,
    )
    def test_configs(self, options, match, llama, untouched):
        base = llama()
        with untouched(base), pytest.raises((ValueError, TypeError), match=match):
            adapted(peft_fast, base, **options)

    def test_offsets(self, llama, ids):
        model = adapted(peft_fast, llama(), {"r": 2}).eval()
        wrong = [
            ([1] * 4, "one entry a sample: got 4 for 5"),
            ([-1] * 5, "got -1"),
            (["x"] * 5, "got 'x'"),
            (3, "list"),
        ]
        for offsets, match in wrong:
            with pytest.raises((ValueError, TypeError), match=match):
                model(input_ids=ids, alora_offsets=offsets)
        with pytest.raises(ValueError, match="name none with alora_invocation_tokens"):
            model(input_ids=ids, adapter_names=["b"] * 5, alora_offsets=[1] * 5)
        model.set_adapter("b")
        with pytest.raises(ValueError, match="none such is active"):
            model(input_ids=ids, alora_offsets=[1] * 5)

    def test_two_at_a_time(self, llama, ids):
        model = adapted(peft_fast, llama(), {"r": 2, "alora_invocation_tokens": [13]})
        model.base_model.set_adapter(["default", "b"])
        with pytest.raises(ValueError, match="one can be active at a time"):
            model(input_ids=ids)
        with pytest.raises(ValueError, match="the same alora_invocation_tokens"):
            model.add_weighted_adapter(["default", "b"], [1, 1], "sum")

    def test_where_adapters_are_there_for_all_tokens(self, llama, tmp_path):
        model = adapted(peft_fast, llama(), {"r": 4})
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="alora_invocation_tokens"):
            hotswap_adapter(model, tmp_path, "b")
        with pytest.raises(ValueError, match="a mixed model looks for no invocations"):
            peft_fast.get_peft_model(llama(), model.peft_config["default"], mixed=True)
        with pytest.raises(ValueError, match="alora_invocation_tokens"):
            peft_fast.AdapterStore(llama()).load("one", tmp_path)
        with pytest.raises(ValueError, match="alora_invocation_tokens"):
            peft_fast.Job("one", model.peft_config["default"], [], tmp_path)
        with pytest.raises(ValueError, match="alora_invocation_tokens"):
            model.save_pretrained(tmp_path, selected_adapters=["default"], vllm_compatible=True)
