"""Adapters as state dicts and as files: adapter_model.safetensors with peft's keys.

A key in a file is the parameter's name without the adapter's: `base_model.model.<path>.lora_A.weight`. The tuner gives
one map {key in the file: name in the model}; saving reads it one way and loading the other, so that they cannot differ.
Loading first looks at every key and shape and only then writes: a bad file leaves the model as it was.
"""

import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from .adapter_file import PREFIX, described, fits
from .inject import AnyTuner, tuner_of
from .load_result import LoadResult
from .renamed import renamed_keys
from .sharded import whole, write
from .transaction import at_end
from .tuners.base import BaseTuner
from .tuners.layer import BaseTunerLayer
from .tuners.lora.padding import without_padding
from .tuners.matching import embedding_of
from .tuners.modules_to_save import ModulesToSaveWrapper
from .tuners.names import without_compiling
from .tuners.offload import offloading_hook, onloaded
from .tuners.prompt_learning import PromptTuner
from .tuners.tied import EMBEDDING_LAYER_NAMES
from .tuners.trainable_tokens import TrainableTokensLayer
from .tuners.trainable_tokens.wrapper import TrainableTokensWrapper

COMPILED = "_orig_mod."  # what names in a module begin with that torch.compile made


class LoadPlan(NamedTuple):
    """What a state dict would do to an adapter, looked at before anything is done."""

    values: dict[str, Tensor]  # by name in the model
    result: LoadResult


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors as a file holds them: the model's own memory, detached.

    `model` is a PeftModel, out of any DDP or FSDP wrapper, or a model that adapters were injected into: its keys lack
    the "base_model.model." that a PeftModel's begin with.
    `unwrap_compiled`: of a model that torch.compile made, keys without the "_orig_mod." that its names begin with.
    `state_dict`: take the tensors from here (gathered from shards, say) and not from the model. Of a model that FSDP2
    (fully_shard) has sharded they are gathered: then every process has to call this.
    `save_embedding_layers`: also the embeddings of the base model; "auto": where they are adapted, or where the
    vocabulary's size is no longer that of the base model's own config file (on disk or in the Hub's cache).
    """
    inner = without_compiling(model)
    if inner is not model:
        given = state_dict and {key.removeprefix(COMPILED): value for key, value in state_dict.items()}
        found = get_peft_model_state_dict(inner, given, adapter_name, save_embedding_layers=save_embedding_layers)
        return found if unwrap_compiled else {COMPILED + key: value for key, value in found.items()}
    tuner, prefix = tuner_of(model)
    keys = _keys(tuner, prefix, adapter_name)
    keys |= {prefix + key: prefix + key for key in _embeddings_to_save(tuner, adapter_name, save_embedding_layers)}
    prompt = tuner.prompt_tensors(adapter_name) if isinstance(tuner, PromptTuner) else {}
    tensors = _tensors(model) if state_dict is None else state_dict
    absent = [name for name in keys.values() if name not in tensors]
    if absent:
        raise ValueError(f"state_dict lacks {len(absent)} tensors of adapter {adapter_name!r}: {some(absent)}")
    found = {key: _at_hand(model, name, tensors[name]) for key, name in keys.items()}
    if isinstance(tuner, BaseTuner):
        found = tuner.to_file(adapter_name, found, prefix)
    return {**without_padding(tuner, adapter_name, found, prefix), **prompt}


def _keys(tuner: AnyTuner, prefix: str, adapter_name: str) -> dict[str, str]:
    """{key in the adapter's file: name in the model}."""
    shared = tuner.shared_keys(adapter_name, prefix) if isinstance(tuner, BaseTuner) else {}
    return {prefix + key: prefix + name for key, name in tuner.state_keys(adapter_name).items()} | shared


def _at_hand(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor, without autograd, or a copy of it where it is sharded or accelerate has offloaded its layer."""
    path, _, attribute = name.rpartition(".")
    if not tensor.is_meta or offloading_hook(layer := model.get_submodule(path)) is None:
        return whole(tensor.detach())
    with onloaded(layer):
        return getattr(layer, attribute).detach().to("cpu", copy=True)


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Load an adapter's tensors into `model`, which has an adapter of that name: see get_peft_model_state_dict.

    Weights on the meta device are replaced (`low_cpu_mem_usage` says that there are such), others written to.
    Raises ValueError, before anything is written, where the tensors are another model's or another rank's.
    """
    model = without_compiling(model)
    plan = plan_load(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes)
    apply_load(model, plan, adapter_name)
    return plan.result


def keys_in_model(
    model: Any, state_dict: Mapping[str, Any], adapter_name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's values by their names in the model, and those that have no place there under the keys that they have."""
    tuner, prefix = tuner_of(model)
    known = _keys(tuner, prefix, adapter_name)
    state_dict = _as_today(tuner, state_dict, prefix, adapter_name)
    found, unexpected = _by_name_in_model(tuner.model, state_dict, known, prefix, adapter_name)
    return found, {key: state_dict[key] for key in unexpected}


def _as_today(tuner: Any, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
    """A file's values under the keys that files have today."""
    old = ".lora_magnitude_vector.weight"  # as the first files with DoRA had it
    state_dict = {key.removesuffix(".weight") if key.endswith(old) else key: v for key, v in state_dict.items()}
    return tuner.as_today(state_dict, prefix, adapter_name)


def plan_load(
    model: Any, state_dict: Mapping[str, Any], adapter_name: str, ignore_mismatched_sizes: bool = False
) -> LoadPlan:
    tuner, prefix = tuner_of(model)
    keys = _keys(tuner, prefix, adapter_name)
    keys |= tuner.prompt_keys(adapter_name) if isinstance(tuner, PromptTuner) else {}
    state_dict = _as_today(tuner, state_dict, prefix, adapter_name)
    others = {name: name for name in _embedding_keys(tuner)} | _keys_of_tied_tokens(tuner, adapter_name)
    known = {**keys, **{prefix + key: prefix + name for key, name in others.items()}}
    found, unexpected = _by_name_in_model(tuner.model, state_dict, known, prefix, adapter_name)
    missing = [name for name in keys.values() if name not in found]
    if keys and len(missing) == len(keys):
        raise ValueError(
            f"the file is no adapter for this model: none of its {len(state_dict)} tensors, such as "
            f"{some(unexpected)}, is one of the adapter's, such as {some(list(keys))}"
        )
    own = _tensors(model)
    wrong = [name for name, value in found.items() if not fits(value, own[name])]
    if wrong and not ignore_mismatched_sizes:
        shapes = "; ".join(f"{n}: {described(found[n])} for {described(own[n])}" for n in wrong[:3])
        size, options = _sizes(tuner)
        raise ValueError(
            f"{len(wrong)} tensors of the file do not fit ({shapes}): was the adapter trained with another {size}, or "
            f"on another base model? See {options} in its adapter_config.json"
        )
    if wrong:
        warnings.warn(f"not loaded, because of their sizes: {some(wrong)}", stacklevel=3)
    values = {name: _as_dtype(name, value, own[name].dtype) for name, value in found.items() if name not in wrong}
    if isinstance(tuner, BaseTuner):
        tuner.check_values(values)
    empty = [name for name in keys.values() if own[name].is_meta and name not in values]
    if empty:
        raise ValueError(f"low_cpu_mem_usage needs every weight of the adapter in the file, which lacks {some(empty)}")
    return LoadPlan(values, LoadResult(missing + [name for name in wrong if name in keys.values()], unexpected))


def _sizes(tuner: AnyTuner) -> tuple[str, str]:
    """What the sizes in a file come from, and the options that say it."""
    if isinstance(tuner, PromptTuner):
        return "number of virtual tokens", "num_virtual_tokens, token_dim and num_layers"
    return "rank", "r and target_modules"


def _by_name_in_model(
    base: nn.Module,
    state_dict: Mapping[str, Any],
    known: dict[str, str],
    prefix: str,
    adapter_name: str,
) -> tuple[dict[str, Any], list[str]]:
    """The file's values by their names in the model, and the file's keys that mean nothing here.

    Beside today's keys: names as they are in the model; those less the adapter's name; base weights without the
    "base_layer." of an adapted layer (peft before 0.7); what torch.compile adds; names that transformers has changed
    since; and, for a model that adapters were injected into, keys that a PeftModel saved.
    """
    names = list(known.values())
    for name in names:
        head, _, tail = name.rpartition(f".{adapter_name}")
        for older in (name, head + tail if head else name):
            known.setdefault(older, name)
    for name in names:
        known.setdefault(name.replace(".base_layer.", "."), name)
    known = {**{key.replace("_orig_mod.", ""): name for key, name in known.items()}, **known}
    places = {key: _place(key, known, prefix) for key in state_dict}
    lost = [key for key, place in places.items() if place is None]
    for key, renamed in (renamed_keys(base, lost) if lost else {}).items():
        places[key] = known.get(prefix + renamed)
    found: dict[str, Any] = {}
    for key, place in places.items():
        if place in found:
            # peft writes trained copies of embeddings and of biases (bias="all") under two names.
            if not torch.equal(found[place], state_dict[key]):
                raise ValueError(f"the file has {place} twice, with other values: {key!r} is one of its keys")
        elif place is not None:
            found[place] = state_dict[key]
    return found, [key for key, place in places.items() if place is None]


def _keys_of_tied_tokens(tuner: AnyTuner, adapter_name: str) -> dict[str, str]:
    """{key in a file: name in tuner.model} of rows that are saved elsewhere: peft has them twice where it saves the
    embeddings too."""
    return {
        f"{path}.{in_file}": f"{path}.{in_model}"
        for path, layer in tuner.layers()
        if isinstance(layer, TrainableTokensLayer)
        for in_file, in_model in layer.own_state_keys(adapter_name).items()
    }


def _place(key: str, known: Mapping[str, str], prefix: str) -> str | None:
    bare = key.replace("_orig_mod.", "")
    return known.get(key) or known.get(bare) or (None if prefix else known.get(bare.removeprefix(PREFIX)))


def _as_dtype(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    try:
        return value.to(dtype)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{name} is {value.dtype} in the file, which torch cannot make {dtype} of: {error}") from error


@torch.no_grad()
def apply_load(model: Any, plan: LoadPlan, adapter_name: str) -> None:
    """Write the plan's values. Those of the base model wait for the end of the change that this is a part of, and for
    what an adapter's start takes out of the base weights: a file has them as they are without it."""
    own = _tensors(model)
    tuner, prefix = tuner_of(model)
    of_base = {prefix + name for name in _embedding_keys(tuner)}
    for name, value in plan.values.items():
        if name in of_base:
            # Sizes and dtypes fit: such a copy does not fail, and has no undoing.
            at_end(partial(_put, model, name, own[name], value), lambda: None)
        else:
            _put(model, name, own[name], value)
    for _, layer in tuner.layers():
        layer.place_adapter(adapter_name, keep_dtype=True)


@torch.no_grad()
def _put(model: nn.Module, name: str, own: Tensor, value: Tensor) -> None:
    if not own.is_meta:
        return write(own, value)
    path, _, attribute = name.rpartition(".")
    if offloading_hook(layer := model.get_submodule(path)) is not None:
        with onloaded(layer, changed=True):
            getattr(layer, attribute).copy_(value)
        return None
    loaded: Tensor = value.detach().clone()  # the caller's tensors, and those that share memory in a file, stay apart
    if isinstance(own, nn.Parameter):
        loaded = nn.Parameter(loaded, requires_grad=own.requires_grad)
    return setattr(model.get_submodule(path), attribute, loaded)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name. Not state_dict(), which has bitsandbytes rewrite its weights on some CPUs."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _embedding_keys(tuner: AnyTuner, only_adapted: bool = False) -> list[str]:
    """The names of the base model's input and output embeddings."""
    keys: list[str] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        layer = embedding_of(tuner.model, getter)
        path = next((path for path, module in tuner.model.named_modules() if module is layer), None)
        if layer is None or path is None:
            continue
        adapted = isinstance(layer, BaseTunerLayer)
        if adapted or not only_adapted:
            path = f"{path}.base_layer" if adapted else path
            path += ".token_adapter.base_layer" if isinstance(layer, TrainableTokensWrapper) else ""
            path += ".original_module" if isinstance(layer, ModulesToSaveWrapper) else ""
            keys += [f"{path}.{name}" for name, _ in tuner.model.get_submodule(path).named_parameters()]
    return keys


def _embeddings_to_save(tuner: AnyTuner, adapter_name: str, choice: bool | str) -> list[str]:
    if choice not in (True, False, "auto"):
        raise ValueError(f"save_embedding_layers must be True, False or 'auto', got {choice!r}")
    if choice is False:
        return []
    config: Any = tuner.peft_config[adapter_name]
    adapted = _names_embedding(getattr(config, "target_modules", ())) and any(
        path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES and adapter_name in layer.available_adapters()
        for path, layer in tuner.layers()
    )
    if choice == "auto" and any(getattr(config, name, None) for name in ("trainable_token_indices", "token_indices")):
        adapted = False  # who trains a few rows wants a small file
    if choice == "auto" and not adapted and not vocabulary_was_resized(tuner, adapter_name):
        return []
    if choice == "auto" and adapted:
        warnings.warn("an embedding layer is adapted: its base weight is saved with the adapter", stacklevel=4)
    elif choice == "auto":
        warnings.warn("the vocabulary was resized: the embeddings are saved with the adapter", stacklevel=4)
    if not hasattr(tuner.model, "get_input_embeddings"):
        warnings.warn(
            f"save_embedding_layers={choice!r} saves none: {type(tuner.model).__name__} is no transformers model, and "
            "does not say which of its layers are embeddings. Name them in modules_to_save",
            stacklevel=4,
        )
    return _embedding_keys(tuner, only_adapted=adapted)


def _names_embedding(targets: Any) -> bool:
    """As in peft: a list has to have the bare name."""
    return isinstance(targets, str) or any(name in targets for name in EMBEDDING_LAYER_NAMES)


def vocabulary_was_resized(tuner: AnyTuner, adapter_name: str) -> bool:
    """Against the base model's own config file, where it is at hand: nothing is downloaded for this."""
    config = tuner.peft_config[adapter_name]
    name = config.base_model_name_or_path
    now = getattr(getattr(tuner.model, "config", None), "vocab_size", None)
    if not name or now is None:
        return False
    path: Any = Path(name, "config.json")
    try:
        if not path.is_file():
            path = try_to_load_from_cache(name, "config.json", revision=config.revision)
        # A str or a Path, None where the cache does not know, or its mark that the Hub has no such file.
        values = json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, (str, Path)) else None
    except (HFValidationError, ValueError, OSError):  # a path that is gone and no Hub id, or a file that is no JSON
        values = None
    if not isinstance(values, dict):
        warnings.warn(
            f"the base model {name!r} has no config.json that can be read here, so its vocabulary is taken to be "
            "unchanged: pass save_embedding_layers=True if you enlarged it",
            stacklevel=5,
        )
        return False
    return values.get("vocab_size", now) != now
