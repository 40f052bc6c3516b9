"""peft_fast: the PeftModel API of Hugging Face PEFT on fused Triton kernels."""

from importlib import import_module as _import_module

from .adapter_file import load_peft_weights
from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .base_state import get_base_model_state_dict, set_base_model_state_dict
from .checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .config import PeftConfig, PromptLearningConfig, get_peft_config
from .dispatch import use_backend
from .errors import NoMatchingPeftModuleError, PeftError
from .explain import explain
from .helpers import find_kappa_target_modules
from .inject import inject_adapter_in_model
from .integrations.accelerate import accelerate, restore
from .integrations.stand_in import install_as_peft, install_if_asked
from .jobs import Job, JobResult, JobTrainer
from .kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
from .mapping import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_model,
)
from .memory import MemoryEstimate, estimate_memory
from .mixed_model import PeftMixedModel
from .model import PeftModel
from .peft_types import PeftType, TaskType
from .quantized_linear import QuantizedLinear, quantize_linear_layers
from .serving import AdapterStore
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .tuners import (
    AdaLoraConfig,
    AdaLoraModel,
    AdaptionPromptConfig,
    AdaptionPromptModel,
    BOFTConfig,
    BOFTModel,
    CartridgeConfig,
    CartridgeEncoder,
    CPTConfig,
    CPTEmbedding,
    FourierFTConfig,
    FourierFTModel,
    HRAConfig,
    HRAModel,
    IA3Config,
    IA3Model,
    LNTuningConfig,
    LNTuningModel,
    LoHaConfig,
    LoHaModel,
    LoKrConfig,
    LoKrModel,
    LoraConfig,
    LoraModel,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    OFTConfig,
    OFTModel,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    RandLoraConfig,
    RandLoraModel,
    ShiraConfig,
    ShiraModel,
    TrainableTokensConfig,
    TrainableTokensModel,
    VeraConfig,
    VeraModel,
)
from .tuners.cartridge.utils import (
    compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from .tuners.lora import (
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    preprocess_loraga,
    set_lora_groups,
    set_lora_mlp,
    set_recompute,
)
from .utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    bloom_model_postprocess_past_key_value,
    replace_lora_weights_loftq,
    shift_tokens_right,
)
from .utils.warning import PeftWarning

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdapterStore",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BOFTModel",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "FourierFTConfig",
    "FourierFTModel",
    "HRAConfig",
    "HRAModel",
    "IA3Config",
    "IA3Model",
    "Job",
    "JobResult",
    "JobTrainer",
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
    "MemoryEstimate",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError",
    "OFTConfig",
    "OFTModel",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "QuantizedLinear",
    "RandLoraConfig",
    "RandLoraModel",
    "ShiraConfig",
    "ShiraModel",
    "TaskType",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "TunerLayerStatus",
    "TunerModelStatus",
    "VeraConfig",
    "VeraModel",
    "accelerate",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "compose_cartridge_adapters",
    "estimate_memory",
    "explain",
    "find_kappa_target_modules",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "inject_adapter_in_model",
    "install_as_peft",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
    "quantize_linear_layers",
    "replace_lora_weights_loftq",
    "restore",
    "set_base_model_state_dict",
    "set_lora_groups",
    "set_lora_mlp",
    "set_peft_model_state_dict",
    "set_recompute",
    "shift_tokens_right",
    "use_backend",
]

# What code reaches as `peft_fast.tuners.tuners_utils` and so on, without importing it: peft has imported it, too.
for _path in (
    "mapping_func",
    "peft_model",
    "tuners.lycoris_utils",
    "tuners.tuners_utils",
    "utils.merge_utils",
    "utils.peft_types",
    "utils.save_and_load",
):
    _import_module(f"{__name__}.{_path}")

install_if_asked()
