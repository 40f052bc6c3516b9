"""Rows of error_table.py: layers that LoRA adapts only in part, and adapters that are named or put in wrongly."""

from typing import Any

from error_tools import Row, quietly
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

NOT_THE_WEIGHT = "the adapter would never run: in peft it trains nothing, without a word"
NO_SUCH_NAME = "peft does nothing, without a word"


class Alone(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def around(library: Any, layer: nn.Module, **options: Any) -> Any:
    config = library.LoraConfig(**{"r": 4, "target_modules": ["layer"], **options})
    return library.get_peft_model(Alone(layer), config)


def grouped(library: Any, groups: int = 2, **options: Any) -> Any:
    return around(library, nn.Conv2d(4, 4, 3, groups=groups), **options)


def attention(library: Any, options: dict[str, Any] | None = None, **config: Any) -> Any:
    return around(library, nn.MultiheadAttention(8, 2, **(options or {})), **config)


def mamba(library: Any, tools: Any) -> Any:
    base = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=8))
    return tools.model(library, base, target_modules=["out_proj"])


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def called(library: Any, tools: Any, name: str) -> Any:
    config = library.LoraConfig(r=4, target_modules=["q_proj"])
    return library.get_peft_model(tools.llama(), config, adapter_name=name)


def injected(library: Any, tools: Any, name: str) -> Any:
    config = library.LoraConfig(r=4, target_modules=["q_proj"])
    model = quietly(lambda: library.inject_adapter_in_model(config, tools.llama()))
    return library.inject_adapter_in_model(library.LoraConfig(r=4, target_modules=["q_proj"]), model, name)


LAYERS = [
    Row(
        "a convolution of several groups",
        lambda l, t: grouped(l),
        UserWarning,
        "Merging is not supported",
        ("groups", "cannot be merged"),
    ),
    Row(
        "a rank that the groups of a convolution do not divide",
        lambda l, t: quietly(lambda: grouped(l, 4, r=2)),
        ValueError,
        "divisible by groups",
        ("must be divisible by the 4 groups", "got 2", "rank_pattern"),
    ),
    Row(
        "merging into a convolution of several groups",
        lambda l, t: quietly(lambda: grouped(l)).merge_adapter(),
        NotImplementedError,
        "Merging is not supported",
        ("cannot be merged into a convolution of 2 groups", "unmerged"),
    ),
    Row(
        "DoRA on a convolution of several groups",
        lambda l, t: quietly(lambda: grouped(l, use_dora=True)),
        None,
        "",
        ("use_dora is not for a convolution of 2 groups", "plain LoRA"),
        ours=NotImplementedError,
        why="peft's norms are those of a weight that mixes the groups, and the layer's does not",
    ),
    Row(
        "a dilated convolution with padding='same'",
        lambda l, t: around(l, nn.Conv1d(4, 4, 3, padding="same", dilation=2)),
        None,
        "",
        ("padding='same' and dilation", "Give the padding in numbers"),
        ours=ValueError,
        why="peft's A is not dilated, and its merged weight is: the adapter means two things",
    ),
    Row(
        "attention with keys of another size",
        lambda l, t: attention(l, {"kdim": 4}),
        ValueError,
        "Only same embed for query/key/value",
        ("kdim and vdim are embed_dim",),
    ),
    Row(
        "attention with values of another size",
        lambda l, t: attention(l, {"vdim": 4}),
        ValueError,
        "Only same embed for query/key/value",
        ("kdim and vdim are embed_dim",),
    ),
    Row(
        "DoRA on torch's attention",
        lambda l, t: attention(l, use_dora=True),
        ValueError,
        "does not support DoRA",
        ("use_dora is not for torch.nn.MultiheadAttention", "leave it out"),
    ),
    Row(
        "lora_bias on torch's attention",
        lambda l, t: attention(l, lora_bias=True),
        UserWarning,
        "has no bias",
        ("lora_bias is not for torch.nn.MultiheadAttention", "leave it out"),
        ours=ValueError,
        why="B is never called there: in peft its bias is trained by nothing",
    ),
    Row(
        "the output layer of torch's attention alone",
        lambda l, t: attention(l, target_modules=["out_proj"]),
        None,
        "",
        ("layer.out_proj", "without calling it", "Name the attention itself"),
        ours=ValueError,
        why=NOT_THE_WEIGHT,
    ),
    Row(
        "lora_bias on an embedding",
        lambda l, t: around(l, nn.Embedding(8, 4), lora_bias=True),
        ValueError,
        "not supported for Embedding",
        ("lora_bias is not for embeddings", "leave them out"),
    ),
    Row(
        "a layer that Mamba reads without calling it",
        mamba,
        ValueError,
        "incompatible with Mamba",
        ("out_proj", "without calling them", "exclude_modules"),
    ),
]

NAMES = [
    Row(
        "injecting a second adapter",
        lambda l, t: injected(l, t, "other"),
        UserWarning,
        "Already found a `peft_config`",
        ("the model has the adapters ['default'] already", "'other' is added"),
    ),
    Row(
        "injecting an adapter whose name is taken",
        lambda l, t: injected(l, t, "default"),
        UserWarning,
        "Already found a `peft_config`",
        ("adapter 'default' exists already", "choose another name, or delete it first"),
        ours=ValueError,
        why="peft starts the trained weights anew; its add_adapter refuses",
    ),
    Row(
        "unloading a merged model",
        lambda l, t: merged(t.model(l)).unload(),
        None,
        "",
        ("merged adapters are unmerged", "merge_and_unload() keeps them"),
        ours=UserWarning,
        why="peft leaves the merge in what its documents call the original model",
    ),
    Row(
        "merging an adapter that is not there",
        lambda l, t: t.model(l).merge_adapter(["x"]),
        None,
        "",
        ("adapter 'x' does not exist", "there are ['default']"),
        ours=ValueError,
        why=NO_SUCH_NAME,
    ),
    Row(
        "merging and unloading an adapter that is not there",
        lambda l, t: t.model(l).merge_and_unload(adapter_names=["x"]),
        None,
        "",
        ("adapter 'x' does not exist", "there are ['default']"),
        ours=ValueError,
        why="peft gives the base model without any adapter, without a word",
    ),
    Row(
        "set_requires_grad of an adapter that is not there",
        lambda l, t: t.model(l).set_requires_grad("x"),
        None,
        "",
        ("adapter 'x' does not exist", "there are ['default']"),
        ours=ValueError,
        why=NO_SUCH_NAME,
    ),
    Row(
        "several adapters for set_adapter",
        lambda l, t: t.two(l).set_adapter(["default", "other"]),
        TypeError,
        "unhashable",
        ("one name is needed", "model.base_model.set_adapter takes several"),
    ),
    Row(
        "adding an adapter to a merged model",
        lambda l, t: merged(t.model(l)).add_adapter("other", l.LoraConfig(r=4, target_modules=["q_proj"])),
        UserWarning,
        "Unmerging the model first",
        silent=True,
        why="a new adapter is not active: the model stays merged as it was",
    ),
    Row(
        "an adapter with a path as its name",
        lambda l, t: called(l, t, "a/b"),
        None,
        "",
        ("must be a string without '.', '/'", "got 'a/b'"),
        ours=ValueError,
        why="it is saved in a folder of its name: in peft in one within another, or outside with ../",
    ),
    Row(
        "an adapter with a dot in its name",
        lambda l, t: called(l, t, "a.b"),
        KeyError,
        "contain",
        ("must be a string without '.', '/'", "got 'a.b'"),
        ours=ValueError,
        why="a KeyError says nothing of names of adapters",
    ),
    Row(
        "an adapter without a name",
        lambda l, t: quietly(lambda: called(l, t, "")),
        KeyError,
        "be empty string",
        ("must be a string without", "got ''"),
        ours=ValueError,
        why="a KeyError says nothing of names of adapters",
    ),
    Row(
        "an adapter called like a method of torch's",
        lambda l, t: called(l, t, "keys"),
        KeyError,
        "already exists",
        ("cannot be called 'keys'",),
        ours=ValueError,
        why="a KeyError says nothing of names of adapters",
    ),
    Row(
        "a config named as active that is not there",
        lambda l, t: setattr(t.model(l), "active_adapter", "x"),
        None,
        "",
        ("active_adapter must be one of the adapters ['default']", "got 'x'"),
        ours=ValueError,
        why="peft fails at the next forward, with a KeyError",
    ),
    Row(
        "a config named as active, while another adapter is",
        lambda l, t: setattr(t.two(l), "active_adapter", "other"),
        None,
        "",
        ("names a config", "set_adapter('other') activates"),
        ours=UserWarning,
        why="in peft too the layers stay as they are, without a word",
    ),
]
