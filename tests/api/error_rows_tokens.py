"""Rows of error_table.py: tokens whose rows are trained, and layers that are tied."""

import torch
import transformers
from error_tools import Row

OUTPUTS = {"embed_tokens": [1], "lm_head": [2]}
EMBEDDING = {"embed_tokens": [1]}

TOKENS = [
    Row(
        "tokens of a layer that is not there",
        lambda l, t: t.model(l, trainable_token_indices={"zzz": [1]}),
        ValueError,
        "not found in the base model",
        ("Target modules 'zzz' not found", "name an embedding, such as 'model.embed_tokens'"),
    ),
    Row(
        "a token that the embedding has no row for",
        lambda l, t: t.model(l, trainable_token_indices=[10**6]),
        IndexError,
        "out of bounds",
        ("ids of trained tokens must be from 0 to", "got [1000000]", "resize_token_embeddings"),
        ValueError,
        why="the value of an option is wrong",
    ),
    Row(
        "a token counted from the end",
        lambda l, t: t.model(l, trainable_token_indices=[-1])(input_ids=_ids()),
        (IndexError, RuntimeError),
        "out of",
        ("trainable_token_indices must be one or more ids from 0 on", "got [-1]"),
        ValueError,
        why="peft makes the adapter, and its forward fails",
    ),
    Row(
        "tokens, but none",
        lambda l, t: t.model(l, trainable_token_indices=[])(input_ids=_ids()),
        (IndexError, RuntimeError),
        "",
        ("trainable_token_indices must be one or more ids", "got []"),
        ValueError,
        why="peft makes the adapter, and its forward fails",
    ),
    Row(
        "tokens by their text",
        lambda l, t: t.model(l, trainable_token_indices=["<think>"]),
        TypeError,
        "invalid data type",
        ("trainable_token_indices must be a list of token ids", "got ['<think>']"),
    ),
    Row(
        "tokens of a layer that has no rows of tokens",
        lambda l, t: t.model(l, trainable_token_indices={"norm": [1]}),
        AttributeError,
        "in_features",
        ("single tokens cannot be trained in a LlamaRMSNorm",),
        ValueError,
        why="the value of an option is wrong",
    ),
    Row(
        "tokens of an embedding with LoRA",
        lambda l, t: t.model(l, target_modules=["embed_tokens"], trainable_token_indices=[1]),
        TypeError,
        "cannot be applied to modules of type",
        ("trainable_token_indices cannot be applied to model.embed_tokens", "leave it out of target_modules"),
        ValueError,
        why="the value of an option is wrong, not its type",
    ),
    Row(
        "tokens of an embedding that is trained whole",
        lambda l, t: t.model(l, modules_to_save=["embed_tokens"], trainable_token_indices=EMBEDDING),
        ValueError,
        "but not both",
        ("embed_tokens is in modules_to_save", "leave out one"),
    ),
    Row(
        "other tokens for layers that have to be tied",
        lambda l, t: t.model(
            l, t.llama(tie_word_embeddings=True), trainable_token_indices=OUTPUTS, ensure_weight_tying=True
        ),
        ValueError,
        "Cannot ensure weight tying",
        ("ensure_weight_tying needs the same tokens", "embed_tokens: [1], lm_head: [2]", "give them the same"),
    ),
    Row(
        "two active adapters with rows for one token",
        lambda l, t: _two(l, t).base_model.set_adapter(["default", "other"]),
        ValueError,
        "Only one adapter can be set",
        ("both have a row of their own for token 1", "take one of them"),
    ),
    Row(
        "two active adapters with rows for other tokens",
        lambda l, t: _two(l, t, [2]).base_model.set_adapter(["default", "other"]),
        ValueError,
        "Only one adapter can be set",
        silent=True,
        why="their rows do not meet; peft's own note says that it would work",
    ),
    Row(
        "merging adapters with rows for one token",
        lambda l, t: _two(l, t).merge_adapter(["default", "other"]),
        ValueError,
        "are already defined",
        ("both have a row of their own for token 1",),
    ),
    Row(
        "ensure_weight_tying where nothing is tied",
        lambda l, t: t.model(l, target_modules=["embed_tokens"], ensure_weight_tying=True),
        UserWarning,
        "no tied modules were found",
        ("ensure_weight_tying=True", "no modules of the model are tied"),
    ),
    Row(
        "ensure_weight_tying with no embedding in the adapter",
        lambda l, t: t.model(l, t.llama(tie_word_embeddings=True), ensure_weight_tying=True),
        UserWarning,
        "no tied modules are added",
        ("ensure_weight_tying=True", "it has no effect"),
    ),
    Row(
        "ensure_weight_tying where an embedding has another name than peft knows",
        lambda l, t: t.model(l, _gpt2(), target_modules=["wte"], ensure_weight_tying=True),
        UserWarning,
        "no tied modules are added",
        ("peft tells by the names embed_tokens and lm_head", "it has no effect"),
    ),
    Row(
        "merging one trained copy of two layers that were tied",
        lambda l, t: t.model(l, t.llama(tie_word_embeddings=True), modules_to_save=["lm_head"]).merge_and_unload(),
        UserWarning,
        "no longer tied",
        ("no longer share a weight", "tie_word_embeddings is set to False"),
    ),
]


def _ids():
    return torch.tensor([[1, 2]])


def _gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))


def _two(library, tools, tokens=(1,)):
    model = tools.model(library, trainable_token_indices=[1])
    config = library.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=list(tokens))
    model.add_adapter("other", config)
    return model
