"""Tensors that are not trained and that all layers of a model share: drawn from a seed, and in files where the config
says so (save_projection). A method says what they are called, how they are drawn, and for what they are large enough.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._buffer_dict import BufferDict
from .base import BaseTuner
from .base_weight import HALF_DTYPES, linear_features
from .kinds import layer_class
from .layer import BaseTunerLayer
from .method import AddedLayer
from .options import check_rank_fits


class SharingLayer(AddedLayer):
    """A layer with the model's tensors as attributes: `shared` are their names, {adapter: tensor} each."""

    shared: ClassVar[tuple[str, ...]]
    adds_to_weight = True

    def update_layer(self, adapter_name: str, *, config: Any, **options: Any) -> None:
        for name, of_model in zip(self.shared, options["tensors"]):
            setattr(self, name, of_model)
        super().update_layer(adapter_name, config=config)

    def adapter_state_keys(self, adapter_name: str) -> dict[str, str]:
        """With the shared tensors, which every layer has in a file, as in peft."""
        own = super().adapter_state_keys(adapter_name)
        saved = [name for name in self.shared if own and getattr(self, name).persistent]
        return own | {name: f"{name}.{adapter_name}" for name in saved}


class SharingTuner(BaseTuner):
    """Adapters of one projection_prng_key, which save the shared tensors all or none. A new one that saves them gets
    those of one that is there, where they are large enough for each of its layers."""

    layer_type: ClassVar[type[SharingLayer]]

    def draw(self, config: Any, smaller: int, larger: int) -> tuple[Tensor, ...]:
        """In the order of `shared`, on the CPU. `smaller`, `larger`: the widest input and the widest output."""
        raise NotImplementedError

    def suffices(self, config: Any, tensors: tuple[Tensor, ...], smaller: int, larger: int) -> bool:
        """Whether they are for layers whose smaller and larger sizes are these at most."""
        raise NotImplementedError

    def before_layers(self, adapter_name: str, config: Any, paths: list[str]) -> None:
        for name in ("projection_prng_key", "save_projection"):
            there = {getattr(other, name) for other in self.peft_config.values()}
            if there - {getattr(config, name)}:
                raise ValueError(
                    f"{name} must be the same for all adapters of a model: it is {there.pop()!r} for those that are "
                    f"there, got {getattr(config, name)!r}. Give the new one the same, or a model of its own"
                )
        layers = [layer for _, layer in self.layers() if isinstance(layer, SharingLayer)]
        new = [BufferDict(persistent=config.save_projection) for _ in self.layer_type.shared]
        self.tensors = tuple(getattr(layers[0], name) for name in layers[0].shared) if layers else tuple(new)
        sizes = [self._sizes(path) for path in paths]
        needed = max(map(min, sizes)), max(map(max, sizes))  # type: ignore[type-var]
        for values in zip(*(of_model.values() for of_model in self.tensors)):
            if config.save_projection and self.suffices(config, values, *needed):
                break
        else:
            smaller, larger = sorted(max(of_axis) for of_axis in zip(*sizes))
            with torch.device("cpu"):  # also where weights are made on the meta device: a file need not have these
                values = self.draw(config, smaller, larger)
        for of_model, value in zip(self.tensors, values):
            of_model[adapter_name] = value

    def _sizes(self, path: str) -> tuple[int, int]:
        target: nn.Module = self.model.get_submodule(path)
        layer_class(self, target, path)  # which says of others that they cannot be adapted
        return linear_features(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target)

    def layer_options(self, path: str, config: Any) -> dict[str, Any]:
        return {"tensors": self.tensors}

    def _cast_to_float32(self, adapter_name: str) -> None:
        super()._cast_to_float32(adapter_name)
        for of_model in self.tensors:
            if of_model[adapter_name].dtype in HALF_DTYPES:
                of_model[adapter_name] = of_model[adapter_name].float()

    def shared_keys(self, adapter_name: str, prefix: str) -> dict[str, str]:
        config: Any = self.peft_config[adapter_name]
        having = self._having(adapter_name)
        if not having or not config.save_projection:
            return {}
        path, layer = having[0]
        return {f"base_model.{name}": f"{prefix}{path}.{name}.{adapter_name}" for name in layer.shared}

    def _having(self, adapter_name: str) -> list[tuple[str, SharingLayer]]:
        found = ((path, layer) for path, layer in self.layers() if isinstance(layer, SharingLayer))
        return [(path, layer) for path, layer in found if layer.has_adapter(adapter_name)]

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        """With room made for tensors of another size than those that were drawn, as of an adapter that had another's:
        the file's count."""
        having = self._having(adapter_name)
        for path, layer in having[:1]:
            own = [getattr(layer, name) for name in layer.shared]
            values: Any = tuple(state_dict.get(f"{prefix}{path}.{name}") for name in layer.shared)
            if not all(
                isinstance(value, Tensor) and value.ndim == o[adapter_name].ndim for value, o in zip(values, own)
            ):
                continue  # what does not fit is refused by its shape
            sizes = [one.weight_shape() for _, one in having]
            if self.suffices(self.peft_config[adapter_name], values, max(map(min, sizes)), max(map(max, sizes))):
                for value, of_model in zip(values, own):
                    of_model[adapter_name] = of_model[adapter_name].new_empty(value.shape)
        return state_dict

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        check_rank_fits([config.r], tensors)
