"""Starts that read the base weight (PiSSA, ...) on the output layer, whose base weight peft saves with the adapter, and
on one that shares its weight with the input embedding; and those that draw what they take."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

import peft_fast

LIBRARIES = (peft, peft_fast)
KEY = "base_model.model.lm_head.base_layer.weight"


def adapted(library, base, init, **options):
    torch.manual_seed(5)
    options = {"target_modules": ["q_proj", "lm_head"], "r": 4, "lora_alpha": 6, **options}
    return library.get_peft_model(base, library.LoraConfig(init_lora_weights=init, **options))


@pytest.mark.filterwarnings("ignore:an embedding layer is adapted")
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "init", ["pissa", "olora", *(pytest.param(i, marks=pytest.mark.slow) for i in ("orthogonal", True))]
)
def test_the_heads_base_weight_in_a_file(init, library, llama, tokens, trained, tmp_path):
    """It is without what the start has taken, which is not to be taken again; and as it was before, once the adapter
    is converted."""
    base, options = llama(), {"use_rslora": True} if init == "olora" else {"alpha_pattern": {"lm_head": 3}}
    original = base.lm_head.weight.detach().clone()
    model = adapted(library, base, init, **options)
    model.save_pretrained(tmp_path / "initial")
    expected = trained(model).eval()(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert (load_file(tmp_path / "trained" / "adapter_model.safetensors")[KEY] - original).abs().max() > 1e-3 or (
        init in ("orthogonal", True)
    )
    if library is peft_fast:
        written = load_file(tmp_path / "plain" / "adapter_model.safetensors")[KEY]
        torch.testing.assert_close(written, original, atol=1e-6, rtol=0)
    for folder in ("trained", "plain"):
        for reader in LIBRARIES:
            loaded = reader.PeftModel.from_pretrained(llama(), tmp_path / folder)
            torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=3e-6, rtol=1e-4)
    other = adapted(peft_fast, llama(), True, target_modules=["q_proj"])
    other.load_adapter(tmp_path / "trained", "second")
    other.set_adapter("second")
    torch.testing.assert_close(other(input_ids=tokens).logits, expected, atol=3e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:an embedding layer is adapted")
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_head_that_shares_its_weight(init, llama, tokens, tmp_path):
    """The input embedding loses it too, in peft as well."""
    more = {"loftq_config": {"loftq_bits": 4}, "lora_alpha": 4} if init == "loftq" else {}
    with pytest.warns(UserWarning, match=r"changes a weight that several layers have, .*embed_tokens.* and .*lm_head"):
        model = adapted(peft_fast, llama(tie_word_embeddings=True), init, **more)
    assert model.base_model.model.lm_head.weight is model.base_model.model.model.embed_tokens.weight
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted(peft_fast, llama(tie_word_embeddings=True), "orthogonal")
        adapted(peft_fast, llama(tie_word_embeddings=True), init, target_modules=["q_proj"], **more)
        adapted(peft_fast, llama(), init, **more)
    assert not any("several layers have" in str(one.message) for one in caught)
    if init == "pissa":
        expected = model(input_ids=tokens).logits
        model.save_pretrained(tmp_path)
        for library in LIBRARIES:
            loaded = library.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
            torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=3e-6, rtol=1e-4)


def test_what_chance_takes_is_said_when_a_file_is_loaded(llama, tmp_path):
    for init in ("pissa_niter_2", "pissa"):
        adapted(peft_fast, llama(), init, target_modules=["q_proj"]).save_pretrained(tmp_path / init)
    with pytest.warns(UserWarning, match="'pissa_niter_2' draws at random what it takes"):
        model = peft_fast.PeftModel.from_pretrained(llama(), tmp_path / "pissa_niter_2")
    with pytest.warns(UserWarning, match="draws at random what it takes"):
        model.load_adapter(tmp_path / "pissa_niter_2", "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_fast.PeftModel.from_pretrained(llama(), tmp_path / "pissa")
