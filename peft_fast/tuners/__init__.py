"""The methods. A new one is a folder here and a line in METHODS, or in PROMPT_METHODS if it learns prompts."""

from peft_fast.config import PeftConfig, PromptLearningConfig
from peft_fast.peft_types import PeftType

from .adalora import AdaLoraConfig, AdaLoraModel
from .adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from .base import BaseTuner
from .boft import BOFTConfig, BOFTModel
from .cartridge import CartridgeConfig, CartridgeEncoder
from .cpt import CPTConfig, CPTEmbedding
from .fourierft import FourierFTConfig, FourierFTModel
from .hra import HRAConfig, HRAModel
from .ia3 import IA3Config, IA3Model
from .layer import AdapterHolder, BaseTunerLayer
from .ln_tuning import LNTuningConfig, LNTuningModel
from .loha import LoHaConfig, LoHaModel
from .lokr import LoKrConfig, LoKrModel
from .lora import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraModel,
    LoraRuntimeConfig,
    convert_to_lora,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_loraga,
    save_as_lora,
)
from .mixed import MixedModel
from .modules_to_save import ModulesToSaveWrapper
from .multitask_prompt_tuning import MultitaskPromptEmbedding, MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from .oft import OFTConfig, OFTModel
from .p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from .prefix_tuning import PrefixEncoder, PrefixTuningConfig
from .prompt_learning import BasePromptEncoder, PromptTuner
from .prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from .randlora import RandLoraConfig, RandLoraModel
from .shira import ShiraConfig, ShiraModel
from .trainable_tokens import TrainableTokensConfig, TrainableTokensModel
from .vera import VeraConfig, VeraModel

METHODS: dict[PeftType, tuple[type[PeftConfig], type[BaseTuner]]] = {
    PeftType.LORA: (LoraConfig, LoraModel),
    PeftType.LOHA: (LoHaConfig, LoHaModel),
    PeftType.OFT: (OFTConfig, OFTModel),
    PeftType.FOURIERFT: (FourierFTConfig, FourierFTModel),
    PeftType.RANDLORA: (RandLoraConfig, RandLoraModel),
    PeftType.BOFT: (BOFTConfig, BOFTModel),
    PeftType.HRA: (HRAConfig, HRAModel),
    PeftType.ADAPTION_PROMPT: (AdaptionPromptConfig, AdaptionPromptModel),
    PeftType.IA3: (IA3Config, IA3Model),
    PeftType.VERA: (VeraConfig, VeraModel),
    PeftType.ADALORA: (AdaLoraConfig, AdaLoraModel),
    PeftType.LOKR: (LoKrConfig, LoKrModel),
    PeftType.LN_TUNING: (LNTuningConfig, LNTuningModel),
    PeftType.TRAINABLE_TOKENS: (TrainableTokensConfig, TrainableTokensModel),
    PeftType.SHIRA: (ShiraConfig, ShiraModel),
}
PROMPT_METHODS: dict[PeftType, tuple[type[PromptLearningConfig], type[BasePromptEncoder]]] = {
    PeftType.PROMPT_TUNING: (PromptTuningConfig, PromptEmbedding),
    PeftType.MULTITASK_PROMPT_TUNING: (MultitaskPromptTuningConfig, MultitaskPromptEmbedding),
    PeftType.P_TUNING: (PromptEncoderConfig, PromptEncoder),
    PeftType.PREFIX_TUNING: (PrefixTuningConfig, PrefixEncoder),
    PeftType.CPT: (CPTConfig, CPTEmbedding),
    PeftType.CARTRIDGE: (CartridgeConfig, CartridgeEncoder),
}


def config_class(peft_type: PeftType | str | None) -> type[PeftConfig]:
    return _method(peft_type)[0]


def method_class(peft_type: PeftType | str | None) -> type[BaseTuner] | type[BasePromptEncoder]:
    """The tuner of a method, or its prompt encoder."""
    return _method(peft_type)[1]


def tuner_class(peft_type: PeftType | str | None) -> type[BaseTuner]:
    """Raises ValueError for methods that have none, as they change no layer of the model."""
    found = method_class(peft_type)
    if not issubclass(found, BaseTuner):
        raise ValueError(
            f"{PeftType(peft_type).value} learns prompts and puts nothing into a model's layers: it needs a PeftModel, "
            "which get_peft_model makes"
        )
    return found


def prompt_encoder_class(peft_type: PeftType | str | None) -> type[BasePromptEncoder]:
    found = method_class(peft_type)
    if not issubclass(found, BasePromptEncoder):
        raise ValueError(f"{PeftType(peft_type).value} learns no prompts")
    return found


def _method(
    peft_type: PeftType | str | None,
) -> tuple[type[PeftConfig], type[BaseTuner]] | tuple[type[PromptLearningConfig], type[BasePromptEncoder]]:
    built = [method.value for method in (*METHODS, *PROMPT_METHODS)]
    if peft_type in built:
        kind = PeftType(peft_type)
        return METHODS[kind] if kind in METHODS else PROMPT_METHODS[kind]
    if peft_type in [known.value for known in PeftType]:
        raise NotImplementedError(
            f"peft_type {PeftType(peft_type).value} is not built in peft_fast yet: there is {', '.join(built)}"
        )
    raise ValueError(f"unknown peft_type {peft_type!r}: there is {', '.join(built)}")


__all__ = [
    "METHODS",
    "PROMPT_METHODS",
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdapterHolder",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "BOFTConfig",
    "BOFTModel",
    "BasePromptEncoder",
    "BaseTuner",
    "BaseTunerLayer",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "EvaConfig",
    "FourierFTConfig",
    "FourierFTModel",
    "HRAConfig",
    "HRAModel",
    "IA3Config",
    "IA3Model",
    "LNTuningConfig",
    "LNTuningModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MixedModel",
    "ModulesToSaveWrapper",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "OFTModel",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuner",
    "PromptTuningConfig",
    "PromptTuningInit",
    "RandLoraConfig",
    "RandLoraModel",
    "ShiraConfig",
    "ShiraModel",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "VeraConfig",
    "VeraModel",
    "config_class",
    "convert_to_lora",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "method_class",
    "preprocess_loraga",
    "prompt_encoder_class",
    "save_as_lora",
    "tuner_class",
]
