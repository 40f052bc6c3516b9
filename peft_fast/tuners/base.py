"""BaseTuner: adapters of one method in one model. The mechanism that all methods share.

A method is a config class, its layer classes, and a subclass of BaseTuner that says

    prefix, target_module_mapping       what its parameters are called, what it adapts unasked
    layer_classes                       {kind of layer of the base model: the class that takes its place}
    layer_options(path, config)         what such a layer is made with, beside its config

and gets from here: which modules are meant, putting layers in and taking them out, what is trainable, activation,
merging, and the keys of its files. Everything that changes the structure of the model happens completely or not at all.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_fast.config import PeftConfig
from peft_fast.quant import bitsandbytes
from peft_fast.transaction import unchanged_on_error

from .auxiliary import Auxiliary, bias_keys, check_biases
from .base_weight import HALF_DTYPES, is_conv1d
from .kinds import layer_class
from .layer import AdapterHolder, BaseTunerLayer, holders_in
from .matching import adaptable_paths, find_targets, resolved_targets, targets_in
from .merging import Merging
from .modules_to_save import ModulesToSaveWrapper
from .names import check_adapter_name
from .options import set_fan_in_fan_out
from .slow_patterns import check_patterns_end
from .tied import plan_ties, warn_of_adapting


class BaseTuner(Merging):
    """`model` with the adapters of `peft_config` in it; attributes that this class lacks are the model's."""

    prefix: str
    uses_shared_state = False  # whether its layers share weights that are not theirs alone (VeRA's projections)
    target_module_mapping: Mapping[str, list[str] | str]
    # nn.Linear stands for k-bit linear layers too, and for transformers' Conv1D where `adapts_conv1d`.
    layer_classes: ClassVar[Mapping[type[nn.Module], type[BaseTunerLayer]]] = {}
    adapts_conv1d = False
    is_mixed = False  # whether other methods' adapters may be in the model too (mixed.py)
    minds_ties = True  # whether it warns of layers that share their weight with others

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        self._start(model, {}, [adapter_name])
        config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        self.put_in(adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    @classmethod
    def around(cls, model: nn.Module, peft_config: dict[str, PeftConfig]) -> "BaseTuner":
        """A tuner for a model that the adapters of `peft_config` are in already; new ones get into that dict too."""
        tuner = cls.__new__(cls)
        tuner._start(model, peft_config, [])
        tuner.active_adapters = next((list(layer.active_adapters) for _, layer in tuner.layers()), [])
        return tuner

    def _start(self, model: nn.Module, peft_config: dict[str, PeftConfig], active_adapters: list[str]) -> None:
        super().__init__()
        self.model = model
        self.peft_config = peft_config
        self.active_adapters = active_adapters
        self.targeted_module_names: list[str] = []
        self._tied_targets: tuple[str, ...] = ()  # of the adapter that is being put in: see plan_ties
        self._kept_unpacked: list[nn.Module] = []  # bitsandbytes' layers that would repack their weights, and may not

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @active_adapter.setter
    def active_adapter(self, names: str | Sequence[str]) -> None:
        """Which adapters a call without names means, and new layers start with; the layers that are there stay."""
        self.active_adapters = [names] if isinstance(names, str) else list(names)

    def adapt(self, target: nn.Module, path: str, adapter_name: str, config: Any) -> nn.Module:
        """The layer with the new adapter in it: one around `target`, or `target` itself if it is ours."""
        options = self.layer_options(path, config)
        if type(target) in self.layer_classes.values():
            layer: Any = target
            layer.update_layer(adapter_name, config=config, **options)
            return layer
        cls: Any = layer_class(self, target, path)
        if hasattr(config, "fan_in_fan_out"):
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            set_fan_in_fan_out(config, is_conv1d(base))
        return cls(target, adapter_name, config=config, **options)

    def before_layers(self, adapter_name: str, config: Any, paths: list[str]) -> None:
        """Called before the layers at `paths` are adapted: for what they share."""

    def layer_options(self, path: str, config: Any) -> dict[str, Any]:
        return {}

    def find_parameters(self, config: Any, state_dict: Mapping[str, Any] | None) -> list[tuple[str, str]]:
        return []  # (path of the module, name) of parameters that are to be adapted though they are no layers'

    def adapt_parameter(self, path: str, name: str, adapter_name: str, config: Any) -> nn.Module:
        raise NotImplementedError  # what stands at `path` once the adapter is on that parameter

    def steps(self, paths: list[str], config: Any) -> Iterable[str]:
        return paths  # one by one, as their layers are adapted: some methods take long over each

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        """Raise ValueError where layers as `config` wants them cannot be those of a file with these tensors: before
        memory is taken for them. Methods with a size in their config say what it may be."""

    @staticmethod
    def get_model_config(model: Any) -> dict[str, Any]:
        """The options of a model's config; {"model_type": "custom"} for a model without one."""
        config: Any = getattr(model, "config", {"model_type": "custom"})
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)

    def put_in(
        self,
        adapter_name: str,
        config: Any,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Put a new adapter into the model; it is active and trainable if it is the first, and else neither.

        `autocast_adapter_dtype`: weights that would be fp16 or bf16 are kept in fp32. `low_cpu_mem_usage`: weights are
        made on the meta device, for a file to be loaded over them. `state_dict`: its keys say which layers are adapted.
        Raises ValueError (no such target, a kind of layer that cannot be adapted, ...) with model and config unchanged.
        """
        check_adapter_name(adapter_name, self.peft_config)
        config.check()
        check_patterns_end(config, adaptable_paths(self.model))
        check_biases(config, self.peft_config)
        resolved = self._resolved_targets(config) if state_dict is None else targets_in(self, state_dict, config)
        ties = plan_ties(self.model, config, resolved)
        auxiliary = Auxiliary(self.model, config, ties)
        parameters = self.find_parameters(config, state_dict)
        keys = [f"{path}.{name}" for path, name in parameters]
        paths = auxiliary.in_order(find_targets(self.model, auxiliary.config, ties.target_modules, keys))
        active = self.active_adapters if self.peft_config else [adapter_name]
        before = {holder for _, holder in self.holders()}
        kept = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        with unchanged_on_error(self), torch.device("meta") if low_cpu_mem_usage else nullcontext():
            self._keep_unpacked()
            self._tied_targets = ties.targets
            self.before_layers(adapter_name, config, paths)
            adapted: dict[nn.Module, nn.Module] = {}  # a module under several names gets one layer
            for path in self.steps(paths, config):
                target = self.model.get_submodule(path)
                if target not in adapted:
                    layer = self.adapt(target, path, adapter_name, config)
                    adapted |= {target: layer, layer: layer}
                self._replace(path, adapted[target])
            for path, name in parameters:
                self._replace(path, self.adapt_parameter(path, name, adapter_name, config))
            auxiliary.wrap(adapter_name)
            if autocast_adapter_dtype:
                self._cast_to_float32(adapter_name)
            self._start_adapter(adapter_name, config, active, before, kept)
        if self.minds_ties and not (ties.targets or ties.saved):
            warn_of_adapting(self.model, [*paths, *auxiliary.saved])
        config.target_modules, config.modules_to_save = ties.target_modules, ties.modules_to_save
        self.peft_config[adapter_name] = config
        self.active_adapters = active
        self.targeted_module_names += [path for path in paths if path not in self.targeted_module_names]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """peft's way to `put_in`: the config is in `self.peft_config` already, under the adapter's name.

        `model`: the one that this tuner is for. Raises KeyError without such a config, ValueError as `put_in` does.
        """
        if model is not self.model and self not in model.modules():
            raise ValueError(
                f"inject_adapter changes the model of this {type(self).__name__}, got another {type(model).__name__}"
            )
        config = self.peft_config[adapter_name]
        if any(adapter_name in holder.available_adapters() for _, holder in self.holders()):
            raise ValueError(f"adapter {adapter_name!r} is in the model already: delete it first")
        with unchanged_on_error(self, config):
            del self.peft_config[adapter_name]
            self.put_in(adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _start_adapter(self, name: str, config: Any, active: list[str], before: set[Any], kept: list[Any]) -> None:
        """Say what is active and trainable. `before`: the holders of before; `kept`: what was trained then, or not."""
        first = not self.peft_config
        off = bool(before) and all(holder.disable_adapters for holder in before)
        for _, holder in self.holders():
            if first or holder not in before:
                holder.set_adapter(active, config.inference_mode)
                holder.enable_adapters(not off)
            else:  # what is active and what is paused in it is not this adapter's business
                holder.set_requires_grad(name, False)
        if first:
            self._freeze_base(config)
            return
        for parameter, requires_grad in kept:
            parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. Was it the only active one, the first that is left takes its place, with a warning."""
        self._check_known([adapter_name])
        for path, layer in self.layers():
            if adapter_name in layer.merged_adapters:
                raise ValueError(f"adapter {adapter_name!r} is merged into {path}: call unmerge_adapter first")
        for _, holder in self.holders():
            holder.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        if not self.peft_config:
            self._allow_repacking()
        if adapter_name not in self.active_adapters:
            return
        left = [name for name in self.active_adapters if name != adapter_name]
        if not left and self.peft_config:
            left = [next(iter(self.peft_config))]
            warnings.warn(f"the active adapter {adapter_name!r} was deleted: {left[0]!r} is active now", stacklevel=3)
        self.active_adapters = left
        self._set_active(left, inference_mode=bool(left) and self.peft_config[left[0]].inference_mode)

    def _resolved_targets(self, config: Any) -> set[str] | str:
        return resolved_targets(self.model, config.target_modules, self.target_module_mapping, config.task_type)

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)

    def _cast_to_float32(self, adapter_name: str) -> None:
        for parameter in (p for _, layer in self.layers() for p in layer.adapter_parameters(adapter_name)):
            if parameter.dtype in HALF_DTYPES or parameter.dtype.itemsize == 1:  # of 8 bits: of layerwise casting
                parameter.data = parameter.data.float()

    def _freeze_base(self, config: Any) -> None:
        """Train the adapters only, and the biases that the config asks for."""
        ours = {id(p) for _, h in self.holders() for name in h.available_adapters() for p in h.adapter_parameters(name)}
        for parameter in self.model.parameters():
            if id(parameter) not in ours:
                parameter.requires_grad_(False)
        if not config.inference_mode:
            parameters = dict(self.model.named_parameters())
            replaced = tuple(
                f"{path}.original_module." for path, h in self.holders() if isinstance(h, ModulesToSaveWrapper)
            )
            for key in bias_keys(self, config):
                if not key.startswith(replaced):  # it would never run: a trained copy does
                    parameters[key].requires_grad_(True)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter or several active (their outputs add up), trainable unless `inference_mode`.

        Merged adapters are unmerged first, with a warning.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        for _, holder in self.holders():
            holder.check_set_adapter(names)
        if any(layer.merged for _, layer in self.layers()):
            warnings.warn("the merged adapters are unmerged before another adapter is set", stacklevel=2)
            self.unmerge_adapter()
        self._set_active(names, inference_mode)
        self.active_adapters = names

    def _set_active(self, names: Sequence[str], inference_mode: bool) -> None:
        for _, holder in self.holders():
            holder.set_adapter(names, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self._check_known([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        for _, holder in self.holders():
            holder.set_requires_grad(adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        for _, holder in self.holders():
            holder.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: outputs are the base model's, except for biases that were trained."""
        for name in self.active_adapters:
            if getattr(self.peft_config[name], "bias", "none") != "none":
                warnings.warn(f"adapter {name!r} trained biases of the base model: they stay as trained", stacklevel=3)
        for _, holder in self.holders():
            holder.enable_adapters(False)

    @contextmanager
    def disabled_adapters(self) -> Iterator[None]:
        """All adapters are off within the block; those that were off before stay so after it."""
        off = {holder for _, holder in self.holders() if holder.disable_adapters}
        all_off = all(holder in off for _, holder in self.holders())
        self.disable_adapter_layers()
        try:
            yield
        finally:
            for _, holder in self.holders():  # those that the block added, too
                if holder not in off and not all_off:
                    holder.enable_adapters(True)

    def _check_known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"adapter {unknown[0]!r} does not exist: there are {sorted(self.peft_config)}")

    def _keep_unpacked(self) -> None:
        """Keep bitsandbytes' 4-bit layers, adapted or not, from repacking their weights in eval mode on a CPU: after
        that no gradient passes them, and training learns next to nothing, silently (quant/bitsandbytes.py)."""
        self._kept_unpacked += [module for module in self.model.modules() if bitsandbytes.stop_repacking(module)]

    def _allow_repacking(self) -> None:
        for layer in self._kept_unpacked:
            bitsandbytes.allow_repacking(layer)
        self._kept_unpacked.clear()

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        return state_dict  # an adapter's tensors, as the model is today; keys begin with `prefix`

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether convert_to_lora can make LoRA of the adapter, in every layer that has it."""
        mine = [layer for _, layer in self.layers() if layer.has_adapter(adapter_name)]
        return bool(mine) and all(layer.supports_lora_conversion(adapter_name) for layer in mine)

    def state_keys(self, adapter_name: str) -> dict[str, str]:
        """{key in the adapter's file: key in self.model.state_dict()}: what is saved, and where it is loaded to."""
        self._check_known([adapter_name])
        keys = {
            f"{path}.{in_file}": f"{path}.{in_model}"
            for path, holder in self.holders()
            for in_file, in_model in holder.adapter_state_keys(adapter_name).items()
        }
        return keys | {key: key for key in bias_keys(self, self.peft_config[adapter_name])}

    def shared_keys(self, adapter_name: str, prefix: str) -> dict[str, str]:
        """{key in the adapter's file: name in the PeftModel} of what its layers share. `prefix`: of self.model."""
        return {}

    def to_file(self, adapter_name: str, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return tensors  # as they go into the adapter's file; keys begin with `prefix`

    def config_for_file(self, adapter_name: str) -> Any:
        return self.peft_config[adapter_name]

    def check_values(self, values: Mapping[str, Tensor]) -> None:
        """Raise ValueError for tensors of a file, by name in self.model, that have the right shapes and no sense."""

    def holders(self) -> Iterator[tuple[str, AdapterHolder]]:
        """(path, module) of everything that holds adapters."""
        return holders_in(self.model)

    def layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        """(path, layer) of every adapted layer."""
        return ((path, holder) for path, holder in self.holders() if isinstance(holder, BaseTunerLayer))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__.get("_modules", {}):  # being unpickled or copied
                raise
            return getattr(self.model, name)
