"""Modules that are trained whole: the config option modules_to_save."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from .base_weight import quantized_weight
from .layer import AdapterHolder, BaseTunerLayer
from .mixed_batch import one_by_one
from .offload import trainable_copy


class AuxiliaryTrainingWrapper(nn.Module):
    """What stands in the place of a module that is trained beside the adapters of a method."""

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """{key in a file: name in this module}; transformers' load_adapter asks for it."""
        holder: Any = getattr(self, "token_adapter", self)
        return {
            (key if holder is self else f"token_adapter.{key}"): (name if holder is self else f"token_adapter.{name}")
            for key, name in holder.adapter_state_keys(adapter_name).items()
        }


class ModulesToSaveWrapper(AdapterHolder, AuxiliaryTrainingWrapper):
    """Stands in the place of `original_module`; each adapter has a trained copy of it.

    One copy at most is active. A file holds the copy under the module's own name.
    """

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()

    @property
    def _adapters(self) -> set[str]:
        return set(self.modules_to_save)

    def add_adapter(self, adapter_name: str, tied_module: Any = None) -> None:
        """`tied_module`: the copy's weight is this one's, as the original's weight is shared with another's."""
        self.modules_to_save[adapter_name] = trainable_copy(self.original_module)
        if tied_module is not None:
            self.modules_to_save[adapter_name].weight = tied_module.weight

    def check_set_adapter(self, adapter_names: Sequence[str]) -> None:
        here = [name for name in adapter_names if name in self.modules_to_save]
        if len(here) > 1:
            raise ValueError(
                f"adapters {here} each have a copy of the same module in modules_to_save, and outputs of whole modules "
                "cannot be summed: take one of them"
            )

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        super().set_adapter([name for name in names if name in self.modules_to_save], inference_mode)

    def adapter_state_keys(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.modules_to_save:
            return {}
        keys = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in keys}

    @property
    def current(self) -> nn.Module:
        """The module that answers now: the active adapter's copy or the original."""
        return self.module_of([] if self.disable_adapters else self.active_adapters)

    def module_of(self, adapter_names: Sequence[str]) -> nn.Module:
        """The copy of these adapters (one of them has one at most), or the original."""
        here = [name for name in adapter_names if name in self.modules_to_save]
        return self.modules_to_save[here[0]] if here else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.mixed_batch is not None:
            return one_by_one(self, *args, **kwargs)
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What is asked of the module in whose place this stands (weight, in_features, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self._modules:  # being unpickled or copied
                raise
            return getattr(self.current, name)


def is_named(path: str, names: Collection[str]) -> bool:
    """Whether modules_to_save means the module at this path: by the letters at its end, as in peft, so that
    "classifier" is DistilBERT's pre_classifier too, and "norm" every input_layernorm."""
    return path.endswith(tuple(names))


def is_inside_named(path: str, names: Collection[str]) -> bool:
    """Whether modules_to_save means the module at this path or one that it lies in."""
    parts = path.split(".")
    return any(is_named(".".join(parts[:end]), names) for end in range(1, len(parts) + 1))


def wrap_to_save(model: nn.Module, path: str, adapter_name: str, tied_module: Any = None) -> ModulesToSaveWrapper:
    """Give the adapter a copy of the module at `path`; returns what stands there then."""
    module = model.get_submodule(path)
    wrapper = module if isinstance(module, ModulesToSaveWrapper) else ModulesToSaveWrapper(module)
    wrapper.add_adapter(adapter_name, tied_module)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, wrapper)
    return wrapper


def find_modules_to_save(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The paths of the modules that `names` (the ends of paths) mean. Raises ValueError where one is unfit."""
    found: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if not is_named(path, names) or path.startswith(tuple(f"{outer}." for outer in found)):
            continue
        check_trainable(path, module)
        found.append(path)
    if not found:
        ends = dict.fromkeys(path.rpartition(".")[2] for path, _ in model.named_modules() if path)
        raise ValueError(f"modules_to_save {sorted(names)} not found: the model's modules end in {', '.join(ends)}")
    return found


def check_trainable(path: str, module: nn.Module, option: str = "modules_to_save") -> None:
    """Raise ValueError where a copy of the module could not be trained in its place."""
    if isinstance(module, BaseTunerLayer):
        raise ValueError(f"{option} cannot hold {path}: adapters of the model adapt it, and it is theirs too")
    if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
        raise ValueError(f"{option} cannot hold {path}: a {type(module).__name__} is not called as a module")
    if any(quantized_weight(inner) is not None for inner in module.modules()):
        raise ValueError(f"{option} cannot hold {path}: its k-bit weight cannot be trained; keep it unquantised")
