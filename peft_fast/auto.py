"""AutoPeftModel...: base model and adapter from the adapter's folder or Hub id alone."""

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from .config import PeftConfig
from .files import HUB_ARGUMENTS, locate
from .mapping import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, model_class
from .model import PeftModel
from .peft_types import TaskType
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
IMPORT_ALLOWLIST = ("diffusers", "lerobot", "megatron-core", "transformers")
OF_THE_ADAPTER = ("autocast_adapter_dtype", "ephemeral_gpu_offload", "torch_device")
OF_BOTH = ("low_cpu_mem_usage", "key_mapping", "ignore_mismatched_sizes")
NOT_FOR_THE_BASE = ("subfolder", "user_agent")  # where the adapter is in its repository


def get_default_import_allowlist() -> list[str]:
    return list(IMPORT_ALLOWLIST)


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether a module is one of these packages, or in one."""
    return any(parent_name == allowed or parent_name.startswith(f"{allowed}.") for allowed in allowlist)


class _BaseAutoPeftModel:
    _target_class: ClassVar[str | None] = None  # of transformers, which takes seconds to import
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} makes models of other classes: call {type(self).__name__}.from_pretrained"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model that the adapter's config names, at the revision that it names, with the adapter in it.

        `pretrained_model_name_or_path`, `revision`: the adapter's. `config`: used in place of the file's.
        `import_allowlist`: packages that an adapter without a task type may have its base model's class imported from,
        by default IMPORT_ALLOWLIST; a config file is not to decide what code is run.
        `kwargs`: what PeftModel.from_pretrained knows goes there, where to download (token, cache_dir, ...) to base
        model and adapter, and everything else (dtype, device_map, quantization_config, ...) to the base model.
        Where a tokenizer with added tokens lies beside the adapter, the embeddings are enlarged to fit it.
        Raises ValueError for an adapter of another task, or whose base model cannot be told.
        """
        where: dict[str, Any] = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs} | {
            "revision": revision
        }
        if config is None:
            config = PeftConfig.from_pretrained(pretrained_model_name_or_path, **where)
        target: Any = cls._class_of_base(config, IMPORT_ALLOWLIST if import_allowlist is None else import_allowlist)
        if not config.base_model_name_or_path:
            raise ValueError(
                f"the config of {str(pretrained_model_name_or_path)!r} does not name its base model "
                "(base_model_name_or_path): load that yourself and call PeftModel.from_pretrained"
            )
        for_base = {name: value for name, value in kwargs.items() if name not in (*OF_THE_ADAPTER, *NOT_FOR_THE_BASE)}
        for_adapter: dict[str, Any] = {
            name: value for name, value in kwargs.items() if name in (*OF_THE_ADAPTER, *OF_BOTH)
        }
        base = target.from_pretrained(config.base_model_name_or_path, revision=config.revision, **for_base)
        _fit_tokenizer(base, pretrained_model_name_or_path, kwargs.get("trust_remote_code", False), where)
        return cls._target_peft_class.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **for_adapter, **where
        )

    @classmethod
    def _class_of_base(cls, config: PeftConfig, allowlist: Sequence[str]) -> Any:
        if config.task_type is not None:
            expected = model_class(config.task_type)
            if cls._target_class is None or cls._target_peft_class is not expected:
                raise ValueError(
                    f"{cls.__name__} cannot load an adapter for {TaskType(config.task_type).value}: use "
                    f"Auto{expected.__name__}"
                )
        if cls._target_class is not None:
            return getattr(importlib.import_module("transformers"), cls._target_class)
        if not config.auto_mapping:
            raise ValueError(
                "the adapter's config has neither task_type nor auto_mapping, so that the class of its base model is "
                "unknown: load the base model yourself and call PeftModel.from_pretrained"
            )
        return _import_class(config.auto_mapping, allowlist)


def _import_class(auto_mapping: dict[str, str], allowlist: Sequence[str]) -> Any:
    if isinstance(allowlist, str):
        raise TypeError(f"import_allowlist must be a list of packages, got the string {allowlist!r}")
    library, name = auto_mapping.get("parent_library"), auto_mapping.get("base_model_class")
    if not isinstance(library, str) or not check_import_allowlist(allowlist, library):
        raise ValueError(
            f"the adapter's config asks to import {library!r}, which is not in the import allowlist {list(allowlist)}: "
            f"if you trust it, pass import_allowlist=[{library!r}]"
        )
    found = getattr(importlib.import_module(library), str(name), None)
    if not (isinstance(found, type) and hasattr(found, "from_pretrained")):
        raise ValueError(f"{library} has no model class {name!r}, which the adapter's config names: load it yourself")
    return found


def _fit_tokenizer(base: Any, model_id: str | os.PathLike[str], trust_remote_code: bool, where: dict[str, Any]) -> None:
    """Enlarge the embeddings to the tokenizer saved with the adapter, if there is one and it has more tokens."""
    if not isinstance(base, nn.Module) or not hasattr(base, "get_input_embeddings"):
        return
    try:
        there = locate(model_id, TOKENIZER_CONFIG_NAME, **where)
    except ValueError as error:  # offline, say, with a copy of the adapter's own files only
        warnings.warn(f"no tokenizer is looked for beside the adapter: {error}", stacklevel=3)
        return
    if there is None:
        return
    where = {name: value for name, value in where.items() if value is not None}
    tokenizers = importlib.import_module("transformers").AutoTokenizer
    tokenizer = tokenizers.from_pretrained(model_id, trust_remote_code=trust_remote_code, **where)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        base.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]


class AutoPeftModel(_BaseAutoPeftModel):
    """For adapters without a task type: their config names the base model's class."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    _target_class = "AutoModelForCausalLM"
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    _target_class = "AutoModelForSeq2SeqLM"
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    _target_class = "AutoModelForSequenceClassification"
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    _target_class = "AutoModelForTokenClassification"
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    _target_class = "AutoModelForQuestionAnswering"
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    _target_class = "AutoModel"
    _target_peft_class = PeftModelForFeatureExtraction


__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]
