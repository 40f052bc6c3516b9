"""Hot-swapping: other weights for an adapter in use, in place, also in a model that is compiled."""

import math

import peft
import peft.utils.hotswap
import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file, save_file
from torch import nn

import peft_fast
from peft_fast.helpers import DoraCaching
from peft_fast.tuners.lora import LoraLayer
from peft_fast.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def adapter(llama, trained, tmp_path):
    """Writes an adapter of these options, of weights of its own; returns its folder."""

    def write(seed: int, library=peft_fast, build=llama, **options):
        folder = tmp_path / f"adapter{seed}"
        config = library.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
        trained(library.get_peft_model(build(), config), seed=seed).save_pretrained(folder)
        return folder

    return write


def fresh(base, folder):
    return peft_fast.PeftModel.from_pretrained(base, folder)


def outputs(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("llama", {}),
        pytest.param("llama_4bit", {}, marks=pytest.mark.slow),
        pytest.param("llama", {"use_dora": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_twenty_adapters_compile_once(base, options, request, adapter, tokens):
    def build():
        return request.getfixturevalue(base)(num_hidden_layers=1)

    ranks = [1 + (7 * i) % 12 for i in range(20)]
    folders = [
        adapter(i, build=build, r=rank, lora_alpha=3 + i, **options) for i, rank in enumerate(ranks)
    ]  # fmt: skip
    model = fresh(build(), folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=12)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    first = outputs(compiled, tokens)
    frames = counter.frame_count
    assert frames >= 1
    for folder in folders[1:]:
        hotswap_adapter(compiled, folder, "default")
        found = outputs(compiled, tokens)
        torch.testing.assert_close(found, outputs(fresh(build(), folder), tokens), atol=2e-6, rtol=1e-4)
        assert not torch.allclose(found, first, atol=1e-3)
    assert counter.frame_count == frames


@pytest.mark.slow
def test_without_preparing_other_scales_compile_again(adapter, tokens, llama):
    """What the preparation is for: the test above can fail."""
    folders = [adapter(i, r=4 + i) for i in range(3)]
    model = fresh(llama(), folders[0])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    outputs(compiled, tokens)
    frames = counter.frame_count
    with pytest.warns(UserWarning, match="become larger, and the model will be compiled again"):
        hotswap_adapter(compiled, folders[1], "default")
    torch.testing.assert_close(outputs(compiled, tokens), outputs(fresh(llama(), folders[1]), tokens))
    assert counter.frame_count > frames


@pytest.mark.parametrize("ranks", [(4, 4), (8, 3), (3, 8)])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("writer", [peft, peft_fast])
def test_swapped_is_loaded(ranks, prepared, writer, adapter, llama, tokens, tmp_path):
    """Outputs, further scaling, and what is saved then; in bf16 for one of the cases."""
    one, other = (adapter(i, writer, r=rank, lora_alpha=5) for i, rank in enumerate(ranks))
    model, expected = fresh(llama(), one), fresh(llama(), other)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    kept = [p for name, p in model.named_parameters() if "lora_" in name]
    hotswap_adapter(model, other, "default")
    assert all(a is b for a, b in zip(kept, [p for name, p in model.named_parameters() if "lora_" in name]))
    torch.testing.assert_close(outputs(model, tokens), outputs(expected, tokens), atol=2e-6, rtol=1e-4)
    for either in (model, expected):
        for _, layer in either.base_model.layers():
            layer.set_scale("default", 0.5)
    torch.testing.assert_close(outputs(model, tokens), outputs(expected, tokens), atol=2e-6, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    for library in (peft, peft_fast):
        again = library.PeftModel.from_pretrained(llama(), tmp_path / "saved")
        torch.testing.assert_close(
            outputs(again, tokens), outputs(fresh(llama(), other), tokens), atol=2e-6, rtol=1e-4
        )  # fmt: skip
    if not prepared or ranks[0] == 8:
        assert load_file(tmp_path / "saved" / "adapter_model.safetensors").keys() == load_file(
            other / "adapter_model.safetensors"
        ).keys()  # fmt: skip


def test_preparing_changes_no_output_and_no_gradient(llama, trained, tokens):
    results = []
    for target in (None, 16):
        torch.manual_seed(0)
        model = trained(peft_fast.get_peft_model(llama(), peft_fast.LoraConfig(r=3, target_modules="all-linear")))
        if target:
            prepare_model_for_compiled_hotswap(model, target_rank=target)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss, grads))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        padded = results[1][1][name]
        part = padded[:3] if "lora_A" in name else padded[:, :3]
        torch.testing.assert_close(part, grad, atol=1e-6, rtol=1e-4)
        assert padded.count_nonzero() == part.count_nonzero()


@pytest.mark.parametrize("prepared", [False, True])
def test_as_in_peft(prepared, adapter, llama, tokens):
    """The names and shapes of what is in the model, its scales, and its outputs."""
    one, other = adapter(0, r=4, lora_alpha=6), adapter(1, r=2, lora_alpha=7)
    models = []
    for library in (peft, peft_fast):
        hotswap = peft.utils.hotswap if library is peft else peft_fast.utils.hotswap
        model = library.PeftModel.from_pretrained(llama(), one)
        if prepared:
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
            assert model.peft_config["default"].r == 6
        hotswap.hotswap_adapter(model, str(other), "default")
        models.append(model)
    theirs, ours = (dict(model.named_parameters()) for model in models)
    assert {name: value.shape for name, value in theirs.items()} == {n: value.shape for n, value in ours.items()}
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    for name, layer in models[1].named_modules():
        if isinstance(layer, LoraLayer):
            scale = models[0].get_submodule(name).scaling["default"]
            assert isinstance(layer.scaling["default"], type(scale))
            assert math.isclose(layer.scaling["default"], scale, rel_tol=1e-6)
    torch.testing.assert_close(*(outputs(model, tokens) for model in models), atol=2e-6, rtol=1e-4)


def test_patterns_of_ranks(adapter, llama, tokens):
    """peft looks for them with the wrong name, and takes the scale of the other layers."""
    one = adapter(0, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    other = adapter(1, rank_pattern={"layers.1.self_attn.q_proj": 7}, alpha_pattern={"v_proj": 3})
    model = fresh(llama(), one)
    prepare_model_for_compiled_hotswap(model, target_rank=7)
    hotswap_adapter(model, other, "default")
    torch.testing.assert_close(
        outputs(model, tokens), outputs(fresh(llama(), other), tokens), atol=2e-6, rtol=1e-4
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_layers_that_the_new_adapter_lacks_do_nothing(options, adapter, llama, tokens):
    one, other = adapter(0, **options), adapter(1, target_modules=["q_proj"], **options)
    model = fresh(llama(), one)
    hotswap_adapter(model, other, "default")
    expected = outputs(fresh(llama(), other), tokens)
    torch.testing.assert_close(outputs(model, tokens), expected, atol=2e-6, rtol=1e-4)
    hotswap_adapter(model, one, "default")
    torch.testing.assert_close(outputs(model, tokens), outputs(fresh(llama(), one), tokens), atol=2e-6, rtol=1e-4)


def test_kept_norms_are_those_of_the_new_weights(adapter, llama, tokens):
    one, other = (adapter(i, use_dora=True, lora_alpha=8 * (i + 1)) for i in range(2))
    model = fresh(llama(), one)
    prepare_model_for_compiled_hotswap(model)
    with DoraCaching():
        outputs(model, tokens)
        hotswap_adapter(model, other, "default")
        found = outputs(model, tokens)
        for _, layer in model.base_model.layers():
            layer.set_scale("default", 0.1)
        smaller = outputs(model, tokens)
    torch.testing.assert_close(found, outputs(fresh(llama(), other), tokens), atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(smaller, outputs(model, tokens), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(8, 8, 3),
        lambda: nn.Conv2d(8, 8, 3, groups=2),
        lambda: nn.Conv1d(8, 8, 3),
        lambda: nn.Embedding(20, 8),
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ],
    ids=["conv2d", "grouped", "conv1d", "embedding", "attention"],
)
@pytest.mark.parametrize("prepared", [False, True])
def test_other_layers(make, prepared, tmp_path, trained):
    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"layer": make()})

    kind = type(base()["layer"])
    x = torch.randint(0, 20, (3, 4)) if kind is nn.Embedding else torch.randn(2, 8, 8, 8)
    x = x[0] if kind in (nn.Conv1d, nn.MultiheadAttention) else x
    arguments = (x, x, x) if kind is nn.MultiheadAttention else (x,)
    for i, rank in enumerate((4, 2)):
        config = peft_fast.LoraConfig(r=rank, lora_alpha=5, target_modules=["layer"])
        trained(peft_fast.get_peft_model(base(), config), seed=i).save_pretrained(tmp_path / str(i))
    model, expected = (peft_fast.PeftModel.from_pretrained(base(), tmp_path / str(i)) for i in range(2))
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    hotswap_adapter(model, tmp_path / "1", "default")
    results = [either.base_model.model["layer"](*arguments) for either in (model, expected)]
    results = [result[0] if isinstance(result, tuple) else result for result in results]
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = peft_fast.PeftModel.from_pretrained(base(), tmp_path / "saved").base_model.model["layer"](*arguments)
    torch.testing.assert_close(again[0] if isinstance(again, tuple) else again, results[1], atol=1e-6, rtol=1e-5)


def test_injected_adapters(llama, trained, tokens):
    """As diffusers calls it: names in the model, no PeftModel."""
    config = peft_fast.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    model = trained(peft_fast.inject_adapter_in_model(config, llama()), seed=0)
    new = peft_fast.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS)
    expected = trained(peft_fast.inject_adapter_in_model(new, llama()), seed=1)
    tensors = {name: value.detach() for name, value in expected.named_parameters() if "lora_" in name}
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    hotswap_adapter_from_state_dict(model, tensors, "default", new)
    torch.testing.assert_close(outputs(model, tokens), outputs(expected, tokens), atol=2e-6, rtol=1e-4)


class TestErrors:
    @pytest.fixture
    def model(self, adapter, llama):
        return fresh(llama(), adapter(0, target_modules=["q_proj", "v_proj"]))

    def test_new_layers(self, model, adapter, untouched):
        with untouched(model), pytest.raises(RuntimeError, match=r"unexpected keys found, .*down_proj.* in all"):
            hotswap_adapter(model, adapter(1), "default")

    def test_other_options(self, model, adapter, untouched):
        for key, value in (("use_rslora", True), ("lora_dropout", 0.5), ("alpha_pattern", {"q_proj": 2}),
                           ("use_dora", True)):  # fmt: skip
            with untouched(model), pytest.raises(ValueError, match=f"must have the same {key}, got .* and {value}"):
                hotswap_adapter(model, adapter(1, target_modules=["q_proj"], **{key: value}), "default")

    def test_another_model(self, model, adapter, untouched, llama):
        folder = adapter(1, build=lambda: llama(hidden_size=32), target_modules=["q_proj"])
        with untouched(model), pytest.raises(ValueError, match=r"is \(4, 64\) in the model, got \(4, 32\)"):
            hotswap_adapter(model, folder, "default")

    def test_half_a_layer_and_other_tensors(self, model, adapter, untouched):
        folder = adapter(1, target_modules=["q_proj", "v_proj"])
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        key = next(key for key in tensors if "lora_B" in key)
        save_file({name: value for name, value in tensors.items() if name != key}, path)
        with untouched(model), pytest.raises(ValueError, match="only some weights of a layer"):
            hotswap_adapter(model, folder, "default")
        save_file({**tensors, key: tensors[key].int()}, path)
        with untouched(model), pytest.raises(ValueError, match="is it another model's"):
            hotswap_adapter(model, folder, "default")

    def test_no_such_adapter(self, model, adapter, untouched, tmp_path):
        with untouched(model):
            with pytest.raises(ValueError, match="'other' does not exist"):
                hotswap_adapter(model, adapter(1), "other")
            with pytest.raises(ValueError, match="'other' does not exist"):
                hotswap_adapter_from_state_dict(model, {}, "other", model.peft_config["default"])
            with pytest.raises(ValueError, match="Can't find"):
                hotswap_adapter(model, tmp_path, "default")

    def test_a_merged_one(self, model, adapter, untouched):
        model.merge_adapter()
        with untouched(model), pytest.raises(ValueError, match="is merged into .* call unmerge_adapter first"):
            hotswap_adapter(model, adapter(1, target_modules=["q_proj"]), "default")

    def test_preparing(self, model, untouched, llama):
        with untouched(model):
            with pytest.raises(ValueError, match="'default' has 4, got 3"):
                prepare_model_for_compiled_hotswap(model, target_rank=3)
            with pytest.raises(TypeError, match="must be a number of ranks, got '8'"):
                prepare_model_for_compiled_hotswap(model, target_rank="8")
            with pytest.raises(ValueError, match="must be 'error', 'warn' or 'ignore', got 'no'"):
                prepare_model_for_compiled_hotswap(model, check_compiled="no")
            compiled = torch.compile(model)
            with pytest.raises(ValueError, match="is to be called before the model is compiled"):
                prepare_model_for_compiled_hotswap(compiled)
        with pytest.raises(ValueError, match="has no LoRA layers: load the first adapter"):
            prepare_model_for_compiled_hotswap(llama())
        with pytest.warns(UserWarning, match="it will be compiled again"):
            prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
        prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")

    def test_a_grouped_convolution(self, untouched):
        base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
        model = peft_fast.get_peft_model(base, peft_fast.LoraConfig(r=4, target_modules=["0"]))
        with untouched(model), pytest.raises(ValueError, match="divisible by the 2 groups .* got 5"):
            prepare_model_for_compiled_hotswap(model, target_rank=5)

    def test_configs_of_other_methods(self):
        config = peft_fast.LoraConfig()
        other = peft_fast.PeftConfig()
        with pytest.raises(ValueError, match="only LoRA adapters can be hot-swapped, got None"):
            check_hotswap_configs_compatible(config, other)


@pytest.mark.parametrize(
    ("options", "alpha"),
    [({}, 16), ({"use_rslora": True}, 8 * 2**0.5), ({"rank_pattern": {"q_proj": 2}}, 8)],
    ids=str,
)
def test_configs_are_given_the_rank(options, alpha, adapter, llama):
    model = fresh(llama(), adapter(0, **options))
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config["default"])
    config = model.peft_config["default"]
    assert (config.r, set(config.rank_pattern.values())) == (8, {8} if "rank_pattern" in options else set())
    assert math.isclose(config.lora_alpha, alpha)
