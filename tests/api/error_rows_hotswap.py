"""Rows of error_table.py: hot-swapping."""

import importlib

import torch
from error_tools import Row
from torch import nn


def of(library):
    return importlib.import_module(f"{library.__name__}.utils.hotswap")


def swapped(library, tools, old=None, **new):
    """An adapter on q_proj and v_proj, unless `old` says otherwise, with a saved one in its place."""
    folder = str(tools.saved(library, **new))
    return of(library).hotswap_adapter(old or tools.model(library), folder, "default")


def prepared(library, tools, model=None, **options):
    model = tools.model(library) if model is None else model
    return of(library).prepare_model_for_compiled_hotswap(model, **options)


def merged(library, tools):
    model = tools.model(library)
    model.merge_adapter()
    return model


HOTSWAP = [
    Row(
        "swapping in an adapter of more layers",
        lambda l, t: swapped(l, t, target_modules=["q_proj", "o_proj"]),
        RuntimeError,
        "unexpected keys found",
        ("adapts no new layers", "o_proj", "Load that adapter with load_adapter"),
    ),
    Row(
        "swapping in an adapter of another kind of scale",
        lambda l, t: swapped(l, t, use_rslora=True),
        ValueError,
        "Configs are incompatible",
        ("must have the same use_rslora", "got False and True"),
    ),
    Row(
        "swapping in an adapter of another model",
        lambda l, t: _of_another_model(l, t),
        None,
        "",
        ("is (4, 64) in the model", "got (4, 32)"),
        ValueError,
        why="peft puts the values into a corner of the old ones, without a word",
    ),
    Row(
        "swapping a merged adapter",
        lambda l, t: swapped(l, t, merged(l, t)),
        ValueError,
        "currently merged",
        ("is merged into", "call unmerge_adapter first"),
    ),
    Row(
        "preparing for swaps once the model is compiled",
        lambda l, t: prepared(l, t, torch.compile(t.model(l))),
        ValueError,
        "*before* compiling",
        ("is to be called before the model is compiled", "call it first"),
    ),
    Row(
        "preparing a compiled model all the same",
        lambda l, t: prepared(l, t, torch.compile(t.model(l)), check_compiled="warn"),
        UserWarning,
        "already compiled",
        ("is to be called before the model is compiled", "compiled again"),
    ),
    Row(
        "preparing in a way that is none",
        lambda l, t: prepared(l, t, torch.compile(t.model(l)), check_compiled="no"),
        ValueError,
        "should be one of",
        ("check_compiled must be 'error', 'warn' or 'ignore'", "got 'no'"),
    ),
    Row(
        "preparing for a rank that is too small",
        lambda l, t: prepared(l, t, target_rank=2),
        ValueError,
        "original rank is larger",
        ("target_rank must be the largest rank of all adapters", "has 4", "got 2"),
    ),
    Row(
        "preparing a model without adapters",
        lambda l, t: prepared(l, t, t.llama(), target_rank=2),
        ValueError,
        "No adapter layers found",
        ("the model has no LoRA layers", "load the first adapter"),
    ),
    Row(
        "preparing a convolution for a rank that its groups do not divide",
        lambda l, t: prepared(l, t, _grouped(l), target_rank=5),
        ValueError,
        "not divisible by",
        ("must be divisible by the 2 groups", "got 5"),
    ),
    Row(
        "swapping an adapter that is not there",
        lambda l, t: of(l).hotswap_adapter(t.model(l), str(t.saved(l)), "zzz"),
        RuntimeError,
        "unexpected keys found",
        ("adapter 'zzz' does not exist",),
        ValueError,
        why="the name is wrong, the adapter is not",
    ),
]


def _of_another_model(library, tools):
    folder = tools.folder
    tools.model(library, tools.llama(hidden_size=32)).save_pretrained(folder)
    return of(library).hotswap_adapter(tools.model(library), str(folder), "default")


def _grouped(library):
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    return library.get_peft_model(base, library.LoraConfig(r=4, target_modules=["0"]))
