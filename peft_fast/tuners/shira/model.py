"""ShiraModel."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.options import check_rank_fits
from peft_fast.tuners.targets import SHIRA_TARGETS

from .layer import Linear

END = ".shira_indices"


class ShiraModel(BaseTuner):
    """`model` with SHiRA adapters in it."""

    prefix = "shira_"
    target_module_mapping = SHIRA_TARGETS
    layer_classes: ClassVar = {nn.Linear: Linear}

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        """peft on Windows writes indices as fp32."""

        def whole(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(torch.int) if floating and bool((value == value.trunc()).all()) else value

        return {key: whole(value) if key.endswith(END) else value for key, value in state_dict.items()}

    def check_values(self, values: Mapping[str, Tensor]) -> None:
        """Places that are not in the weight would be read and written somewhere else."""
        for name, value in values.items():
            path, found, _ = name.rpartition(f"{END}.")
            if not found:
                continue
            layer: Any = self.model.get_submodule(path.removeprefix("base_model.model."))
            size = torch.tensor([[layer.out_features], [layer.in_features]], device=value.device)
            if value.numel() and bool(((value < 0) | (value >= size)).any()):
                raise ValueError(
                    f"the shira_indices of {path} must be rows and columns of a weight {layer.out_features} x "
                    f"{layer.in_features}, and some in the file are not: it is damaged, or another model's"
                )

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        check_rank_fits([config.r], tensors)
