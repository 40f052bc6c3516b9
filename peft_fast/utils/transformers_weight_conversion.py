"""Names of peft.utils.transformers_weight_conversion: what transformers' own model.load_adapter asks for."""

import re
from collections.abc import Sequence
from typing import Any

from peft_fast.adapter_file import PREFIX
from peft_fast.mapping import PEFT_TYPE_TO_PREFIX_MAPPING


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """transformers' rules (WeightRenaming) by which the keys of an adapter's file become names in the model.

    A file's keys begin as a PeftModel's do and do not name the adapter: "base_model.model.lm_head.lora_A.weight" is
    "lm_head.lora_A.default.weight" in the model. Names that transformers has changed since come after that, by its own
    rules among `weight_conversions`. Those that join weights (of experts, since transformers 5) have no counterpart
    here: a file of adapters of single experts is for PeftModel.from_pretrained, and load_adapter reports its keys.
    """
    from transformers.core_model_loading import WeightRenaming

    method: Any = getattr(peft_config, "peft_type", None)
    known = [PEFT_TYPE_TO_PREFIX_MAPPING[method]] if method in PEFT_TYPE_TO_PREFIX_MAPPING else None
    prefixes = sorted(set(known or PEFT_TYPE_TO_PREFIX_MAPPING.values()))
    rules = [WeightRenaming(f"^{re.escape(PREFIX)}", "")]
    # A module in the model, and in files a tensor under the module's name.
    rules.append(WeightRenaming(r"lora_magnitude_vector$", "lora_magnitude_vector.weight"))
    rules += [WeightRenaming(rf"({re.escape(prefix)}[^\.]*)", rf"\1.{adapter_name}") for prefix in prefixes]
    return rules + [rule for rule in weight_conversions or () if isinstance(rule, WeightRenaming)]


__all__ = ["build_peft_weight_mapping"]
