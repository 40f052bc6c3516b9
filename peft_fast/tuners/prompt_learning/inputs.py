"""What a task's forward gives to the base model: its inputs, with the active adapter's prompt in them."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .encoder import BasePromptEncoder


def check_task_ids(encoder: BasePromptEncoder, task_ids: Any) -> None:
    if task_ids is not None and not encoder.tied_to_tasks:
        raise ValueError("task_ids are for MULTITASK_PROMPT_TUNING, and the active adapter is not: leave them out")


def call_with_prompt(
    tuner: Any, inputs: dict[str, Any], task_ids: Tensor | None, *, labels: bool = False, token_types: bool = False
) -> Any:
    """The base model's answer to `inputs`, the keyword arguments of a forward, after the prompt.

    labels: they are [batch, tokens], so that the prompt gets some too, which no loss counts. token_types: the model
    takes token_type_ids, and the prompt is of type 0; for others they are left out with a warning.
    Outputs by token are the prompt's first, unless the prompt is a prefix.
    """
    encoder, config = tuner.encoder, tuner.config
    check_task_ids(encoder, task_ids)
    batch, n = batch_size(inputs), config.num_virtual_tokens
    inputs = {**inputs, **_extended(inputs, "attention_mask", n, 1)}
    _adjust_positions(inputs, encoder, n)
    if not token_types and inputs.pop("token_type_ids", None) is not None:
        warnings.warn("token_type_ids are left out: the model's prompts have none", stacklevel=5)
    if encoder.is_prefix:
        return _call_with_prefix(tuner, inputs, batch)
    inputs |= _extended(inputs, "token_type_ids", n, 0)
    if labels:
        inputs |= _extended(inputs, "labels", n, -100)
    inputs["inputs_embeds"] = before_embeddings(tuner, inputs, task_ids)
    return encoder.call(tuner.model, inputs, config)


def call_encoder_decoder(tuner: Any, inputs: dict[str, Any], task_ids: Tensor | None) -> Any:
    """The same for models with an encoder and a decoder.

    A prefix is before the decoder's tokens, prompts are before the encoder's, and those of several tasks before both.
    """
    encoder, config = tuner.encoder, tuner.config
    check_task_ids(encoder, task_ids)
    batch, n = batch_size(inputs), config.num_virtual_tokens
    inputs = dict(inputs)
    _adjust_positions(inputs, encoder, n)
    if inputs.pop("token_type_ids", None) is not None:
        warnings.warn("token_type_ids are left out: the model's prompts have none", stacklevel=5)
    if encoder.is_prefix:
        return _call_with_prefix(tuner, inputs | _extended(inputs, "decoder_attention_mask", n, 1), batch)
    inputs |= _extended(inputs, "attention_mask", n, 1)
    of_decoder = encoder.tied_to_tasks and config.num_transformer_submodules == 2
    prompts = tuner.prompt(batch, task_ids)
    inputs["inputs_embeds"] = _joined(prompts[:, :n], _embeddings(tuner, inputs, "inputs_embeds", "input_ids"))
    if of_decoder:
        inputs |= _extended(inputs, "decoder_attention_mask", n, 1)
        if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
            inputs["decoder_input_ids"] = _shifted(tuner, inputs.get("labels"))
        own = _embeddings(tuner, inputs, "decoder_inputs_embeds", "decoder_input_ids")
        inputs["decoder_inputs_embeds"] = _joined(prompts[:, n:], own)
        inputs |= _extended(inputs, "labels", n, -100)
    return encoder.call(tuner.model, inputs, config)


def batch_size(inputs: Mapping[str, Any]) -> int:
    given = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if given is None:
        raise ValueError("a forward needs input_ids or inputs_embeds, got neither")
    return given.shape[0]


def before_embeddings(tuner: Any, inputs: dict[str, Any], task_ids: Tensor | None, tokens: int | None = None) -> Tensor:
    """The prompt, its first `tokens` or all, and then the input, [batch, tokens, size]; takes the input out of
    `inputs`."""
    embeddings = _embeddings(tuner, inputs, "inputs_embeds", "input_ids")
    return _joined(tuner.prompt(embeddings.shape[0], task_ids)[:, :tokens], embeddings)


def extended(values: Tensor, n: int, value: int) -> Tensor:
    """[batch, tokens] -> [batch, n + tokens]"""
    return torch.cat([values.new_full((values.shape[0], n), value), values], dim=1)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """What a decoder is given to predict `input_ids` [batch, tokens]: the start token and all but the last, with the
    padding token for labels of -100."""
    if pad_token_id is None:
        raise ValueError("shift_tokens_right needs pad_token_id, the token for labels of -100, got None")
    shifted = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def refuse_checkpointing(base_model: Any, now: bool) -> None:
    """`now`: only where it is in effect, which it is in training."""
    checkpointed = [module for module in base_model.modules() if getattr(module, "gradient_checkpointing", False)]
    if any(module.training for module in checkpointed) if now else checkpointed:
        raise ValueError(
            "CARTRIDGE or PREFIX_TUNING does not work with gradient checkpointing, under which models take no keys and "
            "values of tokens before: call gradient_checkpointing_disable(), or learn another kind of prompt"
        )


def takes_cache(base_model: Any, backbone: Any) -> bool:
    return any("past_key_values" in inspect.signature(m.forward).parameters for m in (base_model, backbone))


def _extended(inputs: Mapping[str, Any], name: str, n: int, value: int) -> dict[str, Tensor]:
    given = inputs.get(name)
    return {} if given is None else {name: extended(given, n, value)}


def _adjust_positions(inputs: dict[str, Any], encoder: BasePromptEncoder, n: int) -> None:
    if inputs.get("position_ids") is None:
        return
    if encoder.is_prefix:
        inputs["position_ids"] = inputs["position_ids"] + n
    else:
        warnings.warn("position_ids are left out: with a prompt before the input they are others", stacklevel=6)
        del inputs["position_ids"]


def _embeddings(tuner: Any, inputs: dict[str, Any], embeddings: str, ids: str) -> Tensor:
    own, tokens = inputs.pop(embeddings, None), inputs.pop(ids, None)
    return tuner.word_embeddings(tokens) if own is None else own


def _joined(prompts: Tensor, embeddings: Tensor) -> Tensor:
    return torch.cat([prompts.to(embeddings), embeddings], dim=1)


def _shifted(tuner: Any, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("the decoder needs decoder_input_ids, decoder_inputs_embeds or labels, got none of them")
    config = tuner.model.config
    return shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)


def _call_with_prefix(tuner: Any, inputs: dict[str, Any], batch: int) -> Any:
    """Whether the model has used the prefix is seen from what it put after it."""
    if inputs.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values cannot be given where the prompt is a prefix, which takes their place: use generate"
        )
    refuse_checkpointing(tuner.model, now=True)
    cache = tuner.prompt(batch, None)
    n = cache.get_seq_length()
    output = tuner.model(**inputs, past_key_values=cache)
    if cache.get_seq_length() <= n:
        raise ValueError(
            f"{type(tuner.model).__name__} did not use the prefix, past_key_values, that it was given: learn another "
            "kind of prompt"
        )
    return output
