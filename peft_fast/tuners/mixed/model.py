"""MixedModel: adapters of several methods in one model, on the same layers too.

Each adapter is put in by its own method's tuner. Where a layer has adapters of several methods, the layer of the later
one is around that of the earlier one, and calls it: so they are applied in the order in which they were loaded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.config import PeftConfig
from peft_fast.peft_types import PeftType
from peft_fast.transaction import unchanged_on_error
from peft_fast.tuners.adalora import AdaLoraModel
from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.base_weight import quantized_weight
from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.loha import LoHaModel
from peft_fast.tuners.lokr import LoKrModel
from peft_fast.tuners.lora import LoraModel
from peft_fast.tuners.lora.groups import ungroup_siblings
from peft_fast.tuners.lora.layer import LoraLayer
from peft_fast.tuners.lora.mlp import restore_mlps
from peft_fast.tuners.lora.norms import restore_norms
from peft_fast.tuners.names import list_of_names
from peft_fast.tuners.oft import OFTModel
from peft_fast.tuners.oft.layer import OFTLayer
from peft_fast.tuners.shira import ShiraModel
from peft_fast.tuners.targets import LORA_TARGETS

COMPATIBLE: dict[PeftType, type[BaseTuner]] = {
    PeftType.LORA: LoraModel,
    PeftType.LOHA: LoHaModel,
    PeftType.OFT: OFTModel,
    PeftType.LOKR: LoKrModel,
    PeftType.ADALORA: AdaLoraModel,
    PeftType.SHIRA: ShiraModel,
}
COMPATIBLE_TUNER_TYPES = tuple(COMPATIBLE)


class MixedModel(BaseTuner):
    """`model` with adapters of COMPATIBLE methods in it."""

    prefix = ""
    target_module_mapping = LORA_TARGETS

    def put_in(
        self,
        adapter_name: str,
        config: Any,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        check_compatible(config)
        if any(quantized_weight(module) is not None for module in self.model.modules()):
            raise ValueError(
                "a mixed model cannot have k-bit layers: merging several methods into one would round between them. "
                "Use one method, or dequantise the model"
            )
        with unchanged_on_error(self, config):
            tuner = self._of(config)
            tuner.active_adapters = list(self.active_adapters)
            tuner.put_in(adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            self._check_magnitudes()
            self.active_adapters = tuner.active_adapters
            self.targeted_module_names += [
                path for path in tuner.targeted_module_names if path not in self.targeted_module_names
            ]

    def _of(self, config: Any) -> BaseTuner:
        """What manages the adapters of one method."""
        tuner = COMPATIBLE[PeftType(config.peft_type)].around(self.model, self.peft_config)
        tuner.is_mixed = True
        return tuner

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        return self._of(self.peft_config[adapter_name]).as_today(state_dict, prefix, adapter_name)

    def check_values(self, values: Mapping[str, Tensor]) -> None:
        for config in {config.peft_type: config for config in self.peft_config.values()}.values():
            self._of(config).check_values(values)

    def _check_magnitudes(self) -> None:
        for path, layer in self.layers():
            chain = [layer, *_inside(layer)]
            if len(chain) > 1 and any(isinstance(one, LoraLayer) and one.lora_magnitude_vector for one in chain):
                raise ValueError(
                    f"DoRA cannot share {path} with another method: its norms would be those of the base weight "
                    "alone. Leave the layer out of one of the two, or use plain LoRA"
                )

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, progressbar: bool = False
    ) -> None:
        """See BaseTuner. Raises ValueError where a rotation would be merged without what it is around, or before it:
        the rotation turns that too."""
        wanted = self.active_adapters if adapter_names is None else list_of_names("adapter_names", adapter_names)
        for path, layer in self.layers():
            turned = layer.merged or any(name in wanted for name in layer.adapters_in_effect())
            for inner in _inside(layer) if isinstance(layer, OFTLayer) else ():
                left = [name for name in inner.adapters_in_effect() if name not in wanted]
                late = [name for name in wanted if inner.has_adapter(name) and name not in inner.merged_adapters]
                if (turned and left) or (layer.merged and late):
                    raise ValueError(
                        f"{path} rotates what {left or late} put out too, so these have to be merged before it or with "
                        f"it: merge all active adapters at once, got {wanted}"
                    )
        super().merge_adapter(adapter_names, safe_merge, progressbar)

    def merge_to_16bit(
        self,
        dtype: torch.dtype = torch.bfloat16,
        adapter_names: Sequence[str] | None = None,
        progressbar: bool = True,
    ) -> nn.Module:
        raise NotImplementedError("merge_to_16bit is not built for mixed models: call merge_and_unload(), then .to()")

    def _unload(self, with_copies_of: Sequence[str]) -> nn.Module:
        model = super()._unload(with_copies_of)
        restore_mlps(model)
        restore_norms(model)
        ungroup_siblings(model)
        return model


def _inside(layer: BaseTunerLayer) -> list[BaseTunerLayer]:
    """The layers of other methods that `layer` is around."""
    found: list[BaseTunerLayer] = []
    while isinstance(inner := (found[-1] if found else layer).base_layer, BaseTunerLayer):
        found.append(inner)
    return found


def check_compatible(config: PeftConfig) -> None:
    if config.peft_type not in [kind.value for kind in COMPATIBLE]:
        names = ", ".join(kind.value for kind in COMPATIBLE)
        raise ValueError(f"a mixed model can have adapters of the methods {names}, got {config.peft_type}")
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "a mixed model looks for no invocations, and the adapter would never be there: leave "
            "alora_invocation_tokens out, or use get_peft_model without mixed=True"
        )
