"""Rows of error_table.py: methods that rotate, and research methods."""

from typing import Any

from error_tools import Row, quietly
from torch import nn

SIZES: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 3}, "FourierFT": {"n_frequency": 5}, "RandLora": {"r": 2},
}  # fmt: skip
WRONG_VALUE = "the value of an option is wrong, not its type"


def _plain(library: Any, method: str, base: Any = None, **options: Any) -> Any:
    config = quietly(lambda: getattr(library, f"{method}Config")(**{"target_modules": ["0"], **options}))
    return library.get_peft_model(nn.Sequential(nn.Linear(6, 6)) if base is None else base, config)


def _made(library: Any, method: str) -> Any:
    return quietly(lambda: _plain(library, method, **SIZES.get(method, {})))


def _rows_of_rotation(method: str) -> list[Row]:
    return [
        Row(
            f"scaling an adapter of {method}",
            lambda l, t: _made(l, method).base_model.model[0].scale_layer(2.0),
            UserWarning,
            "not supported",
            ("a rotation has no scale: it stays 1",),
        ),
        Row(
            f"unscaling an adapter of {method}",
            lambda l, t: _made(l, method).base_model.model[0].unscale_layer(),
            UserWarning,
            "not supported",
            ("a rotation has no scale: it stays 1",),
        ),
    ]


def _rows_of_layers(method: str, kind: str = "ReLU") -> list[Row]:
    targets = {"target_modules": ["0", "1"], **SIZES.get(method, {})}
    return [
        Row(
            f"{method} on layers that it cannot adapt",
            lambda l, t: _plain(l, method, nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), **targets),
            (TypeError, ValueError),
            "not supported",
            (f"{method} cannot adapt 0, a {kind}", "Name other target_modules"),
            ValueError,
            why=WRONG_VALUE,
        ),
        Row(
            f"{method} merged twice",
            lambda l, t: _merged(_made(l, method)).merge_adapter(),
            UserWarning,
            "lready",
            ("merged already",),
        ),
        Row(
            f"{method} unmerged where nothing is merged",
            lambda l, t: _made(l, method).base_model.model[0].unmerge(),
            UserWarning,
            "Already unmerged",
            ("nothing to undo",),
        ),
        Row(
            f"merging a broken adapter of {method}",
            lambda l, t: _broken(_made(l, method)).merge_adapter(safe_merge=True),
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


HRA = [
    Row(
        "HRA of rank 0",
        lambda l, t: _plain(l, "HRA", r=0),
        ValueError,
        "should be a positive integer",
        ("r must be a positive integer, got 0",),
    ),
    Row(
        "HRA of an odd rank",
        lambda l, t: _plain(l, "HRA", r=3),
        UserWarning,
        "can NOT be performed when r is odd",
        ("r=3 is odd, so that the adapter changes the model from the start",),
    ),
    Row(
        "HRA on a convolution with groups",
        lambda l, t: _plain(l, "HRA", nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))),
        NotImplementedError,
        "does not support Conv2d layers with groups > 1",
        ("HRA cannot adapt a convolution with groups=2", "Name other target_modules"),
        ValueError,
        why=WRONG_VALUE,
    ),
    Row(
        "HRA's layers_to_transform with an expression",
        lambda l, t: l.HRAConfig(target_modules="x", layers_to_transform=[1]),
        ValueError,
        "cannot be used when `target_modules` is a str",
        ("layers_to_transform needs target_modules as a list, got the string 'x'",),
    ),
    Row(
        "HRA's layers_pattern with an expression",
        lambda l, t: l.HRAConfig(target_modules="x", layers_pattern="h"),
        ValueError,
        "cannot be used when `target_modules` is a str",
        ("layers_pattern needs layers_to_transform",),
    ),
    *_rows_of_layers("HRA"),
    *_rows_of_rotation("HRA"),
]


def _boft(library: Any, **options: Any) -> Any:
    """peft warns, too, that it has not got its extension."""
    return _plain(library, "BOFT", **{"boft_block_size": 3, **options})


BOFT = [
    Row(
        "BOFT with boft_block_size and boft_block_num",
        lambda l, t: l.BOFTConfig(boft_block_num=2),
        ValueError,
        "You can only specify either",
        ("one of boft_block_size and boft_block_num", "got boft_block_size=4 and boft_block_num=2"),
    ),
    Row(
        "BOFT without boft_block_size and boft_block_num",
        lambda l, t: l.BOFTConfig(boft_block_size=0),
        ValueError,
        "must be non-zero",
        ("one of boft_block_size and boft_block_num", "got boft_block_size=0 and boft_block_num=0"),
    ),
    Row(
        "BOFT with blocks that do not fit",
        lambda l, t: _boft(l, boft_block_size=4),
        ValueError,
        "must be divisible by boft_block_size",
        ("boft_block_size must divide the 6 features of the layer, got 4",),
    ),
    Row(
        "BOFT with a number of blocks that does not fit",
        lambda l, t: _boft(l, boft_block_size=0, boft_block_num=4),
        ValueError,
        "must be divisible by boft_block_num",
        ("boft_block_num must divide the 6 features of the layer, got 4",),
    ),
    Row(
        "BOFT with more butterfly factors than fit",
        lambda l, t: _boft(l, boft_n_butterfly_factor=2),
        UserWarning,
        "Setting boft_n_butterfly_factor to 1",
        ("boft_n_butterfly_factor=2 needs blocks of an even size", "got 2 blocks of 3"),
        ValueError,
        why="there are as many factors as the config says, on every device",
    ),
    Row(
        "BOFT with 0 butterfly factors",
        lambda l, t: _boft(l, boft_n_butterfly_factor=0),
        UserWarning,
        "Setting boft_n_butterfly_factor to 1",
        ("boft_n_butterfly_factor must be a positive integer, got 0",),
        ValueError,
        why="there are as many factors as the config says, on every device",
    ),
    Row(
        "BOFT without CUDA",
        lambda l, t: _boft(l),
        UserWarning,
        "Failed to load the CUDA extension",
        silent=True,
        why="no extension is compiled",
    ),
    Row(
        "BOFT on a convolution with groups",
        lambda l, t: _plain(l, "BOFT", nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))),
        NotImplementedError,
        "does not support Conv2d layers with groups > 1",
        ("BOFT cannot adapt a convolution with groups=2", "Name other target_modules"),
        ValueError,
        why=WRONG_VALUE,
    ),
    Row(
        "BOFT's fan_in_fan_out for linear layers",
        lambda l, t: _boft(l, fan_in_fan_out=True),
        UserWarning,
        "Setting fan_in_fan_out to False",
        ("do not keep their weight [in, out]",),
    ),
    *_rows_of_layers("BOFT"),
    *_rows_of_rotation("BOFT"),
]


def _randlora(library: Any, **options: Any) -> Any:
    return _plain(library, "RandLora", **{"r": 2, **options})


def _added(library: Any, **options: Any) -> None:
    model = quietly(lambda: _randlora(library))
    config = quietly(lambda: library.RandLoraConfig(**{"r": 2, "target_modules": ["0"], **options}))
    model.add_adapter("other", config)


RESEARCH = [
    Row(
        "RandLora's bases not saved",
        lambda l, t: l.RandLoraConfig(save_projection=False),
        UserWarning,
        "Specified to not save basis_A and basis_B",
        ("save_projection=False", "drawn again when the adapter is loaded"),
    ),
    Row(
        "RandLora adapters with several seeds",
        lambda l, t: _added(l, projection_prng_key=3),
        ValueError,
        "must be the same for all adapters",
        ("projection_prng_key must be the same for all adapters of a model: it is 0", "got 3"),
    ),
    Row(
        "RandLora adapters of which some save their bases",
        lambda l, t: _added(l, save_projection=False),
        ValueError,
        "must be saved for all adapters or none",
        ("save_projection must be the same for all adapters of a model: it is True", "got False"),
    ),
    Row(
        "RandLora's fan_in_fan_out for linear layers",
        lambda l, t: _randlora(l, fan_in_fan_out=True),
        UserWarning,
        "Setting fan_in_fan_out to False",
        ("do not keep their weight [in, out]",),
    ),
    Row(
        "FourierFT without frequencies",
        lambda l, t: _plain(l, "FourierFT", n_frequency=0),
        ValueError,
        "should be a positive integer",
        ("n_frequency must be a positive integer, got 0",),
    ),
    Row(
        "FourierFT with more frequencies than the weight has numbers",
        lambda l, t: _plain(l, "FourierFT", n_frequency=37),
        ValueError,
        "should be less than or equal to the product",
        ("n_frequency must be at most 36 for a layer of 6 x 6, got 37",),
    ),
    Row(
        "FourierFT's fan_in_fan_out for linear layers",
        lambda l, t: _plain(l, "FourierFT", n_frequency=3, fan_in_fan_out=True),
        UserWarning,
        "Setting fan_in_fan_out to False",
        ("do not keep their weight [in, out]",),
    ),
    Row(
        "FourierFT's layers_to_transform with an expression",
        lambda l, t: l.FourierFTConfig(target_modules="x", layers_to_transform=[1]),
        ValueError,
        "cannot be used when `target_modules` is a str",
        ("layers_to_transform needs target_modules as a list, got the string 'x'",),
    ),
    *_rows_of_layers("RandLora")[:-1],
    Row(
        "RandLora's layers_pattern without layers_to_transform",
        lambda l, t: l.RandLoraConfig(layers_pattern="layers"),
        None,
        says=("layers_pattern needs layers_to_transform",),
        ours=ValueError,
        why="it would have no effect",
    ),
    *_rows_of_layers("FourierFT"),
]

TYPES_B = [*OFT, *HRA, *BOFT, *RESEARCH]
