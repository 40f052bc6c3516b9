"""VeraModel: the projections that its layers share."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_fast.tuners._buffer_dict import BufferDict
from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.base_weight import HALF_DTYPES, linear_features
from peft_fast.tuners.kinds import layer_class
from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.options import check_rank_fits
from peft_fast.tuners.targets import VERA_TARGETS

from .config import VeraConfig
from .layer import Linear, VeraLayer

KEYS = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}  # in a file


class VeraModel(BaseTuner):
    """`model` with VeRA adapters in it. `vera_A`, `vera_B`: the projections, by adapter.

    All adapters have one projection_prng_key, and save their projections or none does. An adapter of the same rank as
    one that is there gets the same numbers, where that one's projections are large enough for its layers.
    """

    prefix = "vera_lambda_"
    uses_shared_state = True
    target_module_mapping = VERA_TARGETS
    layer_classes: ClassVar = {nn.Linear: Linear}
    adapts_conv1d = True
    vera_A: BufferDict
    vera_B: BufferDict

    def before_layers(self, adapter_name: str, config: VeraConfig, paths: list[str]) -> None:
        self._check_alike(config)
        if "vera_A" not in self._modules:
            there = next((layer for _, layer in self.layers() if isinstance(layer, VeraLayer)), None)
            self.vera_A = there.vera_A if there else BufferDict(persistent=config.save_projection)
            self.vera_B = there.vera_B if there else BufferDict(persistent=config.save_projection)
        if not self.peft_config:  # after the last adapter was deleted, too
            self.vera_A.persistent = self.vera_B.persistent = config.save_projection
        K, N = self._largest(paths)
        with torch.device("cpu"):  # also where weights are made on the meta device: a file need not have these
            for name in self.vera_A:
                A, B = self.vera_A[name], self.vera_B[name]
                if A.shape[0] == config.r and A.shape[1] >= K and B.shape[0] >= N:
                    self.vera_A[adapter_name], self.vera_B[adapter_name] = A.clone(), B.clone()
                    return
            generator = torch.Generator().manual_seed(config.projection_prng_key)
            self.vera_A[adapter_name] = _drawn((config.r, K), generator)
            self.vera_B[adapter_name] = _drawn((N, config.r), generator)

    def _check_alike(self, config: VeraConfig) -> None:
        for name in ("projection_prng_key", "save_projection"):
            others = {getattr(other, name) for other in self.peft_config.values()}
            if others - {getattr(config, name)}:
                raise ValueError(
                    f"{name} must be the same for all VeRA adapters of a model: it is {others.pop()!r} for those that "
                    f"are there, got {getattr(config, name)!r}. Give the new one the same, or a model of its own"
                )

    def _largest(self, paths: list[str]) -> tuple[int, int]:
        """The largest (K, N) among the layers at these paths."""
        sizes = []
        for path in paths:
            target = self.model.get_submodule(path)
            layer_class(self, target, path)  # which says of others that they cannot be adapted
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            sizes.append(linear_features(base))
        return max(K for K, _ in sizes), max(N for _, N in sizes)

    def layer_options(self, path: str, config: Any) -> dict[str, Any]:
        return {"vera_A": self.vera_A, "vera_B": self.vera_B}

    def _cast_to_float32(self, adapter_name: str) -> None:
        super()._cast_to_float32(adapter_name)
        for shared in (self.vera_A, self.vera_B):
            if shared[adapter_name].dtype in HALF_DTYPES:
                shared[adapter_name] = shared[adapter_name].float()

    def shared_keys(self, adapter_name: str, prefix: str) -> dict[str, str]:
        config: Any = self.peft_config[adapter_name]
        first = self._first_path(adapter_name)
        if not config.save_projection or first is None:
            return {}
        return {key: f"{prefix}{first}.{name}.{adapter_name}" for name, key in KEYS.items()}

    def _first_path(self, adapter_name: str) -> str | None:
        """Of the layers with the adapter: they all have the same projections."""
        paths = (p for p, layer in self.layers() if isinstance(layer, VeraLayer) and adapter_name in layer.r)
        return next(paths, None)

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        """With room made for projections of another size than those that were drawn: the file's count."""
        config: Any = self.peft_config[adapter_name]
        there = [key for key in KEYS.values() if key in state_dict]
        if config.save_projection:
            if len(there) < len(KEYS):
                raise ValueError(
                    "the config says that the file has VeRA's projections (save_projection=True), and they are not in "
                    "it: set save_projection to false in adapter_config.json to have them drawn from "
                    "projection_prng_key"
                )
            self._make_room(state_dict[KEYS["vera_A"]], state_dict[KEYS["vera_B"]], adapter_name)
            return state_dict
        if there:
            warnings.warn(
                "the file has VeRA's projections, and its config says to leave them (save_projection=False): they are "
                "drawn from projection_prng_key. save_projection=True loads them",
                stacklevel=5,
            )
        else:
            warnings.warn(
                "VeRA's projections are drawn from projection_prng_key, as save_projection=False: on another platform "
                "than the adapter's they may be others",
                stacklevel=5,
            )
        return {key: value for key, value in state_dict.items() if key not in there}

    def _make_room(self, A: Any, B: Any, adapter_name: str) -> None:
        path = self._first_path(adapter_name)
        if path is None or not (isinstance(A, Tensor) and isinstance(B, Tensor) and A.dim() == B.dim() == 2):
            return  # what does not fit is refused by its shape
        layer: Any = self.model.get_submodule(path)
        mine = [other for _, other in self.layers() if isinstance(other, VeraLayer) and adapter_name in other.r]
        r, K, N = layer.r[adapter_name], max(o.in_features for o in mine), max(o.out_features for o in mine)
        if A.shape[0] == B.shape[1] == r and A.shape[1] >= K and B.shape[0] >= N:
            for shared, value in ((layer.vera_A, A), (layer.vera_B, B)):
                if shared[adapter_name].shape != value.shape:
                    shared[adapter_name] = shared[adapter_name].new_empty(value.shape)

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        check_rank_fits([config.r], tensors)


def _drawn(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming's uniform numbers of a matrix of this shape, with a fan-in of its columns."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
