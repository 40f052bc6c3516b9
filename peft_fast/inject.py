"""Adapters in a model without a PeftModel around it: as transformers and diffusers use them."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from .adapter_file import PREFIX
from .config import PeftConfig, checked_config
from .transaction import unchanged_on_error
from .tuners import tuner_class
from .tuners.base import BaseTuner
from .tuners.layer import AdapterHolder
from .tuners.prompt_learning import PromptTuner

AnyTuner = BaseTuner | PromptTuner


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Put a new adapter into `model` itself and return it. Its `peft_config` then says which adapters are in it.

    The adapter is active and trainable, unless its config is for inference. Those that were there are kept, inactive
    and as trainable as they were, with a warning: set_adapter freezes them, and transformers calls that. Its weights
    have the dtype of the layers that they are for.
    low_cpu_mem_usage: make weights on the meta device, for set_peft_model_state_dict.
    state_dict: adapt the layers that its keys name, whatever the config's target_modules; no value of it is used. Keys
    with and without a PeftModel's "base_model.model." are understood.
    Raises ValueError or NotImplementedError for what cannot be done; `model` is then unchanged.
    """
    config = checked_config(peft_config)
    if isinstance(model._modules.get("base_model"), BaseTuner):
        raise ValueError("inject_adapter_in_model is for models without a PeftModel around them: call add_adapter")
    there: dict[str, PeftConfig] = _configs(model) or {}
    _check_one_type(config, there)
    tuner = tuner_class(config.peft_type).around(model, there)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()] if there else []
    with unchanged_on_error(tuner):
        tuner.put_in(adapter_name, config, False, low_cpu_mem_usage, state_dict)
        tuner.set_adapter(adapter_name, config.inference_mode)
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        model.peft_config = there  # type: ignore[assignment]
    if before:
        warnings.warn(
            f"the model has the adapters {sorted(there.keys() - {adapter_name})} already: {adapter_name!r} is added to "
            "them, and what was trainable of them stays so",
            stacklevel=2,
        )
    return model


def tuner_of(model: Any) -> tuple[AnyTuner, str]:
    """What manages the adapters of `model`, a PeftModel or a model that they were injected into, and what the names of
    its weights begin with. Raises ValueError for a model without adapters."""
    base = model._modules.get("base_model") if isinstance(model, nn.Module) else None
    if isinstance(base, BaseTuner):
        return base, PREFIX
    if isinstance(model, nn.Module) and getattr(model, "_is_prompt_learning", False) is True:
        return PromptTuner(model), "base_model."
    configs = _configs(model)
    if not configs:
        raise ValueError(
            f"{type(model).__name__} has no adapters: a PeftModel is needed, out of any DDP or FSDP wrapper, or a "
            "model that went through inject_adapter_in_model"
        )
    return tuner_class(next(iter(configs.values())).peft_type).around(model, configs), ""


def _configs(model: Any) -> dict[str, PeftConfig] | None:
    """The configs of the adapters that were injected into the model."""
    configs = vars(model).get("peft_config")
    if not isinstance(configs, dict) or not all(isinstance(config, PeftConfig) for config in configs.values()):
        configs = None
    if configs or not any(m.available_adapters() for m in model.modules() if isinstance(m, AdapterHolder)):
        return configs
    if any(isinstance(module, BaseTuner) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is a wrapper around a PeftModel: pass the PeftModel itself (of DDP `module`, of "
            "torch.compile `_orig_mod`)"
        )
    raise ValueError(f"the adapters in {type(model).__name__} belong to a PeftModel around it: use that")


def _check_one_type(config: PeftConfig, there: Mapping[str, PeftConfig]) -> None:
    other = next((c.peft_type for c in there.values() if c.peft_type != config.peft_type), None)
    if other is not None:
        raise ValueError(f"the adapters of one model must be of one type: it has {other}, got {config.peft_type}")
