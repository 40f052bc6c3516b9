"""Beside peft on tiny models of many architectures: Conv1D layers, embeddings (scaled, tied, shared, of positions),
convolutions over patches and over sound, with and without DoRA."""

import warnings

import peft
import pytest
import torch
import transformers as tf
from transformers.modeling_utils import PreTrainedModel

import peft_fast

V, E, HEADS, F = 96, 32, 4, 48
IDS = torch.randint(1, V, (2, 9), generator=torch.Generator().manual_seed(3))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
SOUND = torch.randn(2, 800, generator=torch.Generator().manual_seed(5))
MELS = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(6))
TEXT = {"input_ids": IDS}
TEXT_PAIR = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}


def gpt2() -> PreTrainedModel:
    config = tf.GPT2Config(vocab_size=V, n_embd=E, n_layer=2, n_head=HEADS, n_positions=16)
    return tf.GPT2LMHeadModel(config)


def bert() -> PreTrainedModel:
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=V, hidden_size=E, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=F,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def opt() -> PreTrainedModel:
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=V, hidden_size=E, num_hidden_layers=2, num_attention_heads=HEADS, ffn_dim=F,
            max_position_embeddings=16, word_embed_proj_dim=16,
        )
    )  # fmt: skip


def vit() -> PreTrainedModel:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=E, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=F, image_size=16,
            patch_size=8,
        )
    )  # fmt: skip


def t5() -> PreTrainedModel:
    config = tf.T5Config(vocab_size=V, d_model=E, d_kv=8, d_ff=F, num_layers=2, num_heads=HEADS)
    return tf.T5ForConditionalGeneration(config)


def bart() -> PreTrainedModel:
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=V, d_model=E, encoder_layers=1, decoder_layers=1, encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS, encoder_ffn_dim=F, decoder_ffn_dim=F, max_position_embeddings=16,
            scale_embedding=True,
        )
    )  # fmt: skip


def gemma3() -> PreTrainedModel:
    return tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            vocab_size=V, hidden_size=E, intermediate_size=F, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip


def wav2vec2() -> PreTrainedModel:
    return tf.Wav2Vec2Model(
        tf.Wav2Vec2Config(
            vocab_size=V, hidden_size=E, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=F,
            conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4, mask_time_prob=0.0,
        )
    )  # fmt: skip


def whisper() -> PreTrainedModel:
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=V, d_model=E, encoder_layers=1, decoder_layers=1, encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS, encoder_ffn_dim=F, decoder_ffn_dim=F, num_mel_bins=8,
            max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


MODELS = {
    "gpt2": (gpt2, TEXT, None),
    "gpt2-all-linear": (gpt2, TEXT, "all-linear"),
    "gpt2-embeddings": (gpt2, TEXT, ["wte", "wpe", "c_proj"]),
    "bert": (bert, TEXT, None),
    "bert-embeddings": (bert, TEXT, ["word_embeddings", "position_embeddings", "token_type_embeddings", "dense"]),
    "opt": (opt, TEXT, None),
    "opt-embeddings": (opt, TEXT, ["embed_tokens", "project_in", "fc1"]),
    "vit": (vit, {"pixel_values": PIXELS}, ["projection", "query", "value"]),
    "t5": (t5, TEXT_PAIR, None),
    "t5-embeddings": (t5, TEXT_PAIR, ["shared", "relative_attention_bias", "wo"]),
    "bart-scaled": (bart, TEXT_PAIR, ["shared", "embed_tokens", "fc2"]),
    "gemma3-scaled": (gemma3, TEXT, ["embed_tokens", "v_proj"]),
    "wav2vec2": (wav2vec2, {"input_values": SOUND}, r".*conv_layers.*\.conv|.*(k_proj|feature_projection\.projection)"),
    "whisper": (whisper, {"input_features": MELS, "decoder_input_ids": IDS}, ["embed_tokens", "fc1"]),
}
every_model = pytest.mark.parametrize("kind", MODELS)
dora = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


def build(kind):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = MODELS[kind][0]().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero as transformers makes them: nothing would depend on them
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def adapted(library, kind, shake=True, **options):
    model = build(kind)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = library.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": MODELS[kind][2], **options})
        model = library.get_peft_model(model, config).eval()
    if shake:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def output(model, kind):
    out = model(**MODELS[kind][1])
    return out.logits if "logits" in out else out.last_hidden_state


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


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
