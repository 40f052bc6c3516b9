"""AdaLoraModel: the schedule by which values are dropped, and the term that it adds to the loss."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.options import check_rank_fits
from peft_fast.tuners.targets import ADALORA_TARGETS

from .allocator import FACTORS, RankAllocator, in_file
from .config import AdaLoraConfig
from .layer import AdaLoraLayer, SVDConv2d, SVDLinear


class AdaLoraModel(BaseTuner):
    """`model` with AdaLoRA adapters in it, one of which at most is trained. Call `update_and_allocate` at every step.

    A loss in the model's outputs has the orthogonal regulariser of the trained adapter in it.
    """

    prefix = "lora_"
    target_module_mapping = ADALORA_TARGETS
    layer_classes: ClassVar = {nn.Conv2d: SVDConv2d, nn.Linear: SVDLinear}
    adapts_conv1d = True
    rankallocator: RankAllocator

    @property
    def trainable_adapter_name(self) -> str | None:
        """Which adapter is trained, if one is."""
        return next((name for name, config in self.peft_config.items() if _is_trained(config)), None)

    def put_in(
        self,
        adapter_name: str,
        config: Any,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        trained = None if self.is_mixed else self.trainable_adapter_name
        if trained is not None and not config.inference_mode:
            raise ValueError(
                f"AdaLoRA trains one adapter of a model, and {trained!r} is trained: set inference_mode=True in the "
                "config of the other, or delete that adapter"
            )
        super().put_in(adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if not config.inference_mode:
            self.rankallocator = RankAllocator(self.model, config, adapter_name)

    def layer_options(self, path: str, config: Any) -> dict[str, Any]:
        """A file's config says how many values its layers have left: in training all are there, some of them 0."""
        kept = (config.rank_pattern or {}).get(f"{path}.lora_E")
        return {"r": config.init_r if kept is None else sum(kept)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs)
        name = self.trainable_adapter_name
        if name is not None and isinstance(getattr(outputs, "loss", None), Tensor):
            term = self.peft_config[name].orth_reg_weight * self._orthogonality(name)  # type: ignore[attr-defined]
            outputs.loss = outputs.loss + term.to(outputs.loss.device)
        return outputs

    def _orthogonality(self, adapter_name: str) -> Tensor:
        """The mean of |A A^T - 1| and |B^T B - 1| over all layers."""
        terms: list[Tensor] = []
        for _, layer in self.layers():
            if isinstance(layer, AdaLoraLayer) and adapter_name in layer.r:
                for factor in (layer.lora_A[adapter_name], layer.lora_B[adapter_name].t()):
                    one = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
                    terms.append(torch.linalg.matrix_norm(factor @ factor.t() - one))
        device = terms[0].device
        return torch.stack([term.to(device) for term in terms]).mean()

    def update_and_allocate(self, global_step: int) -> None:
        """Estimate how important the singular values are, and drop some where the schedule says so.

        Call it in every training step, from step 0 on, after loss.backward() and before the gradients are set to zero:

            loss.backward(); optimizer.step(); model.base_model.update_and_allocate(step); optimizer.zero_grad()

        Raises ValueError, with nothing changed, where no adapter is trained, or where there are no gradients.
        """
        name = self.trainable_adapter_name
        if name is None:
            raise ValueError("no adapter is trained: all of their configs have inference_mode=True")
        config: Any = self.peft_config[name]
        last = config.total_step - config.tfinal
        if global_step < last:
            _, kept = self.rankallocator.update_and_allocate(self.model, global_step)
            config.rank_pattern = kept or config.rank_pattern
        elif global_step == last:
            _, config.rank_pattern = self.rankallocator.update_and_allocate(self.model, global_step, force_mask=True)
            self.rankallocator.reset_ipt()
        elif config.rank_pattern:
            self.rankallocator.mask_using_rank_pattern(self.model, config.rank_pattern)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("AdaLoRA's adapters cannot be combined, as each has other ranks: use LoRA")

    def _kept(self, path: str, adapter_name: str) -> Tensor | None:
        """Which of the layer's values training has kept, where it has dropped some and they are all still there."""
        config: Any = self.peft_config[adapter_name]
        pattern = {in_file(name): mask for name, mask in (config.rank_pattern or {}).items()}
        layer: Any = self.model.get_submodule(path)
        kept = pattern.get(f"{path}.lora_E")
        return torch.tensor(kept) if kept is not None and len(kept) == layer.r[adapter_name] else None

    def _paths(self, adapter_name: str) -> list[str]:
        return [p for p, layer in self.layers() if isinstance(layer, AdaLoraLayer) and adapter_name in layer.r]

    def to_file(self, adapter_name: str, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Without the values that were dropped."""
        for path in self._paths(adapter_name):
            kept = self._kept(path, adapter_name)
            for factor in FACTORS if kept is not None and not kept.all() else ():
                key = f"{prefix}{path}.{factor}"
                tensors[key] = tensors[key][:, kept] if factor == "lora_B" else tensors[key][kept]
        return tensors

    def config_for_file(self, adapter_name: str) -> Any:
        config: Any = copy.copy(self.peft_config[adapter_name])
        if config.rank_pattern:
            config.rank_pattern = {in_file(name): kept for name, kept in config.rank_pattern.items()}
        return config

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        """Of an adapter that is trained here, and whose file has only the values that were kept: with those that were
        dropped between them, as zeros."""
        state_dict = dict(state_dict)
        for path in self._paths(adapter_name):
            kept, own = self._kept(path, adapter_name), self.model.get_submodule(path)
            keys = {factor: f"{prefix}{path}.{factor}" for factor in FACTORS}
            values = [state_dict.get(key) for key in keys.values()]
            if kept is None or kept.all() or not all(isinstance(v, Tensor) and v.dim() == 2 for v in values):
                continue
            for factor, key in keys.items():
                value = state_dict[key] if factor != "lora_B" else state_dict[key].t()
                weights: Any = getattr(own, factor)[adapter_name].detach()
                whole = (weights if factor != "lora_B" else weights.t()).clone()
                if value.shape == (int(kept.sum()), whole.shape[1]):
                    whole[~kept.to(whole.device)] = 0
                    whole[kept.to(whole.device)] = value.to(whole)
                    state_dict[key] = whole if factor != "lora_B" else whole.t()
        return state_dict

    @classmethod
    def check_file(cls, config: AdaLoraConfig, tensors: Mapping[str, Any]) -> None:
        kept = [sum(mask) for mask in (config.rank_pattern or {}).values()]
        check_rank_fits([config.init_r, *kept], tensors)


def _is_trained(config: Any) -> bool:
    return isinstance(config, AdaLoraConfig) and not config.inference_mode
