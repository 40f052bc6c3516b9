"""Rows of error_table.py: LoHa, and models of mixed methods."""

from typing import Any

from error_tools import Row
from torch import nn


def _mixed(library: Any, tools: Any) -> Any:
    model = library.get_peft_model(tools.llama(), library.LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", library.LoHaConfig(r=2, target_modules=["q_proj"]))
    return model


def _loha(library: Any, tools: Any, **options: Any) -> Any:
    return library.get_peft_model(tools.llama(), library.LoHaConfig(**{"target_modules": ["q_proj"], **options}))


METHODS = [
    Row(
        "LoHa of rank 0",
        lambda l, t: _loha(l, t, r=0),
        ValueError,
        "should be a positive integer",
        ("r must be a positive integer, got 0",),
    ),
    Row(
        "LoHa's layers_pattern without layers_to_transform",
        lambda l, t: l.LoHaConfig(layers_pattern="layers"),
        ValueError,
        "must also be specified",
        ("layers_pattern needs layers_to_transform",),
    ),
    Row(
        "LoHa on an embedding",
        lambda l, t: _loha(l, t, target_modules=["embed_tokens"]),
        TypeError,
        "not supported",
        ("LoHa cannot adapt model.embed_tokens, a Embedding", "Name other target_modules"),
        ValueError,
        why="the value of an option is wrong, not its type",
    ),
    Row(
        "LoHa on layers that are not there",
        lambda l, t: _loha(l, t, target_modules=["zzz"]),
        ValueError,
        "not found in the base model",
        ("zzz",),
    ),
    Row(
        "LoHa added to LoRA",
        lambda l, t: t.model(l).add_adapter("b", l.LoHaConfig(target_modules=["q_proj"])),
        ValueError,
        "Cannot combine adapters with different peft types",
        ("must be of one type: it has LORA, got",),
    ),
    Row(
        "a mixed model of a method that cannot be mixed",
        lambda l, t: l.get_peft_model(
            t.llama(), l.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), mixed=True
        ),
        ValueError,
        "is not compatible with the `PeftMixedModel`",
        ("a mixed model can have adapters of the methods LORA, LOHA", "got", "PROMPT_TUNING"),
    ),
    Row(
        "a mixed model's unknown adapter",
        lambda l, t: _mixed(l, t).set_adapter(["default", "zzz"]),
        ValueError,
        "not found, available adapters",
        ("adapter 'zzz' does not exist: there are ['default', 'other']",),
    ),
    Row(
        "a mixed model's adapter twice",
        lambda l, t: _mixed(l, t).add_adapter("other", l.LoHaConfig(target_modules=["q_proj"])),
        ValueError,
        "already exists",
        ("'other' exists already",),
    ),
    Row(
        "deleting a mixed model's unknown adapter",
        lambda l, t: _mixed(l, t).delete_adapter("zzz"),
        ValueError,
        "not found, available adapters",
        ("adapter 'zzz' does not exist",),
    ),
    Row(
        "saving a mixed model",
        lambda l, t: _mixed(l, t).save_pretrained(t.folder),
        NotImplementedError,
        "Saving is not supported",
        ("is not saved as a whole", "save each adapter"),
    ),
    Row(
        "a mixed model's card",
        lambda l, t: _mixed(l, t).create_or_update_model_card(t.folder),
        NotImplementedError,
        "Model card creation is not supported",
        ("has no model card",),
    ),
    Row(
        "the status of a mixed model",
        lambda l, t: _mixed(l, t).get_layer_status(),
        TypeError,
        "not supported",
        silent=True,
        why="its layers have a status as others do",
    ),
    Row(
        "LoRA around a convolution with LoHa",
        lambda l, t: _convolutions(l),
        AttributeError,
        "groups",
        silent=True,
        why="it works",
    ),
]


def _convolutions(library: Any) -> None:
    options = {"target_modules": ["0"]}
    base = nn.Sequential(nn.Conv2d(4, 4, 1))
    model = library.get_peft_model(base, library.LoHaConfig(**options), mixed=True)
    model.add_adapter("b", library.LoraConfig(**options))
