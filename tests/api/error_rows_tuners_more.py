"""Rows of error_table.py: LoKr, LayerNorm tuning, rows of tokens, SHiRA."""

from typing import Any

import torch
from error_rows_tuners import VALUE, made, nan, on
from error_tools import Row, quietly

LOKR = [
    Row(
        "LoKr of rank 0",
        lambda l, t: made(l, t, "LoKr", r=0),
        ValueError,
        "should be a positive integer",
        ("r must be a positive integer, got 0",),
    ),
    Row(
        "LoKr on an embedding",
        on("LoKr", "1"),
        (ValueError, TypeError),
        "not supported",
        ("LoKr cannot adapt 1, a Embedding", "Conv2d and Conv1d"),
        ValueError,
        why=VALUE,
    ),
    Row(
        "LoKr's decompose_factor of 0",
        lambda l, t: made(l, t, "LoKr", decompose_factor=0),
        None,
        says=("decompose_factor must be a positive integer, or -1",),
        ours=ValueError,
        why="peft takes it for 1",
    ),
    Row(
        "LoKr's init_weights of another name",
        lambda l, t: made(l, t, "LoKr", init_weights="lycori"),
        None,
        says=("init_weights must be one of True, False, 'lycoris', got 'lycori'",),
        ours=ValueError,
        why="peft takes it for True",
    ),
]
LN = [
    Row(
        "two active adapters of LayerNorm tuning",
        lambda l, t: _two_norms(l, t)(input_ids=torch.ones(1, 2, dtype=torch.long)),
        ValueError,
        "does not allow inference with more than one adapter",
        ("adapters ['default', 'b'] each have a copy of the same module", "take one of them"),
    ),
    Row(
        "merging two adapters of LayerNorm tuning",
        lambda l, t: _two_norms(l, t, active=False).merge_adapter(["default", "b"]),
        ValueError,
        "does not allow merging more than one adapter",
        ("each have a copy of the same module",),
    ),
]


def _two_norms(library: Any, tools: Any, active: bool = True) -> Any:
    model = made(library, tools, "LNTuning", target_modules=["norm"])
    model.add_adapter("b", library.LNTuningConfig(target_modules=["norm"]))
    if active:
        model.base_model.set_adapter(["default", "b"])
    return model


ROWS = [
    Row(
        "rows of a token that the embedding lacks",
        lambda l, t: made(l, t, "TrainableTokens", target_modules=None, token_indices=[10**6]),
        IndexError,
        "out of",
        ("ids of trained tokens must be from 0 to", "resize_token_embeddings"),
        ValueError,
        why="the value of an option is wrong",
    ),
    Row(
        "rows of no token",
        lambda l, t: made(l, t, "TrainableTokens", target_modules=None)(torch.ones(1, 2, dtype=torch.long)),
        (IndexError, RuntimeError),
        "",
        ("token_indices must be one or more ids of tokens",),
        ValueError,
        why="peft makes the adapter, and its forward fails",
    ),
    Row(
        "two adapters with rows of the same token",
        lambda l, t: _two_rows(l, t)(input_ids=torch.ones(1, 2, dtype=torch.long)),
        ValueError,
        "would result in undefined merging behavior",
        ("adapters 'default' and 'b' both have a row of their own for token 3",),
    ),
]


def _two_rows(library: Any, tools: Any) -> Any:
    model = made(library, tools, "TrainableTokens", target_modules=None, token_indices=[1, 3])
    model.add_adapter("b", library.TrainableTokensConfig(token_indices=[3]))
    model.base_model.set_adapter(["default", "b"])
    return model


SHIRA = [
    Row(
        "SHiRA of rank 0",
        lambda l, t: made(l, t, "Shira", r=0),
        ValueError,
        "should be a positive integer",
        ("r must be a positive integer, got 0",),
    ),
    Row(
        "SHiRA of a rank that is too large",
        on("Shira", "0", r=4),
        ValueError,
        "more shira params than the total number",
        ("SHiRA of rank 4 trains 48 entries", "has 36: take a smaller r"),
    ),
    Row(
        "SHiRA on an embedding",
        on("Shira", "1", r=1),
        (ValueError, TypeError),
        "not supported",
        ("Shira cannot adapt 1, a Embedding",),
        ValueError,
        why=VALUE,
    ),
    Row(
        "SHiRA with a mask of one's own",
        lambda l, t: l.ShiraConfig(mask_type="mine"),
        UserWarning,
        "is not recognized",
        ("mask_type 'mine'", "set config.mask_fn"),
    ),
    Row(
        "SHiRA with a mask of another size",
        lambda l, t: _with_mask(l, t, lambda base, r, **_: torch.ones(2, 2)),
        ValueError,
        "are not the same dimensions",
        ("mask_fn must give a tensor (64, 64) with 256 ones", "(2, 2) with 4"),
    ),
    Row(
        "SHiRA with no mask",
        lambda l, t: _with_mask(l, t, None)(torch.ones(1, 2, dtype=torch.long)),
        KeyError,
        "default",
        ("has no places for its values", "config.mask_fn was not set"),
        ValueError,
        why="it is said what is missing",
    ),
    Row(
        "SHiRA around another method in a mixed model",
        lambda l, t: _nested(l, t),
        ValueError,
        "does not support nested base layers",
        silent=True,
        why="it works",
    ),
    Row(
        "merging a broken SHiRA",
        lambda l, t: nan(made(l, t, "Shira", r=2)),
        ValueError,
        "NaNs",
        ("inf or NaN",),
    ),
]


def _with_mask(library: Any, tools: Any, function: Any) -> Any:
    config = quietly(lambda: library.ShiraConfig(r=2, target_modules=["q_proj"], mask_type="mine"))
    config.mask_fn = function
    return library.get_peft_model(tools.llama(), config)


def _nested(library: Any, tools: Any) -> None:
    model = library.get_peft_model(tools.llama(), library.LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("b", library.ShiraConfig(r=2, target_modules=["q_proj"]))


MORE = [*LOKR, *LN, *ROWS, *SHIRA]
