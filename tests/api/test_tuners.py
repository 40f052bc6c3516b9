"""Every method that adapts layers, beside peft's from the same seed: layers, training, merging, files, life.

A method is a row of tuner_cases.py; what is particular to one is in a file of its own.
"""

import json
import sys
import warnings
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import peft_fast

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tuner_cases import BY_NAME, METHODS, adapted, config, image, kinds, shaken

LIBRARIES = (peft_fast, peft)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to"),
]
every = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
VARIANTS = [
    pytest.param(method, options, id=f"{method.name}-{n}")
    for method in METHODS
    for n, options in enumerate(method.variants)
]


def gradients(model):
    """But for AdaLoRA's ranknum, which peft trains by oversight where it casts it from 16 bits."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: gradient for name, gradient in found.items() if "ranknum" not in name}


def assert_alike(ours, theirs, tolerance):
    """Tensors by name, each to a share of its norm."""
    assert ours.keys() == theirs.keys() != set()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= tolerance * value.norm() + 1e-7, name


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_every_layer(method, options):
    """From the same seed: the same names, weights, flags and position of torch's generator; outputs and gradients."""
    results = []
    for library in LIBRARIES:
        torch.manual_seed(2)
        model = library.get_peft_model(
            kinds(), config(library, method, **{"target_modules": list(method.kinds), **options})
        )
        start = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
        start["after"] = torch.rand(1)
        y = shaken(model, method.prefix)(image())
        y.square().sum().backward()
        results.append((start, y, gradients(model)))
    (start, y, own), (their_start, their_y, theirs) = results
    assert list(start) == list(their_start)
    torch.testing.assert_close(start, their_start, rtol=0, atol=0)
    torch.testing.assert_close(y, their_y, rtol=1e-4, atol=1e-4)
    assert_alike(own, theirs, 1e-4)


@every
@pytest.mark.parametrize("how", ["fp32", "autocast", "bf16", "checkpointing"])
def test_a_model(method, how, llama, tokens):
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    results = []
    for library in LIBRARIES:
        model = adapted(library, llama(dtype), method, task_type="CAUSAL_LM", **method.llama).train()
        if how == "checkpointing":
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        kinds_of = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n}
        results.append((loss, kinds_of, gradients(model)))
    (loss, dtypes, own), (their_loss, their_dtypes, theirs) = results
    precise = how in ("fp32", "checkpointing")
    torch.testing.assert_close(loss, their_loss, rtol=1e-5 if precise else 5e-3, atol=0)
    assert dtypes == their_dtypes
    assert_alike(own, theirs, 1e-4 if precise else 0.08)


@pytest.mark.parametrize("method", [m for m in METHODS if m.gpt2], ids=lambda method: method.name)
def test_gpt2(method, load, tokens, tmp_path):
    """transformers' Conv1D, which keeps its weight transposed."""
    results = []
    for library in LIBRARIES:
        model = adapted(library, load("gpt2", None), method, task_type="CAUSAL_LM", **method.gpt2)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        results.append((loss, gradients(model), model.peft_config["default"].fan_in_fan_out))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    assert_alike(results[0][1], results[1][1], 1e-4)
    assert results[0][2] is results[1][2] is True
    model = adapted(peft_fast, load("gpt2", None), method, **method.gpt2).eval()
    expected = model(tokens).logits
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, expected, rtol=1e-4, atol=1e-4)


class TestMerging:
    @pytest.mark.parametrize(("method", "options"), VARIANTS)
    def test_merged_is_unmerged(self, method, options):
        x, base = image(), kinds()
        modules, plain = dict(base.named_modules()), base(x)
        model = adapted(peft_fast, base, method, **{"target_modules": list(method.kinds), **options}).eval()
        expected = model(x)
        assert not torch.allclose(expected, plain, atol=1e-3)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.unmerge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload()
        assert dict(merged.named_modules()) == modules
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)

    @every
    def test_unload(self, method):
        base = kinds()
        modules = dict(base.named_modules())
        values = {name: p.detach().clone() for name, p in base.named_parameters()}
        model = adapted(peft_fast, base, method, target_modules=list(method.kinds))
        assert dict(model.named_modules()) != modules
        assert dict(model.unload().named_modules()) == modules
        torch.testing.assert_close(dict(base.named_parameters()), values, rtol=0, atol=0)

    @every
    def test_a_broken_one(self, method, untouched):
        model = adapted(peft_fast, kinds(), method, target_modules=list(method.kinds))
        last = [p for name, p in model.named_parameters() if method.prefix in name and p.requires_grad][-1]
        last.data.fill_(float("nan"))
        with untouched(model), pytest.raises(ValueError, match="inf or NaN"):
            model.merge_adapter(safe_merge=True)

    @every
    def test_into_16_bits(self, method, llama, tokens):
        model = adapted(peft_fast, llama(), method, **method.llama).eval()
        expected = model(tokens).logits
        plain = model.base_model.merge_to_16bit(progressbar=False)
        assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
        assert not any(method.prefix in name for name, _ in plain.named_parameters())
        torch.testing.assert_close(plain(tokens).logits.float(), expected, rtol=0.1, atol=0.1)


@every
def test_files_both_ways(method, tmp_path):
    x = image()
    options = {"target_modules": list(method.kinds), **method.variants[-1]}
    models = {library: adapted(library, kinds(), method, **options).eval() for library in LIBRARIES}
    for library, model in models.items():
        model.save_pretrained(tmp_path / library.__name__)
    files = [load_file(tmp_path / library.__name__ / "adapter_model.safetensors") for library in LIBRARIES]
    torch.testing.assert_close(*files, rtol=0, atol=0)
    configs = [json.loads((tmp_path / library.__name__ / "adapter_config.json").read_text()) for library in LIBRARIES]
    for name in ("target_modules", "feedforward_modules"):
        for one in configs:
            if isinstance(one.get(name), list):
                one[name] = sorted(one[name])
    assert {**configs[0], "peft_version": None, "auto_mapping": None} == {
        **configs[1], "peft_version": None, "auto_mapping": None,
    }  # fmt: skip
    expected = models[peft](x)
    for saved in LIBRARIES:
        for loading in LIBRARIES:
            for low in (False, True):
                model = loading.PeftModel.from_pretrained(kinds(), tmp_path / saved.__name__, low_cpu_mem_usage=low)
                torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-4)
                assert loading is peft or not any(p.requires_grad for p in model.parameters())


@every
def test_several_adapters(method, llama, tokens):
    results = []
    sets = [["default"], ["other"], ["default", "other"]] if method.together else [["default"], ["other"]]
    for library in LIBRARIES:
        model = adapted(library, llama(), method, task_type="CAUSAL_LM", **method.llama)
        torch.manual_seed(5)
        model.add_adapter("other", config(library, method, **{**method.llama, **method.other}))
        shaken(model, method.prefix, "other").eval()
        outputs = []
        for names in sets:
            model.base_model.set_adapter(names)
            outputs.append(model(tokens).logits)
        outputs.append({name: torch.tensor(p.requires_grad) for name, p in model.named_parameters()})
        rows = [vars(row) for row in model.get_layer_status()]
        status = vars(model.get_model_status())
        model.base_model.set_adapter(sets[0])
        model.delete_adapter("other")
        outputs.append(model(tokens).logits)
        results.append((outputs, rows, status))
    assert results[0][1] == results[1][1]
    assert results[0][2] == results[1][2]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)


def eight_bit(model):
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            layer = bitsandbytes.nn.Linear8bitLt(
                linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
            )
            layer.load_state_dict(linear.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
    model.is_loaded_in_8bit = model.is_quantized = True
    return model


@every
@pytest.mark.parametrize("bits", [4, 8])
class TestFewBits:
    def base(self, bits, llama, llama_4bit):
        return llama_4bit() if bits == 4 else eight_bit(llama())

    def test_training(self, method, bits, llama, llama_4bit, tokens):
        """As in peft where it has the method on such layers; elsewhere peft fails or forgets the base layer."""
        results = []
        for library in LIBRARIES if method.kbit else [peft_fast]:
            model = adapted(library, self.base(bits, llama, llama_4bit), method, task_type="CAUSAL_LM", **method.llama)
            loss = model.train()(tokens, labels=tokens).loss
            loss.backward()
            results.append((loss, gradients(model)))
        own = results[0][1]
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert own.keys() == trained != set()
        assert all(gradient.isfinite().all() and gradient.any() for gradient in own.values())
        if method.kbit:
            # peft multiplies by an 8-bit weight with its input rounded to 8 bits, too, in some modes
            torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4 if bits == 4 else 2e-2, atol=0)
            assert_alike(own, results[1][1], 1e-3 if bits == 4 else 0.1)

    def test_merging(self, method, bits, llama, llama_4bit, tokens):
        """The sum is rounded to the format once; taken out again, the bytes are what they were."""
        if not method.linear:
            pytest.skip("no k-bit layer is adapted")
        base = self.base(bits, llama, llama_4bit)
        model = adapted(peft_fast, base, method, **method.llama).eval()
        expected = model(tokens).logits
        with model.disable_adapter():
            plain = model(tokens).logits
        with pytest.warns(UserWarning, match="k-bit weight"):
            model.merge_adapter()
        merged = model(tokens).logits
        assert (merged - expected).norm() < 0.75 * (plain - expected).norm()
        model.unmerge_adapter()
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)
        exact = model.base_model.merge_to_16bit(progressbar=False)
        assert not any(type(module).__module__.startswith("bitsandbytes") for module in exact.modules())
        torch.testing.assert_close(exact(tokens).logits.float(), expected, rtol=0.1, atol=0.15)


@every
def test_config_is_pefts(method, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (config(library, method, target_modules=["a", "b"]) for library in LIBRARIES)
        assert ours.to_dict() == theirs.to_dict()
        ours.save_pretrained(tmp_path)
        assert peft.PeftConfig.from_pretrained(tmp_path) == theirs
        assert peft_fast.PeftConfig.from_pretrained(tmp_path) == ours


@pytest.mark.parametrize("method", [m for m in METHODS if m.default_targets], ids=lambda method: method.name)
def test_what_is_adapted_unasked(method, llama):
    names = []
    for library in LIBRARIES:
        options = {key: None for key in ("feedforward_modules",) if key in method.options}
        model = library.get_peft_model(llama(), config(library, method, **options))
        names.append([name for name, _ in model.named_parameters()])
        assert sorted(model.peft_config["default"].target_modules)
    assert names[0] == names[1]


@every
def test_explain(method, llama):
    model = adapted(peft_fast, llama(), method, **method.llama)
    rows = {row.name: row for row in peft_fast.explain(model, show=False).rows if row.base}
    assert len(rows) == len(model.get_layer_status())
    assert all(row.route not in ("base", "refused") and row.because for row in rows.values())
    with model.disable_adapter():
        off = [row for row in peft_fast.explain(model, show=False).rows if row.base]
    assert {row.route for row in off} == {"base"}
    assert all("switched off" in row.because for row in off)


TASKS = {
    "SEQ_CLS": ("BertForSequenceClassification", "bert"),
    "SEQ_2_SEQ_LM": ("T5ForConditionalGeneration", "t5"),
}
SIZES = {
    "bert": {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "t5": {
        "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0,
        "decoder_start_token_id": 0, "pad_token_id": 0,
    },
}  # fmt: skip


@every
@pytest.mark.parametrize("task", TASKS)
def test_tasks(method, task, inputs, tmp_path):
    """A classifier, whose head is trained too, and an encoder-decoder; their files both ways."""
    name, kind = TASKS[task]
    cls = getattr(transformers, name)

    def base():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return cls(cls.config_class(**SIZES[kind])).eval()

    results, given = {}, {"input_ids": inputs(task)["input_ids"]}
    if task == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = inputs(task)["labels"]
    for library in LIBRARIES:
        model = adapted(library, base(), method, task_type=task, **getattr(method, kind))
        loss = model(**inputs(task)).loss
        loss.backward()
        results[library] = loss, gradients(model), model(**given).logits
        model.save_pretrained(tmp_path / library.__name__)
    torch.testing.assert_close(results[peft_fast][0], results[peft][0], rtol=1e-5, atol=0)
    assert_alike(results[peft_fast][1], results[peft][1], 1e-3)
    if task == "SEQ_CLS" and method.name != "TrainableTokens":  # which has no modules_to_save
        assert any("modules_to_save" in key for key in results[peft_fast][1])
    files = [load_file(tmp_path / library.__name__ / "adapter_model.safetensors") for library in LIBRARIES]
    torch.testing.assert_close(*files, rtol=0, atol=0)
    generated = []
    for saved, loading in (LIBRARIES, reversed(LIBRARIES)):
        loaded = loading.PeftModel.from_pretrained(base(), tmp_path / saved.__name__)
        torch.testing.assert_close(loaded(**given).logits, results[peft_fast][2], rtol=1e-4, atol=1e-5)
        if task == "SEQ_2_SEQ_LM":
            generated.append(loaded.generate(**inputs(task), max_new_tokens=4, num_beams=2, do_sample=False))
    if generated:
        assert torch.equal(*generated)


def test_no_method_is_left_out():
    """A method that puts layers into models has a row; LoRA has files of its own."""
    rows = {f"{name}Config" for name in BY_NAME} | {"LoraConfig"}
    built = {made[0].__name__ for kind, made in peft_fast.tuners.METHODS.items() if kind not in ELSEWHERE}
    assert rows == built


ELSEWHERE = ("OFT", "BOFT", "HRA", "RANDLORA", "FOURIERFT", "ADAPTION_PROMPT")  # test_tuner_types_b.py, ...
