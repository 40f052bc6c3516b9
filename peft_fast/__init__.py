"""peft_fast: the PeftModel API of Hugging Face PEFT on fused Triton kernels."""

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
from .checkpoint import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from .config import PeftConfig, PromptLearningConfig, get_peft_config
from .dispatch import use_backend
from .errors import NoMatchingPeftModuleError
from .explain import explain
from .inject import inject_adapter_in_model
from .integrations.accelerate import accelerate, restore
from .integrations.stand_in import install_as_peft, install_if_asked
from .jobs import Job, JobResult, JobTrainer
from .kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
from .mapping import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_model,
)
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
    CPTConfig,
    CPTEmbedding,
    LoHaConfig,
    LoHaModel,
    LoraConfig,
    LoraModel,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
)
from .tuners.lora import LoftQConfig, LoraGAConfig, LoraRuntimeConfig, preprocess_loraga, set_lora_groups, set_lora_mlp
from .utils import bloom_model_postprocess_past_key_value, replace_lora_weights_loftq, shift_tokens_right

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AdapterStore",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "CPTConfig",
    "CPTEmbedding",
    "Job",
    "JobResult",
    "JobTrainer",
    "LoHaConfig",
    "LoHaModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
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
    "TaskType",
    "TunerLayerStatus",
    "TunerModelStatus",
    "accelerate",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "explain",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "install_as_peft",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "preprocess_loraga",
    "quantize_linear_layers",
    "replace_lora_weights_loftq",
    "restore",
    "set_base_model_state_dict",
    "set_lora_groups",
    "set_lora_mlp",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "use_backend",
]

install_if_asked()
