"""Generating after a prompt: transformers' loop, whose first step gets the prompt and whose others find it cached."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from .inputs import batch_size, before_embeddings, check_task_ids, extended


def generating(tuner: Any, prepare: Any) -> Any:
    """The base model with `prepare` as its prepare_inputs_for_generation: another object with the same modules, so that
    the base model itself is not touched."""
    twin = copy.copy(tuner.model)
    twin.prepare_inputs_for_generation = prepare
    return twin


def prepare_decoder_inputs(tuner: Any, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
    """The inputs of one step of a decoder: those of the base model, and the prompt as long as nothing is cached."""
    encoder, config = tuner.encoder, tuner.config
    check_task_ids(encoder, task_ids)
    first = _starts(kwargs, lambda: DynamicCache(config=tuner.model.config))
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if mask is not None:
        kwargs["attention_mask"] = extended(mask, config.num_virtual_tokens, 1)
    inputs = tuner.model.prepare_inputs_for_generation(*args, **kwargs)
    if inputs.pop("token_type_ids", None) is not None:
        warnings.warn("token_type_ids are left out: the model's prompts have none", stacklevel=5)
    if encoder.is_prefix:
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + config.num_virtual_tokens
        if first:
            inputs["past_key_values"] = tuner.prompt(batch_size(inputs), None, cache)
        return inputs
    inputs.pop("position_ids", None)  # the model counts them, the prompt among them
    if first:
        inputs["inputs_embeds"] = before_embeddings(tuner, inputs, task_ids)
    return inputs


def _starts(kwargs: dict[str, Any], new_cache: Callable[[], Cache]) -> bool:
    """Whether this step needs the prompt: nothing is cached, or nothing is to be. There some models return a cache
    nevertheless, with the whole input of the last step in it, and it is left out. A cache of fixed length, which has no
    room for the prompt, is replaced by one that grows."""
    if kwargs.get("use_cache") is False:
        kwargs.pop("past_key_values", None)
    cache = kwargs.get("past_key_values")
    if cache is None or cache.get_seq_length():
        return cache is None
    if cache.is_compileable:
        kwargs["past_key_values"] = new_cache()
    return True


def encoder_inputs(tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `generate` of a model with an encoder is given: the prompt before the encoder's input, unless it is a prefix
    (see prepare_encoder_decoder_inputs)."""
    kwargs = dict(kwargs)
    for name in ("token_type_ids", "position_ids"):
        if kwargs.pop(name, None) is not None:
            warnings.warn(f"{name} are left out: with a prompt they are others", stacklevel=4)
    task_ids = kwargs.pop("task_ids", None)
    check_task_ids(tuner.encoder, task_ids)
    if tuner.encoder.is_prefix:
        return args, kwargs
    if kwargs.pop("encoder_outputs", None) is not None:
        warnings.warn("encoder_outputs are left out: they are of an input without the prompt", stacklevel=4)
    n, given = tuner.config.num_virtual_tokens, list(args)
    inputs = {"input_ids": given.pop(0)} if given else {}
    inputs |= {name: kwargs.pop(name) for name in ("input_ids", "inputs_embeds") if name in kwargs}
    if "inputs" in kwargs:
        inputs["input_ids"] = kwargs.pop("inputs")
    if not inputs:
        raise ValueError("input_ids must be given to generate: the prompt is put before them")
    kwargs["inputs_embeds"] = before_embeddings(tuner, inputs, task_ids, tokens=n)
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = extended(kwargs["attention_mask"], n, 1)
    return (None, *given) if given else (), kwargs


def prepare_encoder_decoder_inputs(tuner: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The inputs of one step of a decoder whose prefix is learned; other prompts are the encoder's."""
    if not tuner.encoder.is_prefix:
        return tuner.model.prepare_inputs_for_generation(*args, **kwargs)
    first = _starts(kwargs, lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()))
    cache, mask = kwargs.get("past_key_values"), kwargs.get("decoder_attention_mask")
    if mask is not None:
        kwargs["decoder_attention_mask"] = extended(mask, tuner.config.num_virtual_tokens, 1)
    inputs = tuner.model.prepare_inputs_for_generation(*args, **kwargs)
    if first:
        inputs["past_key_values"] = tuner.prompt(len(inputs["decoder_input_ids"]), None, cache)
    return inputs
