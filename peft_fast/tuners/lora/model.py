"""LoraModel: which layers LoRA can adapt, and with which rank."""

from torch import nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.base_weight import is_bypassed, is_dense_linear, quantized_weight
from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.matching import by_pattern
from peft_fast.tuners.targets import LORA_TARGETS

from .config import LoraConfig, without_fan_in_fan_out
from .layer import Linear


class LoraModel(BaseTuner):
    prefix = "lora_"
    target_module_mapping = LORA_TARGETS

    def adapt(self, target: nn.Module, path: str, adapter_name: str, config: LoraConfig) -> nn.Module:
        r = by_pattern(config.rank_pattern, path, config.r)
        alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
        if isinstance(target, Linear):
            target.update_layer(adapter_name, r, alpha, config)
            return target
        if is_bypassed(target):
            raise ValueError(
                f"LoRA cannot adapt {path}: torch.nn.MultiheadAttention uses the weight of this layer without calling "
                "it, so the adapter would never run. Leave it out with exclude_modules"
            )
        if isinstance(target, BaseTunerLayer) or not (is_dense_linear(target) or quantized_weight(target) is not None):
            raise ValueError(
                f"LoRA cannot adapt {path}, a {type(target).__name__}: it adapts torch.nn.Linear, bitsandbytes' "
                "Linear4bit and Linear8bitLt, and peft_fast.QuantizedLinear so far. Name other target_modules or use "
                "exclude_modules"
            )
        without_fan_in_fan_out(config)
        return Linear(target, adapter_name, config=config, r=r, lora_alpha=alpha)
