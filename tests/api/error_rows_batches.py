"""Rows of error_table.py: adapter_names, batches of several adapters."""

import torch
from error_tools import Row
from torch import nn


def _ids() -> torch.Tensor:
    return torch.ones(2, 3, dtype=torch.long)


def _merged(library, tools):
    model = tools.model(library).eval()
    model.merge_adapter()
    return model(_ids(), adapter_names=["default", "__base__"])


def _attention(library, tools):
    base = nn.Sequential(nn.MultiheadAttention(8, 2))
    model = library.get_peft_model(base, library.LoraConfig(target_modules=["0"], r=2)).eval()
    return model(torch.zeros(1, 1, 8), adapter_names=["default"])


class _Twice(nn.Module):
    """Gives its own layer another number of samples than it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(torch.cat([x, x]))


def _flattened(library, tools):
    model = library.get_peft_model(_Twice(), library.LoraConfig(target_modules=["lin"], r=2)).eval()
    return model(torch.zeros(2, 4), adapter_names=["default", "__base__"])


BATCHES = [
    Row(
        "adapter_names in training mode",
        lambda l, t: t.model(l).train()(_ids(), adapter_names=["default"] * 2),
        ValueError,
        "training mode",
        ("cannot be given in training mode", "model.eval()", "enable_mixed_batch_training"),
    ),
    Row(
        "adapter_names of an adapter that is not there",
        lambda l, t: t.model(l).eval()(_ids(), adapter_names=["default", "other"]),
        ValueError,
        "non-existing adapter(s): other",
        ("do not exist: other", "there are 'default', '__base__'"),
    ),
    Row(
        "too few adapter_names",
        lambda l, t: t.model(l).eval()(_ids(), adapter_names=["default"]),
        ValueError,
        "Length of `adapter_names`",
        ("one name a sample", "got 1 for an input of 2"),
    ),
    Row(
        "adapter_names while adapters are merged",
        _merged,
        ValueError,
        "unmerge_adapter",
        ("are merged", "unmerge_adapter"),
    ),
    Row(
        "adapter_names with DoRA",
        lambda l, t: t.model(l, use_dora=True).eval()(_ids(), adapter_names=["default", "__base__"]),
        ValueError,
        "DoRA is enabled",
        silent=True,
        why="ours runs the adapters of such layers one after the other",
    ),
    Row(
        "adapter_names for an attention's weights",
        _attention,
        TypeError,
        "does not support mixed adapter batches",
        ("cannot have a batch of several adapters", "torch reads its weight"),
    ),
    Row(
        "a layer that gets another number of samples",
        _flattened,
        ValueError,
        "Length of `adapter_names`",
        ("got 2 for an input of 4", "flattens samples and tokens"),
    ),
    Row(
        "adapter_names as one text",
        lambda l, t: t.model(l).eval()(_ids(), adapter_names="default"),
        ValueError,
        "non-existing adapter(s)",
        ("must be a list with a name for each sample", "got 'default'"),
        TypeError,
        why="the type of an argument is wrong",
    ),
]
