"""What is particular to rows of tokens as a method: the layers that share the embedding's weight, and overlaps."""

import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_fast
from peft_fast.tuners.trainable_tokens import TrainableTokensLayer

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tuner_cases import BY_NAME, adapted, config, shaken

LIBRARIES = (peft_fast, peft)
TOKENS = BY_NAME["TrainableTokens"]
FILE = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def small(library, model, **options):
    return adapted(library, model, TOKENS, **{**TOKENS.llama, "task_type": "CAUSAL_LM", **options})


@pytest.mark.parametrize("targets", [None, ["embed_tokens", "lm_head"]])
def test_tied_weights(targets, llama, tokens, tmp_path):
    """The output layer uses the embedding's rows; files, gradients, merging. Where the output is named too, peft fails
    in forward: it is what it is without."""
    results = []
    for library in LIBRARIES:
        base = llama(tie_word_embeddings=True)
        model = small(library, base, target_modules=targets if library is peft_fast else None)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        names = [name for name, _ in model.named_parameters()]
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.save_pretrained(tmp_path / library.__name__)
        results.append((loss, grads, names, load_file(tmp_path / library.__name__ / FILE)))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-4, atol=1e-5)
    assert results[0][2] == results[1][2]
    torch.testing.assert_close(results[0][3], results[1][3], rtol=0, atol=0)
    assert any("lm_head" in key for key in results[0][3])
    model = small(peft_fast, llama(tie_word_embeddings=True), target_modules=targets).eval()
    expected = model(tokens).logits
    for folder in LIBRARIES:
        loaded = peft_fast.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / folder.__name__)
        torch.testing.assert_close(loaded.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    plain = model.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_second_adapter_of_a_tied_model(llama, tokens):
    """In peft it puts the output layer's wrapper into another, and fails."""
    model = small(peft_fast, llama(tie_word_embeddings=True))
    other = list(range(20, 60))
    model.add_adapter("b", config(peft_fast, TOKENS, token_indices=other))
    shaken(model, TOKENS.prefix, "b").eval()
    weight = llama().model.embed_tokens.weight.detach().clone()
    for names, rows in (("b", {"b": other}), (["default", "b"], {"b": other, "default": list(range(1, 20))})):
        model.base_model.set_adapter(names)
        plain = llama(tie_word_embeddings=True)
        with torch.no_grad():
            plain.lm_head.weight.copy_(weight)
            for name, ids in rows.items():
                plain.lm_head.weight[ids] = model.base_model.model.model.embed_tokens.trainable_tokens_delta[name]
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-5)


def test_untied_outputs_have_rows_of_their_own(llama, tokens):
    model = small(peft_fast, llama(), target_modules=["embed_tokens", "lm_head"])
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    assert [layer.tied_adapter for layer in layers] == [None, None]
    model(tokens, labels=tokens).loss.backward()
    assert all(layer.trainable_tokens_delta["default"].grad.abs().sum() > 0 for layer in layers)


def test_files_whose_tied_rows_differ(llama, tmp_path, untouched):
    small(peft_fast, llama(tie_word_embeddings=True)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    (key,) = (key for key in tensors if "lm_head" in key)
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / FILE)
    base = llama(tie_word_embeddings=True)
    with untouched(base, tmp_path), pytest.raises(ValueError, match="are the same rows, and the file has several"):
        peft_fast.PeftModel.from_pretrained(base, tmp_path)
    del tensors[key]
    save_file(tensors, tmp_path / FILE)
    peft_fast.PeftModel.from_pretrained(base, tmp_path)  # one of them is enough


def test_what_cannot_be(llama, untouched):
    base = llama()
    for options, error in (
        ({"token_indices": []}, r"token_indices must be one or more ids of tokens, got \[\]"),
        ({"target_modules": ["norm"]}, "single tokens cannot be trained in a LlamaRMSNorm"),
        ({"token_indices": [10**6]}, "resize_token_embeddings"),
        ({"target_modules": ["zzz"]}, "zzz"),
    ):
        with untouched(base), pytest.raises(ValueError, match=error):
            peft_fast.get_peft_model(base, config(peft_fast, TOKENS, **options))
    for tokens in ([-1], ["a"], 3, [True]):
        with pytest.raises(ValueError, match="token_indices must be a list of token ids from 0 on"):
            peft_fast.TrainableTokensConfig(token_indices=tokens)
    model = small(peft_fast, base)
    model.add_adapter("b", config(peft_fast, TOKENS, token_indices=[5]))
    with untouched(model), pytest.raises(ValueError, match="both have a row of their own for token 5"):
        model.base_model.set_adapter(["default", "b"])


def test_rows_of_the_output_alone_do_not_become_the_embeddings(llama, untouched):
    model = small(peft_fast, llama(tie_word_embeddings=True), target_modules=["lm_head"])
    with untouched(model), pytest.raises(ValueError, match="lm_head shares the weight of the input embedding"):
        model.add_adapter("b", config(peft_fast, TOKENS))


def test_models_that_say_nothing_of_embeddings():
    base = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 3)})
    model = peft_fast.get_peft_model(base, config(peft_fast, TOKENS))
    assert isinstance(model.base_model.model["embed_tokens"], TrainableTokensLayer)
