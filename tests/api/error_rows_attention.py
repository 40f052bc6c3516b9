"""Rows of error_table.py: prompts in the attention, which are adaption prompts and cartridges."""

from typing import Any

import torch
from error_tools import Row


def _prompted(library: Any, base: Any, **options: Any) -> Any:
    return library.get_peft_model(
        base, library.AdaptionPromptConfig(**{"adapter_len": 2, "adapter_layers": 1, **options})
    )


ADAPTION_PROMPTS = [
    Row(
        "adaption prompts for a model of another type",
        lambda l, t: _prompted(l, _other_model()),
        ValueError,
        "Unsupported model type for adaption prompt",
        ("adaption prompts are for models of the types llama, mistral, gpt2, got 'opt'",),
    ),
    Row(
        "adaption prompts in more layers than there are",
        lambda l, t: _prompted(l, t.llama(), adapter_layers=9),
        ValueError,
        "more adapter layers '9' than the model has '2'",
        ("adapter_layers is 9, and the model has 2 modules",),
    ),
    Row(
        "an adaption prompt's name twice",
        lambda l, t: _prompted(l, t.llama()).add_adapter(
            "default", l.AdaptionPromptConfig(adapter_len=2, adapter_layers=1)
        ),
        ValueError,
        "already exists",
        ("'default' exists already",),
    ),
    Row(
        "an adaption prompt that is not there",
        lambda l, t: _prompted(l, t.llama()).set_adapter("zzz"),
        ValueError,
        "not found",
        ("adapter 'zzz' does not exist",),
    ),
    Row(
        "merging an adaption prompt",
        lambda l, t: _prompted(l, t.llama()).merge_and_unload(),
        AttributeError,
        "merge_and_unload",
        ("cannot be merged", "keep the adapter"),
        ValueError,
        why="the method is there, and says why not",
    ),
    Row(
        "the status of adaption prompts",
        lambda l, t: _prompted(l, t.llama()).get_layer_status(),
        TypeError,
        "adaption prompt are not supported",
        silent=True,
        why="its layers have a status as others do",
    ),
]


def _other_model() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "ffn_dim": 8, "num_hidden_layers": 1}
    return OPTForCausalLM(OPTConfig(vocab_size=20, **sizes))


def _cartridge(library: Any, tools: Any, **options: Any) -> Any:
    config = library.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **options)
    return library.get_peft_model(tools.llama(), config)


def _start(library: Any, tools: Any, model: Any = None, **sizes: int) -> None:
    model = _cartridge(library, tools) if model is None else model
    shape = {"batch": 1, "heads": 2, "tokens": 3, "dim": 16, **sizes}
    cache = [(torch.zeros(*shape.values()), torch.zeros(*shape.values())) for _ in range(2)]
    library.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


def _composed(library: Any, tools: Any, *models: Any) -> None:
    paths = []
    for index, model in enumerate(models):
        paths.append(tools.folder / str(index))
        model.save_pretrained(paths[-1])
    library.compose_cartridge_adapters(paths, output_path=tools.folder / "out")


def _prefix(library: Any, tools: Any, **options: Any) -> Any:
    config = library.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **options)
    return library.get_peft_model(tools.llama(), config)


CARTRIDGES = [
    Row(
        "a cartridge with a negative number of frozen tokens",
        lambda l, t: l.CartridgeConfig(num_frozen_tokens=-1),
        ValueError,
        "must be >= 0",
        ("num_frozen_tokens must be an integer from 0 on, got -1",),
    ),
    Row(
        "a cartridge with more frozen tokens than it has",
        lambda l, t: l.CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=3),
        ValueError,
        "must be <= `num_virtual_tokens`",
        ("num_frozen_tokens must be at most num_virtual_tokens, 2, got 3",),
    ),
    Row(
        "a cartridge from a cache without layers",
        lambda l, t: l.prompt_embeddings_from_past_key_values([], num_virtual_tokens=1),
        ValueError,
        "Empty `past_key_values`",
        ("must be a cache with keys and values, got one without layers",),
    ),
    Row(
        "a cartridge from no cache",
        lambda l, t: l.prompt_embeddings_from_past_key_values(7, num_virtual_tokens=1),
        TypeError,
        "Unsupported `past_key_values` type",
        ("must be a cache of transformers or (keys, values) by layer, got a int",),
    ),
    Row(
        "a cartridge from the cache of two samples",
        lambda l, t: _start(l, t, batch=2),
        ValueError,
        "single-sequence prefill",
        ("past_key_values must be of one sample", "run the model on one text"),
    ),
    Row(
        "a cartridge from too short a cache",
        lambda l, t: _start(l, t, tokens=1),
        ValueError,
        "Need at least 2 cached tokens, got 1",
        ("at least num_virtual_tokens=2 tokens, got 1", "give a longer text"),
    ),
    Row(
        "a cartridge from another model's cache",
        lambda l, t: _start(l, t, dim=8),
        (ValueError, RuntimeError),
        "",
        ("prompt_embeddings must be a tensor (2, 128), got (2, 64)",),
        ValueError,
        why="what is wrong is said before anything is written",
    ),
    Row(
        "an adapter of another type from a cache",
        lambda l, t: _start(
            l, t, l.get_peft_model(t.llama(), l.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        ),
        ValueError,
        "must be a CARTRIDGE or PREFIX_TUNING adapter",
        ("what CARTRIDGE and PREFIX_TUNING adapters start from", "PROMPT_TUNING"),
    ),
    Row(
        "a projected prefix from a cache",
        lambda l, t: _start(l, t, _prefix(l, t, prefix_projection=True)),
        ValueError,
        "not supported for prefix tuning with `prefix_projection=True`",
        ("has prefix_projection=True", "Use prefix_projection=False"),
    ),
    Row(
        "composing one cartridge",
        lambda l, t: _composed(l, t, _cartridge(l, t)),
        ValueError,
        "Need at least 2 adapters",
        ("adapter_paths must be two adapters or more, got 1",),
    ),
    Row(
        "composing a cartridge and a prefix",
        lambda l, t: _composed(l, t, _cartridge(l, t), _prefix(l, t)),
        ValueError,
        "is not a CARTRIDGE adapter",
        ("must be a CARTRIDGE adapter, got PREFIX_TUNING",),
    ),
    Row(
        "composing cartridges of several models",
        lambda l, t: _composed(l, t, _cartridge(l, t), _wider(l, t)),
        ValueError,
        "Incompatible CARTRIDGE configs for attribute 'token_dim'",
        ("adapters of one model have the same token_dim",),
    ),
]


def _wider(library: Any, tools: Any) -> Any:
    config = library.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return library.get_peft_model(tools.llama(num_key_value_heads=4), config)


PROMPTS_IN_ATTENTION = [*ADAPTION_PROMPTS, *CARTRIDGES]
