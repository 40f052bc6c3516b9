"""PeftMixedModel: adapters of different methods on one model, for inference."""

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from .config import PeftConfig
from .model import PeftModel
from .tuners.base import BaseTuner
from .tuners.mixed import MixedModel, check_compatible
from .tuners.names import list_of_names


class PeftMixedModel(PeftModel):
    """`model` with an adapter in it, to which adapters of other methods can be added: LoRA, AdaLoRA, LoHa, LoKr, OFT,
    SHiRA.

    `get_peft_model(..., mixed=True)` makes one, or `from_pretrained`. Active adapters are applied in the order in which
    they were loaded, whatever the order in which they were named. As in peft it has no task, so that heads are not
    trained unless modules_to_save names them, and it is not saved as a whole.
    Raises ValueError for a method that cannot be mixed; `model` is then unchanged.
    """

    @classmethod
    def _tuner_class(cls, config: PeftConfig) -> type[BaseTuner]:
        check_compatible(config)
        return MixedModel

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[PeftModel]:
        return cls

    def _learn_prompts(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str) -> None:
        check_compatible(peft_config)  # which prompts are not

    def _check_type(self, peft_config: PeftConfig) -> None:
        check_compatible(peft_config)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:  # type: ignore[override]
        """Activate one adapter or several, and train them, unless `inference_mode`."""
        self.base_model.set_adapter(adapter_name, inference_mode)
        self._label = None

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:  # type: ignore[override]
        """Remove one adapter or several."""
        names = [adapter_name] if isinstance(adapter_name, str) else list_of_names("adapter_name", adapter_name)
        self.base_model._check_known(names)
        for name in names:
            self.base_model.delete_adapter(name)
        self._label = None

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model with the adapters merged in: see BaseTuner.merge_and_unload."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self) -> nn.Module:
        """The base model as it was before."""
        return self.base_model.unload()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "a mixed model is not saved as a whole, in peft neither: save each adapter from a model of its own method"
        )

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        raise NotImplementedError("a mixed model is not saved, and so has no model card")
