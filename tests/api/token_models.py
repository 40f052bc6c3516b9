"""Models whose tokens' rows are trained, for both libraries."""

import warnings

import torch
import transformers as tf

V, E = 40, 16
IDS = torch.randint(0, 10, (3, 9), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": V, "hidden_size": E, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
TEXT = {"input_ids": IDS}
BART = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
        (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip


def llama(tied):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, pad_token_id=3, tie_word_embeddings=tied))


def bert():
    model = tf.BertForMaskedLM(tf.BertConfig(**SIZES))
    return model.requires_grad_(True)


MODELS = {
    "tied": (lambda: llama(True), TEXT, ["q_proj"]),
    "untied": (lambda: llama(False), TEXT, ["q_proj"]),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=V, n_embd=E, n_layer=1, n_head=2)), TEXT, ["c_attn"]),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=V, d_model=E, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        ),
        PAIR,
        ["q"],
    ),
    "bart-scaled": (
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=V, d_model=E, scale_embedding=True, **BART)),
        PAIR,
        ["q_proj"],
    ),
    "gemma2-scaled": (
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)),
        TEXT,
        ["q_proj"],
    ),
    "bert": (bert, TEXT, ["query"]),
}
TOKENS = {
    "list": [1, 3, 7],
    "embedding": {"embed_tokens": [5, 1]},
    "head": {"lm_head": [2, 9]},
    "both-alike": {"embed_tokens": [1, 3], "lm_head": [1, 3]},
    "both-different": {"embed_tokens": [1, 3], "lm_head": [1, 2, 4]},
    "twice": [4, 4, 6],
}


def base(kind, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return MODELS[kind][0]().eval().to(dtype)


def adapted(library, kind, tokens, shake=True, dtype=torch.float32, **options):
    model = base(kind, dtype)
    torch.manual_seed(5)
    config = library.LoraConfig(r=4, target_modules=MODELS[kind][2], trainable_token_indices=tokens, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(model, config).eval()
    return shaken(model) if shake else model


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name or "tokens_delta" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def logits(model, kind):
    return model(**MODELS[kind][1]).logits


def close(a, b, **tolerances):
    torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


def without_bias(model, kind):
    """peft's layer around an output layer with a bias leaves it out, so its BERT is another model: both without one."""
    if kind == "bert":
        model.get_submodule("cls.predictions").bias.data.zero_()
    return model
