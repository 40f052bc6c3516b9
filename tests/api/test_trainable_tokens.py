"""LoraConfig(trainable_token_indices=...), beside peft 0.21.2: on models whose output layer shares the embedding's
weight and on others."""

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

import peft_fast
from peft_fast.tuners.trainable_tokens import TrainableTokensLayer

from .token_models import IDS, MODELS, TOKENS, E, V, adapted, base, close, logits, shaken

CASES = [(kind, "list") for kind in MODELS] + [(k, t) for k in ("tied", "untied") for t in TOKENS if t != "list"]
every_case = pytest.mark.parametrize(("kind", "tokens"), CASES, ids=[f"{k}-{t}" for k, t in CASES])


@every_case
def test_names_values_flags_outputs_and_gradients_are_pefts(kind, tokens):
    fresh = [adapted(library, kind, TOKENS[tokens], shake=False) for library in (peft_fast, peft)]
    named = [dict(model.named_parameters(remove_duplicate=False)) for model in fresh]
    assert list(named[0]) == list(named[1])
    assert fresh[0].state_dict().keys() == fresh[1].state_dict().keys()
    assert {n for n, _ in fresh[0].named_buffers()} == {n for n, _ in fresh[1].named_buffers()}
    assert fresh[0].get_nb_trainable_parameters() == fresh[1].get_nb_trainable_parameters()
    for name, mine in named[0].items():
        assert torch.equal(mine, named[1][name]), name
        assert mine.requires_grad == named[1][name].requires_grad, name
    close(logits(fresh[0], kind), logits(base(kind), kind))  # untrained rows are the base's
    ours, theirs = (adapted(library, kind, TOKENS[tokens]) for library in (peft_fast, peft))
    outputs = [logits(model, kind) for model in (ours, theirs)]
    close(*outputs)
    assert (outputs[0] - logits(fresh[0], kind)).abs().max() > 1e-2
    for out in outputs:
        out.square().mean().backward()
    compared = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            start = 1 if tokens == "twice" and "delta" in name else 0  # the first of two rows for a token has no effect
            close(mine.grad[start:], other.grad[start:], msg=name)
            compared += "tokens_delta" in name and bool(mine.grad.abs().max() > 0)
    assert compared


@every_case
def test_files_have_pefts_keys_and_load_both_ways(kind, tokens, tmp_path):
    keys = []
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        written = adapted(writer, kind, TOKENS[tokens])
        folder = tmp_path / writer.__name__
        written.save_pretrained(folder)
        for low in (False, True):
            read = reader.PeftModel.from_pretrained(base(kind), folder, low_cpu_mem_usage=low).eval()
            close(logits(read, kind), logits(written, kind))
        again = reader.PeftModel.from_pretrained(base(kind), folder, adapter_name="a b", is_trainable=True)
        assert again.get_nb_trainable_parameters()[0] == written.get_nb_trainable_parameters()[0]
        keys.append(set(load_file(folder / "adapter_model.safetensors")))
    assert keys[0] == keys[1]
    assert any(key.endswith("token_adapter.trainable_tokens_delta") for key in keys[0])


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2", "gemma2-scaled"])
def test_merging_and_unloading_give_pefts_weights(kind):
    ours, theirs = (adapted(library, kind, [1, 3, 7]) for library in (peft_fast, peft))
    expected = logits(ours, kind)
    for model in (ours, theirs):
        model.merge_adapter()
    close(logits(ours, kind), expected)
    close(logits(ours, kind), logits(theirs, kind))
    for model in (ours, theirs):
        model.unmerge_adapter()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        close(mine, other, msg=name)
    close(logits(ours, kind), expected)
    merged = [model.merge_and_unload(safe_merge=True) for model in (ours, theirs)]
    assert [n for n, _ in merged[0].named_modules()] == [n for n, _ in merged[1].named_modules()]
    for (name, mine), other in zip(merged[0].named_parameters(), merged[1].named_parameters(), strict=True):
        assert name == other[0]
        close(mine, other[1], msg=name)
    close(logits(merged[0], kind), expected)
    assert merged[0].config.tie_word_embeddings == merged[1].config.tie_word_embeddings == (kind != "untied")


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_training_moves_the_rows_as_in_peft_and_nothing_else(kind, tmp_path):
    models = [adapted(library, kind, [1, 3, 7]).train() for library in (peft_fast, peft)]
    for module in [m for model in models for m in model.modules() if isinstance(m, torch.nn.Dropout)]:
        module.p = 0.0
    before = [p.detach().clone() for p in models[0].parameters()]
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, mine), other, old in zip(models[0].named_parameters(), models[1].parameters(), before):
        close(mine, other, atol=1e-4, msg=name)
        assert torch.equal(mine, old) != mine.requires_grad, name


def test_a_frozen_padding_row_is_as_in_peft():
    ids = torch.tensor([[3, 1, 3, 2]])  # 3 is the padding token
    gradients = []
    for library in (peft_fast, peft):
        model = adapted(library, "untied", [3, 1])
        model(input_ids=ids).logits.square().mean().backward()
        gradients.append(next(p.grad for n, p in model.named_parameters() if "delta" in n))
    close(*gradients)
    assert not gradients[0][0].any()
    assert gradients[0][1].any()


def test_in_16_bits_the_rows_are_kept_in_fp32_as_in_peft():
    ours, theirs = (adapted(library, "tied", [1, 3], dtype=torch.bfloat16) for library in (peft_fast, peft))
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    close(logits(ours, "tied").float(), logits(theirs, "tied").float(), rtol=2e-2, atol=2e-2)
    out = logits(ours, "tied")
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = (logits(adapted(library, "tied", [1, 3]), "tied") for library in (peft_fast, peft))
    assert mine.dtype == other.dtype
    close(mine.float(), other.float(), rtol=2e-2, atol=2e-2)


def test_no_tensor_of_the_tables_size_is_made():
    """peft copies the table in each forward, and makes a gradient of its size."""
    table, sizes = torch.nn.Embedding(5000, 4), []
    layer = TrainableTokensLayer(table.requires_grad_(False), "default", token_indices=[1, 4000])
    layer.set_adapter("default")

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        layer(IDS).square().sum().backward()
    assert sizes
    assert max(sizes) < 5000


def test_an_output_layer_keeps_its_bias_which_pefts_loses():
    def biased(library):
        model = base("bert")
        model.cls.predictions.bias.data.normal_(generator=torch.Generator().manual_seed(1))
        expected = model(input_ids=IDS).logits
        config = library.LoraConfig(target_modules=["query"], trainable_token_indices=[1])
        return library.get_peft_model(model, config).eval()(input_ids=IDS).logits - expected

    assert biased(peft_fast).abs().max() < 1e-5
    assert biased(peft).abs().max() > 0.1


def test_hooks_of_the_embedding_run():
    model, seen = base("tied"), []
    model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(1))
    model = peft_fast.get_peft_model(model, peft_fast.LoraConfig(trainable_token_indices=[1]))
    model(input_ids=IDS)
    assert seen == [1]


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_embeddings_that_are_saved_with_it_load_both_ways(kind, tmp_path):
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        written = adapted(writer, kind, [1, 3])
        written.get_base_model().get_input_embeddings().original_module.weight.data *= 1.5
        folder = tmp_path / writer.__name__
        written.save_pretrained(folder, save_embedding_layers=True)
        read = reader.PeftModel.from_pretrained(base(kind), folder).eval()
        close(logits(read, kind), logits(written, kind))


def test_an_adapted_output_layer_follows_inside_of_its_adapter():
    ours, theirs = (_with_head(library) for library in (peft_fast, peft))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    close(logits(ours, "tied"), logits(theirs, "tied"))
    files = [library.get_peft_model_state_dict(m) for library, m in ((peft_fast, ours), (peft, theirs))]
    assert files[0].keys() == files[1].keys()
    with pytest.raises(ValueError, match="computed from others"):
        ours.merge_and_unload()


def _with_head(library):
    config = library.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], trainable_token_indices=[1, 3])
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shaken(library.get_peft_model(base("tied"), config).eval())


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_options_of_the_embedding_are_kept_as_in_peft(options):
    from peft.tuners.trainable_tokens import TrainableTokensConfig
    from peft.tuners.trainable_tokens import TrainableTokensLayer as Theirs

    torch.manual_seed(0)
    table = torch.nn.Embedding(V, E, **options).requires_grad_(False)
    ours = TrainableTokensLayer(copy.deepcopy(table), "default", token_indices=[1, 3])
    theirs = Theirs(copy.deepcopy(table), "default", None)
    theirs.update_layer("default", TrainableTokensConfig(token_indices=[1, 3]))
    ids = torch.tensor([[1, 1, 3, 7, 7]])
    results = []
    for layer in (ours, theirs):
        layer.set_adapter(["default"])
        layer.trainable_tokens_delta["default"].data += 0.5
        y = layer(ids)
        y.square().sum().backward()
        results.append((y, layer.trainable_tokens_delta["default"].grad))
        assert torch.equal(layer.base_layer.weight, table.weight)
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])
