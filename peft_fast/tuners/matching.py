"""Which modules of a model a config means."""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import nn

from peft_fast.errors import NoMatchingPeftModuleError
from peft_fast.peft_types import TaskType

from .base_weight import is_dense_linear, quantized_weight
from .layer import AdapterHolder, BaseTunerLayer
from .modules_to_save import is_inside_named

ALL_LINEAR = "all-linear"
MANY = 20
CLASSIFIERS = ("score", "classifier")  # what models for SEQ_CLS call their head
Value = TypeVar("Value")


def matches(patterns: Collection[str] | str, path: str) -> bool:
    """A string is a regular expression for the whole path; names match the path or its end after a dot."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(end in patterns for end in ends(path))


def ends(path: str) -> Iterator[str]:
    """ "a.b.c" -> "c", "b.c", "a.b.c": the names that mean this path."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in reversed(range(len(parts))))


def by_pattern(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """The value of the first pattern (a regular expression for the path's end) that fits, else `default`."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path):
            return value
    return default


def find_targets(
    model: nn.Module, config: Any, target_modules: Collection[str] | str, parameters: Collection[str] = ()
) -> list[str]:
    """The paths of the modules that `target_modules` names, less the excluded ones, in the model's order.

    `parameters`: the paths of those that are adapted too; then there may be no module.
    Reads `exclude_modules`, `modules_to_save`, `layers_to_transform` and `layers_pattern` of `config`.
    Raises NoMatchingPeftModuleError, a ValueError, where nothing is left, with the names that come close.
    """
    paths = adaptable_paths(model)
    named = [path for path in paths if matches(target_modules, path)]
    if not named and parameters and not target_modules:
        return []
    if not named:
        raise NoMatchingPeftModuleError(
            f"target_modules {_shown(target_modules)} not found in the base model{_closest(target_modules, paths)}"
        )
    found = [path for path in named if _is_wanted(config, path, target_modules)]
    if not found:
        rules = {name: getattr(config, name, None) for name in _FILTERS}
        given = ", ".join(f"{name}={value}" for name, value in rules.items() if value is not None)
        raise NoMatchingPeftModuleError(
            f"target_modules {_shown(target_modules)} names {len(named)} modules, but {given} takes all of them away"
        )
    if not isinstance(target_modules, str):
        idle = set(target_modules) - {end for path in named for end in ends(path)}
        if idle:
            warnings.warn(f"target_modules {_shown(idle)} match nothing{_closest(idle, paths)}", stacklevel=2)
    excluded = getattr(config, "exclude_modules", None)
    if excluded and not any(matches(excluded, path) for path in paths):
        warnings.warn(f"exclude_modules {_shown(excluded)} match nothing", stacklevel=2)
    met = [*found, *parameters]
    for option in getattr(config, "patterns", ("rank_pattern", "alpha_pattern")):
        keys = [key for key in getattr(config, option, {}) if not any(by_pattern({key: True}, p, False) for p in met)]
        if keys:
            warnings.warn(f"{option} keys {_shown(keys)} match no target", RuntimeWarning, stacklevel=2)
    return found


def is_meant(config: Any, path: str, target_modules: Collection[str] | str) -> bool:
    """Whether the names in a config mean the module at this path."""
    return matches(target_modules, path) and _is_wanted(config, path, target_modules)


_FILTERS = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")


def _is_wanted(config: Any, path: str, targets: Collection[str] | str) -> bool:
    """Whether the other options let an adapter be there. Layers that `targets` names by their whole path need not be in
    layers_to_transform."""
    excluded = getattr(config, "exclude_modules", None)
    if excluded and matches(excluded, path):
        return False
    saved = getattr(config, "modules_to_save", None) or ()
    if is_inside_named(path, saved):
        return False
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == [] or (not isinstance(targets, str) and path in targets):
        return True
    index = _layer_index(path, getattr(config, "layers_pattern", None))
    return index is not None and index in ([wanted] if isinstance(wanted, int) else wanted)


def _layer_index(path: str, lists: Collection[str] | str | None) -> int | None:
    """The first index in the path ("model.layers.3.mlp.experts.0" is layer 3), of the named lists only if given."""
    names = [lists] if isinstance(lists, str) else lists
    pattern = rf"(?:|.*?\.)(?:{'|'.join(names)})\.(\d+)\." if names else r".*?\.[^.]*\.(\d+)\."
    match = re.match(pattern, path)
    return int(match[1]) if match else None


def resolved_targets(
    model: nn.Module,
    targets: Collection[str] | str | None,
    by_model_type: Mapping[str, list[str] | str],
    task_type: str | None = None,
) -> set[str] | str:
    """target_modules as names or an expression; None means what `by_model_type` says, or a ValueError.

    MANY names and more are shortened, as in peft: an adapter for every layer of a large model has a short config.
    """
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        targets = by_model_type.get(str(model_type))
        if targets is None:
            raise ValueError(
                f"target_modules must be given for a model of type {model_type!r}: there is no default for it; "
                f"{ALL_LINEAR!r} takes every linear layer but the output"
            )
    if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        return targets
    names = all_linear(model, task_type) if isinstance(targets, str) else set(targets)
    return names if len(names) < MANY else shortest(names, adaptable_paths(model))


def adaptable_paths(model: nn.Module) -> list[str]:
    """The paths of the base model's modules, all names of each: not the root, and not what lies inside adapters."""
    paths: list[str] = []
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or (inside and path.startswith(inside)):
            continue
        paths.append(path)
        if isinstance(module, AdapterHolder):
            inside = (f"{path}.",)
    return paths


def all_linear(model: nn.Module, task_type: str | None = None) -> set[str]:
    """The paths of the model's linear layers but its output layer, or its classifier."""
    heads = [embedding_of(model, "get_output_embeddings")]
    if task_type == TaskType.SEQ_CLS:
        heads.append(next((m for name in CLASSIFIERS if (m := getattr(model, name, None)) is not None), None))
    paths = adaptable_paths(model)
    linear = [path for path in paths if (m := model.get_submodule(path)) not in heads and _is_linear(m)]
    if not linear:
        raise ValueError(f"target_modules {ALL_LINEAR!r} found no linear layer in {type(model).__name__}")
    return set(linear)


def shortest(names: Collection[str], paths: Collection[str]) -> set[str]:
    """The shortest names that mean those of `paths` that `names` mean, and no others."""
    ambiguous = {end for path in paths if not matches(names, path) for end in ends(path)}
    return {next((end for end in ends(name) if end not in ambiguous), name) for name in names}


def embedding_of(model: nn.Module, getter: str) -> nn.Module | None:
    """What transformers' `get_input_embeddings` or `get_output_embeddings` gives; None where the model has neither, or
    none that it knows of: for models of sound the getters raise."""
    if not hasattr(model, getter):
        return None
    try:
        return getattr(model, getter)()
    except NotImplementedError:
        return None


def _is_linear(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return is_dense_linear(base) or quantized_weight(base) is not None


def _shown(names: Collection[str] | str) -> str:
    return repr(names if isinstance(names, str) else sorted(names))


def _closest(names: Collection[str] | str, paths: list[str]) -> str:
    """A hint: the last parts of the model's paths that look like what was asked for, or a few that exist."""
    last_parts = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    wanted = [names] if isinstance(names, str) else sorted(names)
    close = [part for name in wanted for part in get_close_matches(name.rpartition(".")[2], last_parts, n=2)]
    if close:
        return f": did you mean {', '.join(dict.fromkeys(close))}?"
    shown = [part for part in last_parts if not part.isdigit()][:20]
    return f": its modules end in {', '.join(shown)}"


def targets_in(tuner: Any, state_dict: Mapping[str, Any], config: Any) -> set[str] | str:
    """What `config.target_modules` has to be for the layers that the keys of an adapter's state dict name.

    Warns where the config names others, or where the model lacks some. Raises ValueError where it has none of them.
    """
    mark = f".{tuner.prefix}"
    named = {key.rpartition(mark)[0].removeprefix("_orig_mod.") for key in state_dict if mark in key}
    named = {path.removeprefix("base_model.model.") for path in named}
    paths = adaptable_paths(tuner.model)
    # An adapted layer may hold another: the attention, say, that "attention.base_layer.out_proj" lies in.
    named = {path if path in paths else path.partition(".base_layer.")[0] for path in named}
    found = {path for path in named if path in paths}
    if not found:
        raise ValueError(
            f"state_dict names no layer of {type(tuner.model).__name__}: of its {len(state_dict)} keys, such as "
            f"{list(state_dict)[:3]}, none is the path of a module and {mark!r} after it"
        )
    if absent := sorted(named - found):
        warnings.warn(f"state_dict has weights for layers that the model lacks: {absent}", stacklevel=3)
    targets = () if config.target_modules is None else tuner._resolved_targets(config)
    if dropped := sorted(path for path in found if not _is_wanted(config, path, targets)):
        raise ValueError(
            f"state_dict has weights for {dropped}, which {', '.join(_FILTERS)} of the config take away: "
            "leave those out"
        )
    if config.target_modules is not None:
        meant = {path for path in paths if matches(targets, path) and _is_wanted(config, path, targets)}
        if meant != found:
            warnings.warn(
                f"target_modules of the config and state_dict differ, and state_dict counts: only the config has "
                f"{sorted(meant - found)}, only state_dict has {sorted(found - meant)}",
                RuntimeWarning,
                stacklevel=3,
            )
    exact = {path for path in paths if matches(found, path)} == found
    return found if exact else "|".join(map(re.escape, sorted(found)))  # a whole path may be another's end
