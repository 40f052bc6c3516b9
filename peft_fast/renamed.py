"""Names that transformers has changed: adapters trained before still say the old ones.

transformers keeps, for each architecture, how the keys of older checkpoints are renamed ("language_model.model.layers"
became "model.language_model.layers" in Llava). An adapter's keys begin with the same names.
"""

from collections.abc import Iterable
from typing import Any

from .adapter_file import PREFIX


def renamed_keys(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """{key: what it is called today}, of those of `keys` that transformers renames for `model`, without "base_model.".

    Weights that were also joined or split are not: of experts, tuners/lora/joined_experts.py does that after this.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        return {}
    try:  # imported where it is needed: it takes seconds, and such a model's user has it imported already
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # a version of transformers without renamings
        return {}
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    found: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):  # in the order of transformers: some rules wait for others
        bare = key.removeprefix(PREFIX)
        name, _ = rename_source_key(bare, renamings, [])
        if name != bare:
            found[key] = name
    return found
