"""Rows of error_table.py: LoRA's initialisations, conversions, combinations and hot-swapping."""

import torch
from error_tools import Row
from torch import nn

BUILT = "built here for layers of few bits too"
SVD = {"init_lora_weights": "pissa"}


def loftq(library, **options):
    return library.LoraConfig(target_modules=["q_proj"], init_lora_weights="loftq", **options)


def with_nan(base):
    base.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    return base


STARTS = [
    Row(
        "an unknown start",
        lambda l, t: t.model(l, init_lora_weights="zeros"),
        ValueError,
        "Unknown initialization",
        ("init_lora_weights must be True, False, 'gaussian' or one of", "got 'zeros'"),
    ),
    Row(
        "PiSSA without its number of iterations",
        lambda l, t: t.model(l, init_lora_weights="pissa_niter"),
        ValueError,
        "should be 'pissa' or 'pissa_niter_",
        ("init_lora_weights must be", "pissa_niter_<0 to 999>", "got 'pissa_niter'"),
    ),
    Row(
        "LoftQ without its config",
        lambda l, t: l.LoraConfig(init_lora_weights="loftq"),
        (ValueError, ImportError),
        "",
        ("init_lora_weights='loftq' needs loftq_config", "LoftQConfig(loftq_bits=4)"),
        ValueError,
        why="peft asks for scipy first, which it does not use",
    ),
    Row(
        "a LoftQ config without its start",
        lambda l, t: l.LoraConfig(loftq_config={"loftq_bits": 4}),
        UserWarning,
        "ignored",
        ("loftq_config is ignored",),
    ),
    Row(
        "PiSSA of layers of 4 bits",
        lambda l, t: t.model(l, t.llama_4bit(), **SVD),
        TypeError,
        "initialize PiSSA under float32",
        silent=True,
        why=BUILT,
    ),
    Row(
        "an odd rank for the orthogonal start",
        lambda l, t: t.model(l, r=3, init_lora_weights="orthogonal"),
        ValueError,
        "requires the LoRA rank to be even",
        ("'orthogonal' needs an even rank", "got 3"),
    ),
    Row(
        "PiSSA of a convolution",
        lambda l, t: l.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3)), l.LoraConfig(target_modules=["0"], **SVD)),
        ValueError,
        "Unknown initialization",
        ("'pissa' is for linear layers", "Conv2d", "leave it out of the targets"),
    ),
    Row(
        "PiSSA of an embedding",
        lambda l, t: t.model(l, target_modules=["embed_tokens"], **SVD),
        None,
        "",
        ("'pissa' is for linear layers", "Embedding", "leave it out of the targets"),
        ValueError,
        why="peft starts embeddings plainly, without a word",
    ),
    Row(
        "PiSSA of more ranks than the weight has",
        lambda l, t: t.model(l, r=33, target_modules=["v_proj"], **SVD)(input_ids=torch.ones(1, 3, dtype=torch.long)),
        None,
        "",
        ("needs a rank of at most 32", "got 33", "rank_pattern"),
        ValueError,
        why="peft gives the adapter fewer ranks than its config says",
    ),
    Row(
        "OLoRA of a weight with NaN",
        lambda l, t: t.model(l, with_nan(t.llama()), init_lora_weights="olora"),
        None,
        "",
        ("'olora' decomposes the base weight", "inf or NaN"),
        ValueError,
        why="peft goes on with an adapter and a weight of NaN",
    ),
    Row(
        "PiSSA with a scale of zero",
        lambda l, t: t.model(l, lora_alpha=0, **SVD),
        None,
        "",
        ("needs a scale above 0", "see lora_alpha"),
        ValueError,
        why="peft goes on with an adapter of infinities",
    ),
    Row(
        "LoftQ in three bits",
        lambda l, t: l.get_peft_model(t.llama(), loftq(l, loftq_config=l.LoftQConfig(loftq_bits=3))),
        (ValueError, ImportError),
        "",
        ("loftq_bits must be 4 or 8", "got 3"),
        ValueError,
        why="peft asks for scipy first",
    ),
    Row(
        "LoftQ's replacement in a dense model",
        lambda l, t: l.replace_lora_weights_loftq(t.model(l), str(t.folder)),
        (ValueError, FileNotFoundError),
        "",
        ("no k-bit linear layer has an adapter",),
        ValueError,
        why="peft looks for the files first",
    ),
    Row(
        "LoftQ's replacement without the files",
        lambda l, t: l.replace_lora_weights_loftq(t.model(l, t.llama_4bit()), f"{t.folder}/model.safetensors"),
        OSError,
        "Could not find file",
        ("neither model.safetensors nor", "model_path must be the folder"),
    ),
    Row(
        "rank-stabilised patterns with a start that cannot be converted then",
        lambda l, t: l.LoraConfig(use_rslora=True, alpha_pattern={"q": 2}, **SVD),
        UserWarning,
        "path_initial_model_for_weight_conversion",
        ("use_rslora", "cannot be saved as plain LoRA"),
    ),
]


def converted(model, folder, initial="initial", **options):
    model.save_pretrained(folder / "initial")
    return model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(folder / initial), **options)


CONVERSIONS = [
    Row(
        "conversion with rank-stabilised patterns",
        lambda l, t: converted(t.model(l, use_rslora=True, rank_pattern={"q_proj": 2}), t.folder),
        ValueError,
        "is not supported when",
        ("cannot be used with use_rslora and rank_pattern or alpha_pattern", "leave it out"),
    ),
    Row(
        "conversion from a folder that is not there",
        lambda l, t: converted(t.model(l, **SVD), t.folder, "nowhere"),
        (ValueError, OSError),
        "",
        ("must be the folder of the adapter as it was before training", "nowhere"),
        ValueError,
        why="peft writes a config to it and then fails",
    ),
    Row(
        "conversion from an adapter of another rank",
        lambda l, t: _from_another(l, t),
        None,
        "",
        ("the initial adapter must be this adapter before training", "is (4, 64)", "has (2, 64)"),
        ValueError,
        why="peft writes a file that does not fit its config",
    ),
    Row(
        "conversion of a start that is not in the base weights",
        lambda l, t: converted(t.model(l, init_lora_weights=False), t.folder),
        None,
        "",
        ("start as nothing or as a part of the base weight", "is False", "leave it out"),
        ValueError,
        why="what peft writes lacks what the adapter started with",
    ),
]


def _from_another(library, tools):
    tools.model(library, r=2).save_pretrained(tools.folder / "initial")
    model = tools.model(library, **SVD)
    return model.save_pretrained(tools.folder, path_initial_model_for_weight_conversion=f"{tools.folder}/initial")


def combine(library, tools, kind="svd", adapters=("default", "other"), weights=(1.0, 1.0), model=None, **options):
    """Of adapters of ranks 4 and 2, unless there is a `model`."""
    model = tools.two(library) if model is None else model
    return model.add_weighted_adapter(list(adapters), list(weights), "new", combination_type=kind, **options)


def both(library, tools, **options):
    """A model with two adapters of one rank and of the same options."""
    model = tools.model(library, **options)
    model.add_adapter("other", library.LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj"], **options}))
    return model


SILENTLY = "peft makes an adapter that is something else, without a word"

COMBINATIONS = [
    Row(
        "combining an adapter that is not there",
        lambda l, t: combine(l, t, adapters=("default", "zzz")),
        ValueError,
        "does not exist",
        ("adapter 'zzz' does not exist", "there are"),
    ),
    Row(
        "combining in a way that is none",
        lambda l, t: combine(l, t, "mean"),
        ValueError,
        "Invalid combination_type",
        ("combination_type must be one of", "got 'mean'"),
    ),
    Row(
        "adding up adapters of different ranks",
        lambda l, t: combine(l, t, "linear"),
        ValueError,
        "must have the same r",
        ("needs adapters of the same rank", "'other': 2", "use 'svd' or 'cat'"),
    ),
    Row(
        "combining nothing",
        lambda l, t: combine(l, t, adapters=(), weights=()),
        ValueError,
        "",
        ("adapters must name one adapter at least",),
    ),
    Row(
        "fewer weights than adapters",
        lambda l, t: combine(l, t, weights=(1.0,)),
        None,
        "",
        ("a weight for each adapter", "got 2 and 1"),
        ValueError,
        why=SILENTLY,
    ),
    Row(
        "TIES without a density",
        lambda l, t: combine(l, t, "ties", model=both(l, t)),
        TypeError,
        "not supported between instances",
        ("'ties' needs density", "got None"),
        ValueError,
        why="an option is missing, not of the wrong type",
    ),
    Row(
        "TIES with a negative density",
        lambda l, t: combine(l, t, "ties", model=both(l, t), density=-0.5),
        ValueError,
        "should be >= 0",
        ("needs density, the share that is kept", "got -0.5"),
    ),
    Row(
        "TIES with a density of 1",
        lambda l, t: combine(l, t, "ties", model=both(l, t), density=1.0),
        UserWarning,
        "no pruning",
        ("from 1 on nothing is pruned",),
    ),
    Row(
        "TIES with another way of finding the majority",
        lambda l, t: combine(l, t, "ties", model=both(l, t), density=0.5, majority_sign_method="mean"),
        RuntimeError,
        "Unimplemented mask method",
        ("majority_sign_method must be 'total' or 'frequency'", "got 'mean'"),
        ValueError,
        why="the value of an option is wrong",
    ),
    Row(
        "combining whole modules",
        lambda l, t: combine(l, t, model=both(l, t, modules_to_save=["lm_head"])),
        ValueError,
        "Cannot add weighted adapters",
        ("whole modules cannot be combined", "lm_head", "leave out all of them but one"),
    ),
    Row(
        "combining adapters of a list and of an expression of targets",
        lambda l, t: combine(l, t, model=_of_two_kinds(l, t)),
        ValueError,
        "should follow the same target modules type",
        ("target_modules must be lists for all of them, or expressions",),
    ),
    Row(
        "combining into a name that is taken",
        lambda l, t: t.two(l).add_weighted_adapter(["default"], [1.0], "other"),
        None,
        "",
        ("'other' exists already and stays as it is",),
        UserWarning,
        why="peft does nothing, without a word",
    ),
    Row(
        "combining DoRA adapters",
        lambda l, t: combine(l, t, model=both(l, t, use_dora=True)),
        None,
        "",
        ("does not combine use_dora", "leave it out"),
        ValueError,
        why=SILENTLY,
    ),
    Row(
        "combining tokens' rows",
        lambda l, t: combine(l, t, adapters=["default"], weights=[1.0], model=_with_tokens(l, t)),
        None,
        "",
        ("does not combine trainable_token_indices", "leave it out"),
        ValueError,
        why=SILENTLY,
    ),
]


def _of_two_kinds(library, tools):
    model = tools.model(library)
    model.add_adapter("other", library.LoraConfig(r=4, target_modules=".*q_proj"))
    return model


def _with_tokens(library, tools):
    return tools.model(library, trainable_token_indices=[1, 2])
