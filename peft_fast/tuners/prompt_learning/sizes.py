"""The sizes of the base model that a prompt needs, where its config leaves them out."""

from typing import Any

from torch import nn

NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}
OF_DECODER = {
    "num_layers": ("num_decoder_layers", "decoder_layers"),
    "num_attention_heads": ("decoder_attention_heads",),
}


def fill_sizes(config: Any, model: nn.Module, word_embeddings: Any, is_prefix: bool) -> None:
    """Set what is None in `config` from the base model's own config.

    A prompt is as wide as `word_embeddings` are, which need not be as wide as the model.

    Prefixes are as large as the keys and values of a layer are, which grouped queries share: for these, token_dim and
    num_attention_heads are those of keys and values, whatever was given; where layers differ, the largest layer's.
    Raises ValueError for a size that the model does not say, or that it could not use.
    """
    of_model = text_config(model)
    width = word_embeddings.weight.shape[1]
    if config.token_dim is None and not is_prefix:
        config.token_dim = width
    in_decoder = is_prefix and getattr(of_model, "is_encoder_decoder", False)
    heads_were_given = config.num_attention_heads is not None
    for option, names in NAMES.items():
        if getattr(config, option) is None:
            names = OF_DECODER.get(option, ()) + names if in_decoder else names
            setattr(config, option, _first(of_model, names, option))
    if is_prefix:
        shapes = key_value_shapes(of_model)
        dim = getattr(of_model, "d_kv", None)  # T5's heads need not be its width divided by their number
        if shapes:
            config.num_attention_heads, head_dim = max(shapes, key=lambda shape: shape[1])
            config.token_dim = config.num_attention_heads * head_dim
        elif getattr(of_model, "num_key_value_heads", None) is not None:
            head_dim = getattr(of_model, "head_dim", None) or config.token_dim // config.num_attention_heads
            config.num_attention_heads = of_model.num_key_value_heads
            config.token_dim = config.num_attention_heads * head_dim
        elif dim is not None and not heads_were_given:
            config.token_dim = config.num_attention_heads * dim
        else:
            _check_head(config, of_model, dim)
    if not is_prefix and config.token_dim != width:
        raise ValueError(f"token_dim must be {width}, the size of the model's word embeddings, got {config.token_dim}")
    if is_prefix and config.num_layers != (layers := _number_of_layers(of_model, in_decoder, config.num_layers)):
        raise ValueError(f"num_layers must be {layers}, the number of the model's layers, got {config.num_layers}")
    if getattr(config, "encoder_hidden_size", 1) is None:
        config.encoder_hidden_size = config.token_dim


def _check_head(config: Any, of_model: Any, dim: int | None) -> None:
    """Sizes that were given, by a file for one, may be another model's; how many heads share a key is not looked at."""
    sizes = [[getattr(of_model, name, None) for name in NAMES[key]] for key in ("token_dim", "num_attention_heads")]
    width, heads = (next((size for size in found if size), None) for found in sizes)
    dim = dim or (width // heads if width and heads else None)
    if dim and config.token_dim != config.num_attention_heads * dim:
        raise ValueError(
            f"token_dim / num_attention_heads must be {dim}, the size of the model's attention heads, got "
            f"{config.token_dim} and {config.num_attention_heads}: leave them out, and they are found out"
        )


def text_config(model: Any) -> Any:
    """The config of the language model: of one with pictures, the part for text."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def key_value_shapes(config: Any) -> list[tuple[int, int]] | None:
    """(heads, size of a head) of every layer, for models whose layers differ (Gemma 4); None for others."""
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return None
    per_layer = getattr(config, "per_layer_config", None)
    if per_layer is not None:
        layers = [per_layer[index] for index in range(len(kinds))]
        return [(layer.num_key_value_heads, layer.head_dim) for layer in layers]
    wide = getattr(config, "global_head_dim", None)  # transformers before 5.15
    if wide is None:
        return None
    narrow = (config.num_key_value_heads, config.head_dim)
    heads = getattr(config, "num_global_key_value_heads", None) or config.num_key_value_heads
    return [narrow if kind == "sliding_attention" else (heads, wide) for kind in kinds]


def _number_of_layers(of_model: Any, in_decoder: bool, given: int) -> int:
    names = OF_DECODER["num_layers"] + NAMES["num_layers"] if in_decoder else NAMES["num_layers"]
    found = (getattr(of_model, name, None) for name in names)
    return next((number for number in found if number is not None), given)


def _first(config: Any, names: tuple[str, ...], option: str) -> int:
    for name in names:
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if value is not None:
            return value
    raise ValueError(
        f"{option} must be given: the base model's config has none of {', '.join(names)}, which would say it"
    )
