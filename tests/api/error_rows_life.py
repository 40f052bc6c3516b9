"""Rows of error_table.py: the life of adapters in a model."""

import importlib
from typing import Any

from error_tools import Row, broken, quietly

LIFE = [
    Row(
        "adapters of two types",
        lambda l, t: t.model(l).add_adapter("other", l.PeftConfig(peft_type="IA3")),
        ValueError,
        "different peft types",
        ("must be of one type", "it has", "LORA", "got IA3"),
    ),
    Row(
        "two copies of one module active at a time",
        lambda l, t: both_active(t.model(l, modules_to_save=["lm_head"]), l),
        ValueError,
        "Only one adapter can be set at a time",
        ("each have a copy of the same module in modules_to_save", "take one of them"),
    ),
    Row(
        "update_signature for another method",
        lambda l, t: helpers_of(l).update_signature(t.model(l), method="train"),
        ValueError,
        "is not supported",
        ("method must be", "got 'train'"),
    ),
    Row(
        "an adapter of that name is there",
        lambda l, t: t.model(l).add_adapter("default", l.LoraConfig()),
        ValueError,
        "already exists",
        ("adapter 'default' exists already", "choose another name"),
    ),
    Row(
        "two adapters with biases",
        lambda l, t: t.model(l, bias="all").add_adapter("other", l.LoraConfig(bias="all")),
        ValueError,
        "only 1 adapter with",
        ("trains biases of the base model already", "use bias='none'"),
    ),
    Row(
        "deleting an adapter that is not there",
        lambda l, t: t.model(l).delete_adapter("x"),
        ValueError,
        "does not exist",
        ("adapter 'x' does not exist", "there are ['default']"),
    ),
    Row(
        "deleting a merged adapter",
        lambda l, t: merged(t.model(l)).delete_adapter("default"),
        ValueError,
        "merged",
        ("adapter 'default' is merged", "call unmerge_adapter first"),
    ),
    Row(
        "deleting the active adapter",
        lambda l, t: t.two(l).delete_adapter("default"),
        UserWarning,
        "was active which is",
        ("active adapter 'default' was deleted", "'other' is active now"),
    ),
    Row(
        "setting an adapter that is not there",
        lambda l, t: t.model(l).set_adapter("x"),
        ValueError,
        "not found",
        ("adapter 'x' does not exist", "there are ['default']"),
    ),
    Row(
        "setting an adapter of a merged model",
        lambda l, t: merged(t.two(l)).set_adapter("other"),
        UserWarning,
        "Unmerging",
        ("merged adapters are unmerged before",),
    ),
    Row(
        "merging twice",
        lambda l, t: merged(t.model(l)).merge_adapter(),
        UserWarning,
        "already merged, nothing to do",
        ("merged already", "nothing to merge"),
    ),
    Row(
        "merging one more",
        lambda l, t: merged(t.two(l)).merge_adapter(["other"]),
        UserWarning,
        "additionally merging",
        ("merged already",),
    ),
    Row(
        "unmerging what is not merged",
        lambda l, t: t.model(l).unmerge_adapter(),
        UserWarning,
        "Already unmerged",
        ("no adapter is merged",),
    ),
    Row(
        "merging adapters given as a string",
        lambda l, t: t.model(l).merge_adapter(adapter_names="default"),
        TypeError,
        "should be a list",
        ("adapter_names must be a list of names", "got the string 'default'"),
    ),
    Row(
        "a safe merge of NaN",
        lambda l, t: broken(t.model(l)).merge_adapter(safe_merge=True),
        ValueError,
        "NaNs detected",
        ("q_proj", "inf or NaN", "the adapter is broken"),
    ),
    Row(
        "merging a bias into a layer without one",
        lambda l, t: quietly(lambda: t.bare(l, lora_bias=True)).merge_adapter(safe_merge=True),
        RuntimeError,
        "Impossible to merge",
        ("the base layer has none to merge it into",),
        ValueError,
        why="found before anything is merged, as bad input is",
    ),
    Row(
        "merging into 4 bits",
        lambda l, t: t.model(l, t.llama_4bit()).merge_adapter(),
        UserWarning,
        "rounding",
        ("merging into a k-bit weight rounds", "outputs change"),
    ),
    Row(
        "disabling an adapter that trains biases",
        lambda l, t: disabled(t.model(l, bias="all")),
        UserWarning,
        "bias",
        ("adapter 'default' trained biases of the base model", "stay as trained"),
    ),
    Row(
        "the status of a model without adapters",
        lambda l, t: l.get_layer_status(t.llama()),
        ValueError,
        "No adapter layers",
        ("no adapter layers",),
    ),
    Row(
        "rescaling by what is no number",
        lambda l, t: rescaled(l, t.model(l), "2"),
        TypeError,
        "multiplier",
        ("multiplier must be a number", "got '2'"),
    ),
    Row(
        "rescaling a model without LoRA",
        lambda l, t: rescaled(l, t.llama(), 2.0),
        ValueError,
        "only supported",
        ("is for models with LoRA layers", "LlamaForCausalLM has none"),
    ),
    Row(
        "a prompt of a model without prompt learning",
        lambda l, t: t.model(l).get_prompt(1),
        AttributeError,
        "prompt_encoder",
        ("get_prompt is for prompt learning", "no attribute 'prompt_encoder'"),
    ),
]


def merged(model: Any) -> Any:
    quietly(model.merge_adapter)
    return model


def disabled(model: Any) -> None:
    with model.disable_adapter():
        pass


def helpers_of(library: Any) -> Any:
    return importlib.import_module(f"{library.__name__}.helpers")


def both_active(model: Any, library: Any) -> None:
    model.add_adapter("other", library.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])


def rescaled(library: Any, model: Any, multiplier: Any) -> None:
    with helpers_of(library).rescale_adapter_scale(model, multiplier):
        pass
