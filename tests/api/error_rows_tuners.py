"""Rows of error_table.py: the methods that adapt layers, beside LoRA and LoHa."""

from collections.abc import Callable
from typing import Any

import torch
from error_tools import Row, quietly
from torch import nn

STEPS = {"total_step": 10, "init_r": 4, "target_r": 2}
VALUE = "the value of an option is wrong, not its type"


def _made(library: Any, tools: Any, name: str, **options: Any) -> Any:
    config = getattr(library, f"{name}Config")
    return quietly(lambda: library.get_peft_model(tools.llama(), config(**{"target_modules": ["q_proj"], **options})))


def _ia3(library: Any, tools: Any, **options: Any) -> Any:
    return _made(library, tools, "IA3", **{"feedforward_modules": [], **options})


def _adalora(library: Any, tools: Any, **options: Any) -> Any:
    return _made(library, tools, "AdaLora", **{**STEPS, **options})


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Embedding(4, 6))


def _on(name: str, target: str, **options: Any) -> Callable[[Any, Any], Any]:
    """The method on a layer of _plain."""

    def call(library: Any, tools: Any) -> Any:
        config = getattr(library, f"{name}Config")
        return library.get_peft_model(_plain(), config(target_modules=[target], **options))

    return call


def _nan(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    return model.merge_adapter(safe_merge=True)


IA3 = [
    Row(
        "(IA)^3's feedforward_modules that are no targets",
        lambda l, t: l.IA3Config(target_modules=["a"], feedforward_modules=["b"]),
        ValueError,
        "should be a subset",
        ("feedforward_modules must be a part of target_modules", "['b']"),
    ),
    Row(
        "(IA)^3 on a model of unknown type, without targets",
        lambda l, t: l.get_peft_model(_plain(), l.IA3Config(feedforward_modules=[])),
        (ValueError, AttributeError, KeyError),
        "",
        ("target_modules must be given",),
        ValueError,
        why="it is said what is missing",
    ),
    Row(
        "(IA)^3 on a model of unknown type, without feedforward_modules",
        lambda l, t: l.get_peft_model(_plain(), l.IA3Config(target_modules=["0"])),
        (ValueError, KeyError),
        "",
        ("feedforward_modules must be given", "[] means none"),
        ValueError,
        why="it is said what is missing",
    ),
    Row(
        "(IA)^3 on an embedding",
        _on("IA3", "1", feedforward_modules=[]),
        ValueError,
        "is not supported",
        ("IA3 cannot adapt 1, a Embedding", "torch.nn.Linear", "Name other target_modules"),
    ),
    Row(
        "(IA)^3's fan_in_fan_out on linear layers",
        lambda l, t: l.get_peft_model(
            _plain(), l.IA3Config(target_modules=["0"], feedforward_modules=[], fan_in_fan_out=True)
        ),
        UserWarning,
        "fan_in_fan_out is set to True but",
        ("fan_in_fan_out is set to False",),
    ),
    Row(
        "unmerging (IA)^3",
        lambda l, t: _unmerged(_ia3(l, t)),
        UserWarning,
        "Unmerge result can be inaccurate",
        ("divided by the vectors", "up to rounding"),
    ),
    Row("merging a broken (IA)^3", lambda l, t: _nan(_ia3(l, t)), ValueError, "NaNs detected", ("inf or NaN",)),
    Row(
        "a weighted sum of (IA)^3 with an unknown adapter",
        lambda l, t: _ia3(l, t).base_model.add_weighted_adapter(["zzz"], [1.0], "b"),
        ValueError,
        "does not exist",
        ("adapter 'zzz' does not exist",),
    ),
    Row(
        "(IA)^3 adapters that scale different sides of a layer",
        lambda l, t: _ia3(l, t).add_adapter(
            "b", l.IA3Config(target_modules=["q_proj"], feedforward_modules=["q_proj"])
        ),
        None,
        says=("all adapters of a layer must scale the same",),
        ours=ValueError,
        why="peft scales the side of the first adapter, whatever the other's config says",
    ),
]


def _unmerged(model: Any) -> None:
    quietly(model.merge_adapter)
    model.unmerge_adapter()


VERA = [
    Row(
        "VeRA of rank -1",
        lambda l, t: _made(l, t, "Vera", r=-1),
        RuntimeError,
        "negative dimension",
        ("r must be a positive integer, got -1",),
        ValueError,
        why="the value of an option is wrong",
    ),
    Row(
        "VeRA on an embedding",
        _on("Vera", "1", r=2),
        (ValueError, TypeError),
        "",
        ("Vera cannot adapt 1, a Embedding",),
        ValueError,
        why=VALUE,
    ),
    Row(
        "VeRA whose projections are not saved",
        lambda l, t: l.VeraConfig(save_projection=False),
        UserWarning,
        "Specified to not save vera_A and vera_B",
        ("save_projection=False", "drawn again from projection_prng_key"),
    ),
    Row(
        "a second VeRA adapter with another seed",
        lambda l, t: _made(l, t, "Vera", r=2).add_adapter(
            "b", l.VeraConfig(r=2, target_modules=["q_proj"], projection_prng_key=1)
        ),
        ValueError,
        "PRNG initialisation key must be the same",
        ("projection_prng_key must be the same for all VeRA adapters", "0", "got 1"),
    ),
    Row(
        "a second VeRA adapter that saves no projections",
        lambda l, t: _made(l, t, "Vera", r=2).add_adapter(
            "b", quietly(lambda: l.VeraConfig(r=2, target_modules=["q_proj"], save_projection=False))
        ),
        ValueError,
        "must be saved for all adapters or none",
        ("save_projection must be the same",),
    ),
    Row(
        "a second VeRA adapter of a higher rank",
        lambda l, t: _made(l, t, "Vera", r=2).add_adapter("b", l.VeraConfig(r=4, target_modules=["q_proj"])),
        ValueError,
        "or greater is required",
        silent=True,
        why="it gets projections of its own from the same seed",
    ),
    Row(
        "VeRA's layers_pattern without layers_to_transform",
        lambda l, t: l.VeraConfig(layers_pattern="h"),
        ValueError,
        "must also be specified",
        ("layers_pattern needs layers_to_transform",),
    ),
    Row(
        "VeRA's bias of another name",
        lambda l, t: _made(l, t, "Vera", r=2, bias="lora_only_"),
        (ValueError, NotImplementedError),
        "",
        ("bias must be one of 'none', 'all', 'vera_only', got 'lora_only_'",),
        ValueError,
        why="the value of an option is wrong",
    ),
    Row("merging a broken VeRA", lambda l, t: _nan(_made(l, t, "Vera", r=2)), ValueError, "NaNs", ("inf or NaN",)),
]
ADALORA = [
    Row(
        "AdaLoRA without total_step",
        lambda l, t: l.AdaLoraConfig(),
        ValueError,
        "does not work when `total_step` is None",
        ("AdaLoRA needs total_step", "got None"),
    ),
    Row(
        "AdaLoRA without a step in which ranks are reduced",
        lambda l, t: l.AdaLoraConfig(total_step=10, tinit=5, tfinal=5),
        ValueError,
        "budgeting phase",
        ("no step is left", "Decrease tinit or tfinal, or increase total_step"),
    ),
    Row(
        "AdaLoRA with r",
        lambda l, t: l.AdaLoraConfig(total_step=10, r=4),
        UserWarning,
        "`r` is not used",
        ("AdaLoRA does not use r: init_r",),
    ),
    Row(
        "AdaLoRA with use_rslora",
        lambda l, t: l.AdaLoraConfig(total_step=10, use_rslora=True),
        None,
        says=("AdaLoRA does not use use_rslora",),
        ours=UserWarning,
        why="peft leaves the option out of account without a word",
    ),
    Row(
        "AdaLoRA with DoRA",
        lambda l, t: l.AdaLoraConfig(total_step=10, use_dora=True),
        ValueError,
        "does not support DoRA",
        ("AdaLoRA has no DoRA",),
    ),
    Row(
        "AdaLoRA's negative orth_reg_weight",
        lambda l, t: l.AdaLoraConfig(total_step=10, orth_reg_weight=-1),
        ValueError,
        "greater than or equal to 0",
        ("orth_reg_weight must be a finite number from 0 on, got -1",),
    ),
    Row(
        "AdaLoRA's beta of 1",
        lambda l, t: _adalora(l, t, beta1=1.0),
        AssertionError,
        "",
        ("beta1 must be between 0 and 1, got 1.0",),
        ValueError,
        why="the value of an option is wrong",
    ),
    Row(
        "a second AdaLoRA adapter that is trained",
        lambda l, t: _adalora(l, t).add_adapter("b", l.AdaLoraConfig(**STEPS, target_modules=["q_proj"])),
        ValueError,
        "supports only 1 trainable adapter",
        ("AdaLoRA trains one adapter of a model, and 'default' is trained", "inference_mode=True"),
    ),
    Row(
        "allotting AdaLoRA's ranks without gradients",
        lambda l, t: _adalora(l, t).base_model.update_and_allocate(0),
        TypeError,
        "NoneType",
        ("update_and_allocate needs gradients", "after loss.backward()"),
        ValueError,
        why="what is wrong is when it is called",
    ),
    Row(
        "combining AdaLoRA adapters",
        lambda l, t: _adalora(l, t).base_model.add_weighted_adapter(["default"], [1.0], "b"),
        TypeError,
        "does not support add_weighted_adapter",
        ("cannot be combined", "use LoRA"),
    ),
    Row(
        "AdaLoRA on an embedding",
        _on("AdaLora", "1", **STEPS),
        ValueError,
        "is not supported",
        ("AdaLora cannot adapt 1, a Embedding",),
    ),
    Row("merging a broken AdaLoRA", lambda l, t: _nan(_adalora(l, t)), ValueError, "NaNs", ("inf or NaN",)),
]
LOKR = [
    Row(
        "LoKr of rank 0",
        lambda l, t: _made(l, t, "LoKr", r=0),
        ValueError,
        "should be a positive integer",
        ("r must be a positive integer, got 0",),
    ),
    Row(
        "LoKr on an embedding",
        _on("LoKr", "1"),
        (ValueError, TypeError),
        "not supported",
        ("LoKr cannot adapt 1, a Embedding", "Conv2d and Conv1d"),
        ValueError,
        why=VALUE,
    ),
    Row(
        "LoKr's decompose_factor of 0",
        lambda l, t: _made(l, t, "LoKr", decompose_factor=0),
        None,
        says=("decompose_factor must be a positive integer, or -1",),
        ours=ValueError,
        why="peft takes it for 1",
    ),
    Row(
        "LoKr's init_weights of another name",
        lambda l, t: _made(l, t, "LoKr", init_weights="lycori"),
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
    model = _made(library, tools, "LNTuning", target_modules=["norm"])
    model.add_adapter("b", library.LNTuningConfig(target_modules=["norm"]))
    if active:
        model.base_model.set_adapter(["default", "b"])
    return model


ROWS = [
    Row(
        "rows of a token that the embedding lacks",
        lambda l, t: _made(l, t, "TrainableTokens", target_modules=None, token_indices=[10**6]),
        IndexError,
        "out of",
        ("ids of trained tokens must be from 0 to", "resize_token_embeddings"),
        ValueError,
        why="the value of an option is wrong",
    ),
    Row(
        "rows of no token",
        lambda l, t: _made(l, t, "TrainableTokens", target_modules=None)(torch.ones(1, 2, dtype=torch.long)),
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
    model = _made(library, tools, "TrainableTokens", target_modules=None, token_indices=[1, 3])
    model.add_adapter("b", library.TrainableTokensConfig(token_indices=[3]))
    model.base_model.set_adapter(["default", "b"])
    return model


SHIRA = [
    Row(
        "SHiRA of rank 0",
        lambda l, t: _made(l, t, "Shira", r=0),
        ValueError,
        "should be a positive integer",
        ("r must be a positive integer, got 0",),
    ),
    Row(
        "SHiRA of a rank that is too large",
        _on("Shira", "0", r=4),
        ValueError,
        "more shira params than the total number",
        ("SHiRA of rank 4 trains 48 entries", "has 36: take a smaller r"),
    ),
    Row(
        "SHiRA on an embedding",
        _on("Shira", "1", r=1),
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
        lambda l, t: _nan(_made(l, t, "Shira", r=2)),
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


TUNERS = [*IA3, *VERA, *ADALORA, *LOKR, *LN, *ROWS, *SHIRA]
