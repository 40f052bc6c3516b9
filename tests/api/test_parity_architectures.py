"""Beside peft on tiny models of many architectures: Conv1D layers, embeddings (scaled, tied, shared, of positions),
convolutions over patches and over sound, with and without DoRA."""

import warnings

import peft
import pytest
import torch

import peft_fast

from .architectures import MODELS, adapted, build, output, relative

every_model = pytest.mark.parametrize("kind", MODELS)
dora = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


@every_model
@dora
def test_names_values_outputs_gradients_and_merged_weights_are_pefts(kind, use_dora):
    ours, theirs = (adapted(library, kind, use_dora=use_dora) for library in (peft_fast, peft))
    fresh = [adapted(library, kind, shake=False, use_dora=use_dora) for library in (peft_fast, peft)]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for (name, mine), other in zip(fresh[0].named_parameters(), fresh[1].parameters()):
        assert torch.equal(mine, other), name
        assert mine.requires_grad == other.requires_grad, name
    outputs = [output(model, kind) for model in (ours, theirs)]
    assert relative(*outputs) <= 1e-5
    assert relative(outputs[0], output(build(kind), kind)) > 1e-4  # the adapters do something
    for out in outputs:
        out.square().mean().backward()
    compared = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None and other.grad.norm() > 1e-7:
            assert relative(mine.grad, other.grad) <= 5e-4, name
            compared += 1
    assert compared >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tied embeddings
        merged = [model.merge_and_unload() for model in (ours, theirs)]
    for (name, mine), other in zip(merged[0].named_parameters(), merged[1].parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


@every_model
@dora
def test_files_have_the_same_keys_and_load_both_ways(kind, use_dora, tmp_path):
    keys = []
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        written = adapted(writer, kind, use_dora=use_dora)
        folder = tmp_path / writer.__name__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # both say that they save an embedding
            written.save_pretrained(folder)
            read = reader.PeftModel.from_pretrained(build(kind), folder).eval()
        assert relative(output(read, kind), output(written, kind)) <= 1e-5
        keys.append(set(peft_fast.load_peft_weights(folder)))
    assert keys[0] == keys[1]


@dora
def test_whisper_reads_the_strides_of_its_convolutions(use_dora):
    """Of the adapted layers, which peft's lack: its Whisper cannot run with them."""
    with pytest.raises(AttributeError, match="stride"):
        output(adapted(peft, "whisper", target_modules=["conv1"]), "whisper")
    model = adapted(peft_fast, "whisper", target_modules=["conv1", "conv2"], use_dora=use_dora)
    expected = output(model, "whisper")
    assert relative(expected, output(build("whisper"), "whisper")) > 1e-4
    torch.testing.assert_close(output(model.merge_and_unload(), "whisper"), expected, rtol=1e-4, atol=1e-4)
