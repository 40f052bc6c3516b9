"""Configs of adapters for models whose experts transformers 5 keeps as one 3-d parameter.

Until version 4 each expert was layers of its own, and configs name those: gate_proj, up_proj, down_proj; w1, w3, w2.
peft 0.21.2 turns such names into target_parameters, and so do we: what both write into a config is the same.
"""

import copy
from typing import Any

from torch import nn

from peft_fast.tuners.matching import ALL_LINEAR, all_linear, matches

# By the architecture whose weights transformers converts in the same way: {name of a layer then: parameter now}.
PARAMETERS = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj",
    },
}  # fmt: skip
JOINED = "gate_up_proj"  # has two layers in it, and so twice the rank


def converted(model: nn.Module, config: Any) -> Any:
    """The config for `model` as it is now: a copy, or `config` itself where there is nothing to do.

    Raises ValueError where one of two layers that are joined now is named without the other.
    """
    names = _parameters_by_name(model)
    if not names:
        return config
    config = copy.copy(config)
    targets = config.target_modules
    if isinstance(targets, str):
        targets = _names_of(model, config, names)
        if not targets:
            return config
    meant = {target: old for target in targets or () for old in names if target == old or target.endswith(f".{old}")}
    config.target_modules = set(targets or ()) - meant.keys()
    config.target_parameters = {*(config.target_parameters or ()), *(names[old] for old in meant.values())}
    halves = {old for old, new in names.items() if new == JOINED}
    named = halves & set(meant.values())
    if named and named != halves:
        raise ValueError(
            f"{' and '.join(sorted(halves))} are one parameter of this model, {JOINED}: target_modules must name both "
            f"or none, got {sorted(named)} alone"
        )
    if named:
        pattern = rf".*\.{JOINED}"
        config.rank_pattern = {**config.rank_pattern, pattern: config.r * len(halves)}
        config.alpha_pattern = {**config.alpha_pattern, pattern: config.lora_alpha * len(halves)}
    return config


def _parameters_by_name(model: Any) -> dict[str, str]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str):
        return {}
    try:  # imported where it is needed: it takes seconds, and such a model's user has it imported already
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_checkpoint_conversion_mapping
    except ImportError:  # a version of transformers that converts nothing
        return {}
    if get_checkpoint_conversion_mapping(model_type) is None:
        return {}
    kind = "mixtral" if model_type == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    return PARAMETERS.get(kind, {})


def _names_of(model: nn.Module, config: Any, names: dict[str, str]) -> set[str]:
    """The last parts of the paths that an expression means, with those of layers that are no more."""
    targets: str = config.target_modules
    if targets.lower() == ALL_LINEAR:
        return {path.rpartition(".")[2] for path in all_linear(model, config.task_type)} | names.keys()
    parameters = [path for path, _ in model.named_parameters()]
    paths = [*(path for path, _ in model.named_modules()), *parameters]
    for old, new in names.items():
        paths += [f"{path.removesuffix(new)}{old}" for path in parameters if path.endswith(f".{new}")]
    return {path.rpartition(".")[2] for path in paths if path and matches(targets, path)}
