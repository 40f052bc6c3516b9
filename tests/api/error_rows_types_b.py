"""Rows of error_table.py: methods that rotate, research methods, and prompts in the attention."""

from typing import Any

from error_tools import Row, quietly
from torch import nn

WRONG_VALUE = "the value of an option is wrong, not its type"


def _plain(library: Any, method: str, base: Any = None, **options: Any) -> Any:
    config = quietly(lambda: getattr(library, f"{method}Config")(**{"target_modules": ["0"], **options}))
    return library.get_peft_model(nn.Sequential(nn.Linear(6, 6)) if base is None else base, config)


def _rows_of_rotation(method: str) -> list[Row]:
    return [
        Row(
            f"scaling an adapter of {method}",
            lambda l, t: quietly(lambda: _plain(l, method)).base_model.model[0].scale_layer(2.0),
            UserWarning,
            "not supported",
            ("a rotation has no scale: it stays 1",),
        ),
        Row(
            f"unscaling an adapter of {method}",
            lambda l, t: quietly(lambda: _plain(l, method)).base_model.model[0].unscale_layer(),
            UserWarning,
            "not supported",
            ("a rotation has no scale: it stays 1",),
        ),
    ]


def _rows_of_layers(method: str, kind: str = "ReLU") -> list[Row]:
    return [
        Row(
            f"{method} on layers that it cannot adapt",
            lambda l, t: _plain(l, method, nn.Sequential(nn.ReLU())),
            (TypeError, ValueError),
            "not supported",
            (f"{method} cannot adapt 0, a {kind}", "Name other target_modules"),
            ValueError,
            why=WRONG_VALUE,
        ),
        Row(
            f"{method} merged twice",
            lambda l, t: _merged(quietly(lambda: _plain(l, method))).merge_adapter(),
            UserWarning,
            "lready",
            ("merged already",),
        ),
        Row(
            f"{method} unmerged where nothing is merged",
            lambda l, t: quietly(lambda: _plain(l, method)).base_model.model[0].unmerge(),
            UserWarning,
            "Already unmerged",
            ("nothing to undo",),
        ),
        Row(
            f"merging a broken adapter of {method}",
            lambda l, t: _broken(quietly(lambda: _plain(l, method))).merge_adapter(safe_merge=True),
            ValueError,
            "NaNs detected in the merged weights",
            ("inf or NaN", "nothing was merged"),
        ),
        Row(
            f"{method}'s layers_pattern without layers_to_transform",
            lambda l, t: getattr(l, f"{method}Config")(layers_pattern="layers"),
            ValueError,
            "must also be specified",
            ("layers_pattern needs layers_to_transform",),
        ),
    ]


def _merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def _broken(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    return model


def _loaded(library: Any, tools: Any, method: str, change: Any, **options: Any) -> Any:
    """An adapter whose config in the file was changed, loaded."""
    import json

    quietly(lambda: _plain(library, method, **options)).save_pretrained(tools.folder)
    path = tools.folder / "adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return library.PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 6)), tools.folder)


OFT = [
    Row(
        "OFT with r and oft_block_size",
        lambda l, t: l.OFTConfig(r=2, oft_block_size=4),
        ValueError,
        "You can only specify either",
        ("one of r, the number of blocks, and oft_block_size must be given", "got r=2 and oft_block_size=4"),
    ),
    Row(
        "OFT without r and oft_block_size",
        lambda l, t: l.OFTConfig(oft_block_size=0),
        ValueError,
        "must be non-zero",
        ("one of r, the number of blocks, and oft_block_size must be given", "got r=0 and oft_block_size=0"),
    ),
    Row(
        "OFT with blocks that do not fit",
        lambda l, t: _plain(l, "OFT", oft_block_size=4),
        UserWarning,
        "Adjusted `oft_block_size` to (3)",
        ("oft_block_size=4 does not divide the 6 features: 3 is taken",),
    ),
    Row(
        "OFT with a number of blocks that does not fit",
        lambda l, t: _plain(l, "OFT", oft_block_size=0, r=4),
        UserWarning,
        "Adjusted `r` to (3)",
        ("r=4 does not divide the 6 features: 3 is taken",),
    ),
    Row(
        "OFT's fan_in_fan_out for linear layers",
        lambda l, t: _plain(l, "OFT", oft_block_size=3, fan_in_fan_out=True),
        UserWarning,
        "Setting fan_in_fan_out to False",
        ("do not keep their weight [in, out]",),
    ),
    Row(
        "OFT on a dilated convolution",
        lambda l, t: _plain(l, "OFT", nn.Sequential(nn.Conv2d(2, 2, 2, dilation=2)), oft_block_size=4),
        ValueError,
        "dilation > 1 is not supported",
        silent=True,
        why="it works",
    ),
    Row(
        "OFT whose config is of a peft before 0.14",
        lambda l, t: _loaded(
            l, t, "OFT", lambda c: {k: v for k, v in c.items() if k != "oft_block_size"}, r=2, oft_block_size=0
        ),
        ValueError,
        "OFT has been updated since PEFT 0.14.0",
        ("an OFT config without oft_block_size is of a peft before 0.14", "train the adapter again"),
    ),
    Row(
        "OFT whose config is of a peft before 0.18",
        lambda l, t: _loaded(l, t, "OFT", lambda c: {**c, "peft_version": "0.17.0"}, r=2, oft_block_size=0),
        UserWarning,
        "has been slightly changed",
        ("of a peft before 0.18", "Train it again"),
    ),
    Row(
        "OFT's module_dropout",
        lambda l, t: l.OFTConfig(module_dropout=0.1),
        None,
        says=("module_dropout has no effect: peft 0.21.2 applies it to no OFT layer",),
        ours=UserWarning,
        why="peft says nothing and does nothing",
    ),
    *_rows_of_layers("OFT"),
    *_rows_of_rotation("OFT"),
]


def _prompted(library: Any, base: Any, **options: Any) -> Any:
    return library.get_peft_model(
        base, library.AdaptionPromptConfig(**{"adapter_len": 2, "adapter_layers": 1, **options})
    )


ADAPTION_PROMPTS = [
    Row(
        "adaption prompts for a model of another type",
        lambda l, t: _prompted(l, _other_model()),
        ValueError,
        "Unsupported model type for adaption prompt",
        ("adaption prompts are for models of the types llama, mistral, gpt2, got 'opt'",),
    ),
    Row(
        "adaption prompts in more layers than there are",
        lambda l, t: _prompted(l, t.llama(), adapter_layers=9),
        ValueError,
        "more adapter layers '9' than the model has '2'",
        ("adapter_layers is 9, and the model has 2 modules",),
    ),
    Row(
        "an adaption prompt's name twice",
        lambda l, t: _prompted(l, t.llama()).add_adapter(
            "default", l.AdaptionPromptConfig(adapter_len=2, adapter_layers=1)
        ),
        ValueError,
        "already exists",
        ("'default' exists already",),
    ),
    Row(
        "an adaption prompt that is not there",
        lambda l, t: _prompted(l, t.llama()).set_adapter("zzz"),
        ValueError,
        "not found",
        ("adapter 'zzz' does not exist",),
    ),
    Row(
        "merging an adaption prompt",
        lambda l, t: _prompted(l, t.llama()).merge_and_unload(),
        AttributeError,
        "merge_and_unload",
        ("cannot be merged", "keep the adapter"),
        ValueError,
        why="the method is there, and says why not",
    ),
    Row(
        "the status of adaption prompts",
        lambda l, t: _prompted(l, t.llama()).get_layer_status(),
        TypeError,
        "adaption prompt are not supported",
        silent=True,
        why="its layers have a status as others do",
    ),
]


def _other_model() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "ffn_dim": 8, "num_hidden_layers": 1}
    return OPTForCausalLM(OPTConfig(vocab_size=20, **sizes))


TYPES_B = [*OFT, *ADAPTION_PROMPTS]
