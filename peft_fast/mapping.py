"""From a config to a model: which class a task asks for, and get_peft_model."""

import warnings

from torch import nn

from .config import PeftConfig, checked_config, get_peft_config
from .inject import inject_adapter_in_model
from .mixed_model import PeftMixedModel
from .model import PeftModel
from .peft_types import PeftType, TaskType
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .tuners import METHODS, PROMPT_METHODS
from .tuners.base import BaseTuner
from .tuners.layer import AdapterHolder
from .tuners.mixed import COMPATIBLE
from .tuners.prompt_learning import BasePromptEncoder

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[TaskType, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {
    kind: made[0] for kind, made in (METHODS | PROMPT_METHODS).items()
}
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[BaseTuner] | type[BasePromptEncoder]] = {
    kind: made[1] for kind, made in (METHODS | PROMPT_METHODS).items()
}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, type[BaseTuner]] = COMPATIBLE
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {
    **{kind: made[1].prefix for kind, made in METHODS.items()},
    **{kind: f"{kind.value.lower()}_" for kind in PROMPT_METHODS},  # of no parameter: peft's table has them
}


def model_class(task_type: TaskType | str | None, default: type[PeftModel] = PeftModel) -> type[PeftModel]:
    """The class for a task; `default` without one."""
    return default if task_type is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(task_type)]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """`model` with a new adapter in it, ready to train. `model` itself is changed; `unload()` takes everything out.

    `mixed`: a PeftMixedModel, which takes adapters of several methods. `revision`: of the base model, kept in the
    config. See PeftModel for the other arguments and for what is raised.
    """
    wrapper = PeftMixedModel if mixed else model_class(checked_config(peft_config).task_type)
    if any(isinstance(module, AdapterHolder) for module in model.modules()):
        warnings.warn(
            "the model has adapters already: to add one call add_adapter, to start anew call unload() first",
            stacklevel=2,
        )
    if getattr(peft_config, "init_lora_weights", None) == "eva" and not low_cpu_mem_usage:
        warnings.warn(
            "init_lora_weights='eva' gives the adapter other weights, maybe of other ranks, later: until then "
            "low_cpu_mem_usage=True needs no memory for them",
            stacklevel=2,
        )
    wrapped = wrapper(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    _note_base_model(peft_config, model, revision)
    return wrapped


def _note_base_model(config: PeftConfig, model: nn.Module, revision: str | None) -> None:
    old, new = config.base_model_name_or_path, getattr(model, "name_or_path", None) or None
    if old is not None and old != new:
        warnings.warn(
            f"base_model_name_or_path was {old!r} in the config and is now the model's, {new!r}", stacklevel=3
        )
    config.base_model_name_or_path = new
    if revision is not None:
        if config.revision not in (None, revision):
            warnings.warn(f"revision was {config.revision!r} in the config and is now {revision!r}", stacklevel=3)
        config.revision = revision


__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "get_peft_model",
    "inject_adapter_in_model",
    "model_class",
]
