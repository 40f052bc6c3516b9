"""save_pretrained(path_initial_model_for_weight_conversion=...): PiSSA and its like as plain LoRA of twice the rank."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_fast

LIBRARIES = (peft, peft_fast)
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def trained_from(llama, trained, tokens, tmp_path):
    """An adapter after some steps of training; what it was before lies in `initial`."""

    def train(library=peft_fast, base=None, **options):
        torch.manual_seed(4)
        options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "pissa", **options}
        model = library.get_peft_model(llama() if base is None else base, library.LoraConfig(**options))
        model.save_pretrained(tmp_path / "initial")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        return model.eval()

    return train


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", True])
def test_the_untouched_base_gives_the_trained_outputs_in_both_libraries(init, trained_from, llama, tokens, tmp_path):
    model = trained_from(init_lora_weights=init)
    expected, start = model(input_ids=tokens).logits, llama()(input_ids=tokens).logits
    assert not torch.allclose(expected, start, atol=1e-3)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    for library in LIBRARIES:
        base = llama()
        weights = {name: value.clone() for name, value in base.state_dict().items()}
        loaded = library.PeftModel.from_pretrained(base, tmp_path / "plain")
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=3e-6, rtol=1e-4)
        config = loaded.peft_config["default"]
        assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 12, True)
        for name, value in loaded.unload().state_dict().items():
            assert torch.equal(value, weights[name])


@pytest.mark.parametrize("safe", [True, False])
def test_the_files_are_pefts(safe, trained_from, tmp_path):
    model = trained_from(peft)
    model.save_pretrained(tmp_path / "trained")
    config = peft_fast.PeftConfig.from_pretrained(tmp_path / "trained")
    model.save_pretrained(
        tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "initial"), safe_serialization=safe
    )
    ours = peft_fast.get_peft_model(trained_from(peft).unload(), config)
    peft_fast.set_peft_model_state_dict(ours, load_file(tmp_path / "trained" / "adapter_model.safetensors"))
    ours.save_pretrained(
        tmp_path / "ours", path_initial_model_for_weight_conversion=str(tmp_path / "initial"), safe_serialization=safe
    )
    theirs, mine = (peft_fast.load_peft_weights(tmp_path / name) for name in ("peft", "ours"))
    assert theirs.keys() == mine.keys()
    for key, value in theirs.items():
        assert torch.equal(mine[key], value), key
    theirs, mine = (peft.PeftConfig.from_pretrained(tmp_path / name).to_dict() for name in ("peft", "ours"))
    assert {**theirs, "base_model_name_or_path": None} == {**mine, "base_model_name_or_path": None}


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"use_dora": True},  # whose magnitudes peft leaves out of the file
        {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": True},  # peft leaves embeddings out
    ],
)
def test_options(options, trained_from, llama, tokens, tmp_path):
    model = trained_from(**options)
    expected = model(input_ids=tokens).logits
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial", save_embedding_layers=False
    )
    for library in LIBRARIES:
        loaded = library.PeftModel.from_pretrained(llama(), tmp_path / "plain")
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(8, 12, 3), (2, 8, 7, 7)),
        (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 7, 7)),  # in peft ranks of other groups are mixed up
        (lambda: nn.Conv1d(8, 12, 3), (2, 8, 7)),
        (lambda: Conv1D(12, 8), (3, 8)),
    ],
    ids=["conv2d", "grouped", "conv1d", "Conv1D"],
)
def test_other_layers(make, shape, options, tmp_path):
    def base():
        torch.manual_seed(1)
        return nn.Sequential(make())

    torch.manual_seed(2)
    config = peft_fast.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **options)
    model, x = peft_fast.get_peft_model(base(), config), torch.randn(shape)
    for parameter in model.base_model.model[0].lora_A.parameters():
        parameter.data.copy_(torch.randn_like(parameter))  # so that a mix-up of ranks is seen
    model.save_pretrained(tmp_path / "initial")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    expected = model(x)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    for library in LIBRARIES:
        loaded = library.PeftModel.from_pretrained(base(), tmp_path / "plain")
        torch.testing.assert_close(loaded(x), expected, atol=1e-5, rtol=1e-4)


def test_several_plain_adapters_then_live_side_by_side(trained_from, llama, tokens, tmp_path):
    model = trained_from()
    expected = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    other = peft_fast.get_peft_model(llama(), peft_fast.LoraConfig(r=2, target_modules=TARGETS), "first")
    other.load_adapter(tmp_path / "plain", "plain")
    other.set_adapter("plain")
    torch.testing.assert_close(other(input_ids=tokens).logits, expected, atol=3e-6, rtol=1e-4)


def test_bf16(trained_from, llama, tokens, tmp_path):
    """What is left is the base weight's rounding."""
    model = trained_from(base=llama(torch.bfloat16))
    expected = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    loaded = peft_fast.PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path / "plain")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=0.05, rtol=0)


def test_of_few_bits_a_warning_says_that_outputs_differ(trained_from, llama, tokens, tmp_path):
    base = peft_fast.quantize_linear_layers(llama(), 4)
    model = trained_from(base=base)
    expected = model(input_ids=tokens).logits
    with pytest.warns(UserWarning, match="somewhat other outputs"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "as it is")
    untouched_base = peft_fast.quantize_linear_layers(llama(), 4)
    loaded = peft_fast.PeftModel.from_pretrained(untouched_base, tmp_path / "plain")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=0.1, rtol=0)


def test_the_method_of_the_tuner(trained_from, tmp_path):
    """As peft has it: the initial adapter is loaded beside the trained one."""
    model = trained_from()
    config = peft_fast.PeftConfig.from_pretrained(tmp_path / "initial")
    config.init_lora_weights = True
    model.add_adapter("initial", config)
    peft_fast.set_peft_model_state_dict(model, peft_fast.load_peft_weights(tmp_path / "initial"), "initial")
    tensors = model.base_model.subtract_mutated_init(peft_fast.get_peft_model_state_dict(model), "initial")
    model.save_pretrained(
        tmp_path / "plain", selected_adapters=["default"],
        path_initial_model_for_weight_conversion=tmp_path / "initial",
    )  # fmt: skip
    written = peft_fast.load_peft_weights(tmp_path / "plain")
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensors[key], value) for key, value in written.items())


def test_what_cannot_be_converted_leaves_model_and_files(trained_from, llama, untouched, tmp_path):
    model = trained_from()
    model.save_pretrained(tmp_path / "plain")
    target = {"path_initial_model_for_weight_conversion": tmp_path / "initial"}
    config = model.peft_config["default"]
    with untouched(model, tmp_path):
        with pytest.raises(ValueError, match="must be the folder of the adapter as it was .* got .*nowhere"):
            model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "nowhere")
        with pytest.raises(ValueError, match="Can't find"):
            model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path)
        for change, message in (
            ({"use_rslora": True, "rank_pattern": {"q_proj": 4}}, "cannot be used with use_rslora and rank_pattern"),
            ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
            ({"target_parameters": ["experts.down_proj"]}, "cannot be used with target_parameters"),
        ):
            before = {name: getattr(config, name) for name in change}
            vars(config).update(change)
            with pytest.raises(ValueError, match=message):
                model.save_pretrained(tmp_path / "plain", **target)
            vars(config).update(before)
    small = peft_fast.get_peft_model(llama(), peft_fast.LoraConfig(r=2, target_modules=["q_proj"]))
    with (
        untouched(small, tmp_path),
        pytest.raises(ValueError, match=r"is \(2, 64\), and the initial one has \(4, 64\)"),
    ):
        small.save_pretrained(tmp_path / "plain", **target)
    wide = peft_fast.get_peft_model(llama(), peft_fast.LoraConfig(r=4, target_modules=["k_proj"]))
    with untouched(wide, tmp_path), pytest.raises(ValueError, match="and the initial one has nothing"):
        wide.save_pretrained(tmp_path / "plain", **target)


def test_the_second_adapter_failing_leaves_the_first_unwritten(trained_from, untouched, tmp_path):
    model = trained_from()
    model.add_adapter("other", peft_fast.LoraConfig(r=3, target_modules=["q_proj"]))
    with untouched(model, tmp_path), pytest.raises(ValueError, match="the initial adapter must be"):
        model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert not (tmp_path / "new").exists()
