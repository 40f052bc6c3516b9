"""What a cartridge, or a prefix, starts from: keys and values that the base model computes. And several made one."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_fast.adapter_file import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from peft_fast.config import CONFIG_NAME, PeftConfig
from peft_fast.files import write_together
from peft_fast.peft_types import PeftType

from .config import CartridgeConfig
from .model import KEY

SIZES = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache as a prompt is saved: [num_virtual_tokens, layers * 2 * heads * size of a head].

    past_key_values: a cache of transformers, or (keys, values) by layer, each [1, heads, tokens, size of a head].
    Raises ValueError for a cache of several samples, of too few tokens or of layers that differ, TypeError for what is
    no cache.
    """
    pairs = _pairs(past_key_values)
    if not pairs:
        raise ValueError("past_key_values must be a cache with keys and values, got one without layers")
    first = pairs[0][0]
    if first.ndim != 4 or first.shape[0] != 1:
        raise ValueError(
            "past_key_values must be of one sample, [1, heads, tokens, size of a head] by layer, got "
            f"{tuple(first.shape)}: run the model on one text"
        )
    _, heads, _, dim = first.shape
    for index, states in enumerate(pairs):
        for one in states:
            if (one.shape[:2], one.shape[3]) != ((1, heads), dim):
                raise ValueError(
                    f"all layers must have keys and values of {heads} heads of {dim}, got {tuple(one.shape)} in layer "
                    f"{index}: this is for models whose layers are alike"
                )
            if one.shape[2] < num_virtual_tokens:
                raise ValueError(
                    f"past_key_values must have at least num_virtual_tokens={num_virtual_tokens} tokens, got "
                    f"{one.shape[2]} in layer {index}: give a longer text"
                )
    by_token = [one[0, :, :num_virtual_tokens].transpose(0, 1) for pair in pairs for one in pair]
    return torch.stack(by_token, dim=1).flatten(1)


def _pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(cache, (tuple, list)):
        return [(layer[0], layer[1]) for layer in cache]
    cache = getattr(cache, "self_attention_cache", cache)
    if not hasattr(cache, "layers"):
        raise TypeError(
            f"past_key_values must be a cache of transformers or (keys, values) by layer, got a {type(cache).__name__}"
        )
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Set a CARTRIDGE adapter, or one of PREFIX_TUNING without projection, to the first tokens of a cache; by default
    the active one and all its tokens. Returns what it was set to, see prompt_embeddings_from_past_key_values.

    Raises ValueError, with nothing changed, for other adapters and for caches that do not fit.
    """
    name, tokens = _prefix_of(model, adapter_name, num_virtual_tokens)
    embeddings = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=tokens)
    model.prompt_encoder[name].load_prompt_embeddings(embeddings)
    return embeddings


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Run the base model on `text`, and set an adapter to the first keys and values: see
    initialize_kv_prefix_from_past_key_values, also for what is raised.

    use_chat_template: as a system prompt in the tokenizer's template, if it has one. max_length: in tokens.
    """
    name, tokens = _prefix_of(model, adapter_name, num_virtual_tokens)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        encoded = tokenizer.apply_chat_template(
            message, tokenize=True, add_generation_prompt=False, return_dict=True, return_tensors="pt"
        )
        ids = encoded["input_ids"][:, :max_length]
    else:
        cut = {"truncation": True, "max_length": max_length} if max_length is not None else {}
        ids = tokenizer(text, return_tensors="pt", **cut)["input_ids"]
    ids = ids.to(model.device)
    with model.disable_adapter():
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=cache, num_virtual_tokens=tokens
    )


def _prefix_of(model: Any, adapter_name: str | None, num_virtual_tokens: int | None) -> tuple[str, int]:
    """The adapter and its number of tokens. Raises ValueError for one that is no prefix that can be set."""
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise ValueError(f"adapter {name!r} does not exist: there are {sorted(model.peft_config)}")
    config = model.peft_config[name]
    if config.peft_type not in (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING):
        raise ValueError(
            f"keys and values are what CARTRIDGE and PREFIX_TUNING adapters start from, and {name!r} is of type "
            f"{PeftType(config.peft_type).value}: name another adapter"
        )
    if getattr(config, "prefix_projection", False):
        raise ValueError(
            f"adapter {name!r} has prefix_projection=True: its keys and values come out of an MLP and cannot be set. "
            "Use prefix_projection=False, or CartridgeConfig"
        )
    return name, config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Write one cartridge that is several saved ones after each other. As many tokens are frozen as of the first.

    Raises ValueError, and writes nothing, for fewer than two and for such as are of other models.
    """
    paths = [Path(path) for path in adapter_paths]
    if len(paths) < 2:
        raise ValueError(f"adapter_paths must be two adapters or more, got {len(paths)}")
    configs: list[CartridgeConfig] = []
    for path in paths:
        config = PeftConfig.from_pretrained(str(path))
        if not isinstance(config, CartridgeConfig):
            raise ValueError(f"{path} must be a CARTRIDGE adapter, got {PeftType(config.peft_type).value}")  # type: ignore[arg-type]
        configs.append(config)
        for name in SIZES:
            if getattr(config, name) != getattr(configs[0], name):
                raise ValueError(
                    f"adapters of one model have the same {name}: {paths[0]} has {getattr(configs[0], name)!r}, and "
                    f"{path} has {getattr(config, name)!r}"
                )
    weights = [load_peft_weights(str(path), device="cpu")[KEY] for path in paths]
    composed = torch.cat(weights).contiguous()
    config = replace(configs[0], num_virtual_tokens=len(composed))
    output = Path(output_path)
    output.mkdir(parents=True, exist_ok=True)
    text = config.to_json(inference_mode=True)

    def save(path: Path) -> None:
        if safe_serialization:
            save_file({KEY: composed}, path, metadata={"format": "pt"})
        else:
            torch.save({KEY: composed}, path)

    write_together(
        {
            output / (SAFETENSORS_WEIGHTS_NAME if safe_serialization else WEIGHTS_NAME): save,
            output / CONFIG_NAME: lambda path: path.write_text(text, encoding="utf-8"),
        },
        obsolete=[output / (WEIGHTS_NAME if safe_serialization else SAFETENSORS_WEIGHTS_NAME)],
    )
