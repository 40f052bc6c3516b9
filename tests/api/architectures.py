"""Tiny models of many architectures, of random weights, and adapters in them."""

import warnings

import torch
import transformers as tf
from transformers.modeling_utils import PreTrainedModel

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


SIZES = {"vocab_size": V, "hidden_size": E, "intermediate_size": F, "num_hidden_layers": 2}
GROUPED = {**SIZES, "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 32}


def llama() -> PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED))


def qwen2() -> PreTrainedModel:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED, tie_word_embeddings=True))


def qwen3_moe() -> PreTrainedModel:
    experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GROUPED, **experts, head_dim=8))


def mistral() -> PreTrainedModel:
    return tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=4))


def gemma2() -> PreTrainedModel:
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4))


def phi() -> PreTrainedModel:
    return tf.PhiForCausalLM(tf.PhiConfig(**GROUPED, partial_rotary_factor=0.5))


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
    "llama": (llama, TEXT, None),
    "llama-all-linear": (llama, TEXT, "all-linear"),
    "qwen2": (qwen2, TEXT, None),
    "qwen2-all-linear": (qwen2, TEXT, "all-linear"),
    "qwen3-moe-attention": (qwen3_moe, TEXT, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "mistral": (mistral, TEXT, None),
    "mistral-all-linear": (mistral, TEXT, "all-linear"),
    "gemma2": (gemma2, TEXT, None),
    "gemma2-embeddings": (gemma2, TEXT, ["embed_tokens", "gate_proj", "up_proj", "down_proj"]),
    "phi": (phi, TEXT, None),
    "phi-all-linear": (phi, TEXT, "all-linear"),
    "bert": (bert, TEXT, None),
    "bert-embeddings": (bert, TEXT, ["word_embeddings", "position_embeddings", "token_type_embeddings", "dense"]),
    "opt": (opt, TEXT, None),
    "opt-embeddings": (opt, TEXT, ["embed_tokens", "project_in", "fc1"]),
    "vit": (vit, {"pixel_values": PIXELS}, ["projection", "q_proj", "v_proj"]),
    "t5": (t5, TEXT_PAIR, None),
    "t5-embeddings": (t5, TEXT_PAIR, ["shared", "relative_attention_bias", "wo"]),
    "bart-scaled": (bart, TEXT_PAIR, ["shared", "embed_tokens", "fc2"]),
    "gemma3-scaled": (gemma3, TEXT, ["embed_tokens", "v_proj"]),
    "wav2vec2": (wav2vec2, {"input_values": SOUND}, r".*conv_layers.*\.conv|.*(k_proj|feature_projection\.projection)"),
    "whisper": (whisper, {"input_features": MELS, "decoder_input_ids": IDS}, ["embed_tokens", "fc1"]),
}


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
