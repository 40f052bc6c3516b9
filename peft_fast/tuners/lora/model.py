"""LoraModel: which layers LoRA can adapt, and with which rank."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_fast.adapter_file import PREFIX
from peft_fast.errors import NoMatchingPeftModuleError
from peft_fast.renamed import renamed_keys
from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.base_weight import is_bypassed, is_conv1d, is_dense_linear, quantized_weight
from peft_fast.tuners.layer import BaseTunerLayer
from peft_fast.tuners.matching import adaptable_paths, by_pattern, embedding_of, matches
from peft_fast.tuners.modules_to_save import is_inside_named
from peft_fast.tuners.names import list_of_names
from peft_fast.tuners.options import set_fan_in_fan_out
from peft_fast.tuners.targets import LORA_TARGETS

from . import dora, initialisation
from .attention import EncoderLinear, MultiheadAttention
from .bnb import linear_class
from .combination import Combination, add_weighted_adapter
from .config import LoraConfig
from .conv import Conv1d, Conv2d, Conv3d
from .conversion import difference
from .embedding import Embedding
from .groups import group_siblings, ungroup_siblings
from .joined_experts import joined_experts
from .layer import Linear, LoraLayer
from .mlp import fuse_mlps, restore_mlps
from .moe import converted
from .norms import restore_norms
from .param_wrapper import ParamWrapper, parameter_names, wrappers_of
from .replication import Replication, replicate_layers
from .tied import TiedLinear

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # model types
READ_BY_MAMBA = ("conv1d", "out_proj")  # layers whose weights the fused kernels of these read without a call
MOST_REPLICAS = 1000  # layers that a file with fewer tensors may ask for
FAST_PATH = ("linear1", "linear2")  # layers whose weights torch.nn.TransformerEncoderLayer may read without a call
OTHER_LAYERS: dict[type[nn.Module], type[LoraLayer]] = {
    nn.Embedding: Embedding,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.MultiheadAttention: MultiheadAttention,
}


class LoraModel(BaseTuner):
    prefix = "lora_"
    target_module_mapping = LORA_TARGETS
    replication: Replication | None = None

    def adapt(self, target: nn.Module, path: str, adapter_name: str, config: LoraConfig) -> nn.Module:
        _check_mamba(self.model, path)
        r = by_pattern(config.rank_pattern, path, config.r)
        alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
        if path in self._tied_targets and not isinstance(target, TiedLinear):
            return self._tied(target, path, adapter_name, config=config, r=r, lora_alpha=alpha)
        if isinstance(target, LoraLayer):
            target.update_layer(adapter_name, r, alpha, config)
            return target
        custom = config.custom_class(target)
        if custom is not None:
            return _of_custom_class(custom, target, path, adapter_name, config=config, r=r, lora_alpha=alpha)
        cls = _layer_class(target, path)
        if issubclass(cls, Linear):
            set_fan_in_fan_out(config, is_conv1d(target))
            parent, _, name = path.rpartition(".")
            in_encoder = isinstance(self.model.get_submodule(parent), nn.TransformerEncoderLayer)
            if in_encoder and name in FAST_PATH and is_dense_linear(target):
                cls = EncoderLinear
        return cls(target, adapter_name, config=config, r=r, lora_alpha=alpha)

    def _tied(self, target: nn.Module, path: str, adapter_name: str, **arguments: Any) -> nn.Module:
        """For a layer that shares its weight with the input embedding: see TiedLinear.

        Other embeddings that share it (T5's, of encoder and decoder) get adapters of their own, as in peft.
        """
        source: Any = embedding_of(self.model, "get_input_embeddings")
        if isinstance(target, LoraLayer) and not isinstance(target, Embedding):
            raise ValueError(
                f"ensure_weight_tying: {path} has an adapter already that is not tied to the input embedding's, and "
                "all adapters of a layer have to be of one kind: leave the option out, or delete that adapter"
            )
        if not isinstance(source, Embedding):
            raise ValueError(f"ensure_weight_tying needs LoRA on the input embedding, and that is a {type(source)}")
        if is_dense_linear(target):
            return TiedLinear(target, adapter_name, tied_to=source, **arguments)
        warnings.warn(f"ensure_weight_tying: {path} is no output layer and gets an adapter of its own", stacklevel=2)
        if isinstance(target, Embedding):
            target.update_layer(adapter_name, arguments["r"], arguments["lora_alpha"], arguments["config"])
            return target
        return _layer_class(target, path)(target, adapter_name, **arguments)

    def find_parameters(self, config: LoraConfig, state_dict: Mapping[str, Any] | None) -> list[tuple[str, str]]:
        wanted = config.target_parameters or ()
        if not wanted:
            return []
        if state_dict is not None:
            raise ValueError("target_parameters are not found in a state_dict: leave that out, or them")
        found: list[tuple[str, str]] = []
        whole: list[str] = []  # in modules that are trained as a whole
        for path in adaptable_paths(self.model):
            module = self.model.get_submodule(path)
            there = wrappers_of(module)
            base: Any = module.get_base_layer() if isinstance(module, ParamWrapper) else module
            own = [name for name in parameter_names(base) if matches(wanted, f"{path}.{name}")]
            if is_inside_named(path, config.modules_to_save or ()):
                whole += [f"{path}.{name}" for name in own]
                continue
            if there and set(own) != there.keys():
                raise ValueError(
                    f"the adapters of {path} have to be on the same parameters: there are some on {sorted(there)}, and "
                    f"target_parameters names {sorted(own)}"
                )
            found += [(path, name) for name in own]
        if any(matches(wanted, name) for name, _ in self.model.named_parameters(recurse=False)):
            raise ValueError(
                f"target_parameters {sorted(wanted)} name a parameter of the model itself, not of a module"
            )
        if whole and not found:
            raise NoMatchingPeftModuleError(
                f"target_parameters {sorted(wanted)} name {len(whole)} parameters, and modules_to_save="
                f"{config.modules_to_save} takes all of them away: it trains them as they are"
            )
        if not found:
            raise NoMatchingPeftModuleError(f"target_parameters {sorted(wanted)} not found in the base model")
        met = [*(".".join(where) for where in found), *whole]
        if idle := {name for name in wanted if not any(matches({name}, path) for path in met)}:
            warnings.warn(f"target_parameters {sorted(idle)} match nothing", RuntimeWarning, stacklevel=4)
        return found

    def adapt_parameter(self, path: str, name: str, adapter_name: str, config: LoraConfig) -> nn.Module:
        r = by_pattern(config.rank_pattern, f"{path}.{name}", config.r)
        alpha = by_pattern(config.alpha_pattern, f"{path}.{name}", config.lora_alpha)
        module = self.model.get_submodule(path)
        wrapper = wrappers_of(module).get(name)
        if wrapper is not None:
            wrapper.update_layer(adapter_name, r, alpha, config)
            return module
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ParamWrapper):
            raise ValueError(f"{path} is in target_modules, and its {name} in target_parameters: leave out one of them")
        return ParamWrapper(module, adapter_name, parameter_name=name, config=config, r=r, lora_alpha=alpha)

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        """With the adapters of single experts joined, where transformers has joined the experts."""
        if not any(isinstance(layer, ParamWrapper) for _, layer in self.layers()):
            return state_dict
        lost = [key for key in state_dict if ".experts." in key]
        names = {key: prefix + name for key, name in renamed_keys(self.model, lost).items()}
        return joined_experts(state_dict, names)

    @classmethod
    def check_file(cls, config: LoraConfig, tensors: Mapping[str, Any]) -> None:
        initialisation.warn_of_chance(config.init_lora_weights)
        rank = max(config.r, *config.rank_pattern.values(), 0)
        largest = max((max(t.shape) for t in tensors.values() if isinstance(t, torch.Tensor) and t.dim()), default=0)
        if largest and rank > largest:
            raise ValueError(
                f"the config says rank {rank}, and the file's tensors do not fit that: none has a dimension above "
                f"{largest}. Are adapter_config.json and the weights of one adapter?"
            )
        layers = sum(end - start for start, end in config.layer_replication or ())
        if layers > max(len(tensors), MOST_REPLICAS):
            raise ValueError(f"the config wants {layers} layers (layer_replication), and the file is not for so many")
        tokens = config.trainable_token_indices or []
        most = max(map(len, tokens.values() if isinstance(tokens, dict) else [tokens]), default=0)
        if largest and most > largest:
            raise ValueError(
                f"the config names {most} tokens, and the file has no rows for them: none of its tensors has a "
                f"dimension above {largest}. Are adapter_config.json and the weights of one adapter?"
            )

    def put_in(
        self,
        adapter_name: str,
        config: Any,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        given, config = config, converted(self.model, config)
        with self._replicated(config):
            super().put_in(adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        vars(given).update(vars(config))
        self.peft_config[adapter_name] = given
        self._warn_of_missing_biases(adapter_name, config)
        self._warn_of_shared_weights(config)
        for _, layer in self.layers():
            if isinstance(layer, TiedLinear) and adapter_name in layer.lora_A:
                layer.tie(adapter_name)
            if not isinstance(layer, LoraLayer):
                continue
            if adapter_name in layer.starts:
                initialisation.unround(layer, adapter_name, layer.starts[adapter_name])
            if adapter_name in layer.lora_magnitude_vector:
                dora.unround(layer, adapter_name)
            layer.starts.pop(adapter_name, None)
        fuse_mlps(self.model)
        group_siblings(self.model)

    @contextmanager
    def _replicated(self, config: Any) -> Iterator[None]:
        """With the layers that the config wants to be there several times; as it was again if the block raises."""
        wanted = config.layer_replication and [list(one) for one in config.layer_replication]
        there = self.replication.ranges if self.replication is not None else None
        if not wanted or wanted == there:
            yield
            return
        if there is not None or self.peft_config:
            raise ValueError(
                f"layer_replication must be the first adapter's, {there}, got {wanted}: the layers of a model with "
                "adapters stay as they are"
            )
        config.check()
        done = replicate_layers(self.model, wanted)
        try:
            self.replication = done
            yield
        except BaseException:
            self.replication = None
            done.undo()
            raise

    def _merge(self, adapter_names: Any, safe_merge: bool, progressbar: bool, undoable: bool) -> None:
        self._refuse_to_merge_replicas()
        super()._merge(adapter_names, safe_merge, progressbar, undoable)

    def _refuse_to_merge_replicas(self) -> None:
        if self.replication is not None:
            raise ValueError(
                "adapters cannot be merged into replicated layers (layer_replication), which share their weights: keep "
                "them unmerged"
            )

    def steps(self, paths: list[str], config: Any) -> Iterable[str]:
        init = config.init_lora_weights
        if not (isinstance(init, str) and initialisation.SLOW.match(init)):
            return paths
        return tqdm(paths, desc=f"initialising by {init}", unit="layer", disable=None, leave=False)

    def _warn_of_shared_weights(self, config: LoraConfig) -> None:
        """Where a start is taken out of a weight that is not the layer's alone."""
        changed = [
            layer for _, layer in self.layers() if any(s.changes_base for s in getattr(layer, "starts", {}).values())
        ]
        if not changed:
            return
        places: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), []).append(name)
        shared = [names for layer in changed if len(names := places.get(id(layer.weight), [])) > 1]
        if shared:
            warnings.warn(
                f"init_lora_weights={config.init_lora_weights!r} changes a weight that several layers have, "
                f"{' and '.join(shared[0])}, and the adapter makes up for it in one of them: outputs are not the base "
                "model's any more. Untie them first (tie_word_embeddings=False), or leave the layer out",
                stacklevel=4,
            )

    def _warn_of_missing_biases(self, adapter_name: str, config: LoraConfig) -> None:
        if not config.lora_bias:
            return
        mine = [(path, layer) for path, layer in self.layers() if adapter_name in layer.available_adapters()]
        without = [path for path, layer in mine if getattr(layer.get_base_layer(), "bias", None) is None]
        if without:
            warnings.warn(
                f"lora_bias=True, and the base layer of {len(without)} targets, such as {without[0]}, has no bias: the "
                "adapter cannot be merged",
                stacklevel=4,
            )

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add a new adapter, neither active nor trained, made of `adapters` with these `weights`, also negative ones.

        combination_type: "svd" (the best of rank `svd_rank`, default the largest of the adapters', for the weighted sum
          of what they add), "cat" (that sum exactly, with the sum of the ranks), "linear" (A's and B's are added up: of
          adapters that were trained apart, a rough approximation), "ties", "dare_linear", "dare_ties" and
          "magnitude_prune" (likewise, pruned to a share `density` first), and the last four with "_svd" (the products
          are combined, not the factors). One adapter alone is always "linear". See utils/merge_utils.py.
        svd_clamp: a quantile of the factors' values, beyond which they are clamped. svd_driver: torch.linalg.svd's, on
          CUDA. svd_full_matrices has no effect: only the first svd_rank vectors are used, and no others are computed.
        majority_sign_method: "total" or "frequency", for "ties" and "dare_ties".
        Raises ValueError, and leaves the model as it was, for adapters that cannot be combined. One layer's product is
        in memory at a time. An adapter of this name that is there already stays as it is, with a warning.
        """
        wanted = Combination(
            list(list_of_names("adapters", adapters)), list(weights), combination_type, svd_rank, svd_clamp, svd_driver,
            density, majority_sign_method,
        )  # fmt: skip
        add_weighted_adapter(self, adapter_name, wanted)

    def subtract_mutated_init(
        self, output_state_dict: Mapping[str, Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, Tensor]:
        """An adapter's tensors less those of `adapter_name`, the same adapter before training, under a file's keys: a
        plain adapter of twice the rank. `save_pretrained` does so by itself. `kwargs`: {"state_dict": ...}, where the
        values of `adapter_name` are to be taken from."""
        tensors = (kwargs or {}).get("state_dict") or dict(self.named_parameters())
        keys = self.state_keys(adapter_name)
        return difference(output_state_dict, {PREFIX + key: tensors[f"model.{name}"] for key, name in keys.items()})

    def merge_to_16bit(
        self,
        dtype: torch.dtype = torch.bfloat16,
        adapter_names: Sequence[str] | None = None,
        progressbar: bool = True,
    ) -> nn.Module:
        self._refuse_to_merge_replicas()
        model = super().merge_to_16bit(dtype, adapter_names, progressbar)
        restore_mlps(model)
        restore_norms(model)
        ungroup_siblings(model)
        return model

    def _unload(self, with_copies_of: Sequence[str]) -> nn.Module:
        model = super()._unload(with_copies_of)
        restore_mlps(model)
        restore_norms(model)
        ungroup_siblings(model)
        if self.replication is not None:
            self.replication.undo()
            self.replication = None
        return model


def _check_mamba(model: nn.Module, path: str) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in MAMBA and path.rpartition(".")[2] in READ_BY_MAMBA:
        raise ValueError(
            f"LoRA cannot adapt {path}: the fused kernels of {kind} use the weights of {' and '.join(READ_BY_MAMBA)} "
            "without calling them, so the adapter would not run. Leave them out of target_modules, or use "
            "exclude_modules"
        )


def _layer_class(target: nn.Module, path: str) -> Any:
    """The LoRA layer for `target`. Raises ValueError where there is none."""
    if is_bypassed(target):
        raise ValueError(
            f"LoRA cannot adapt {path}: torch.nn.MultiheadAttention uses the weight of this layer without calling it, "
            "so the adapter would never run. Name the attention itself, or leave this out with exclude_modules"
        )
    if isinstance(target, BaseTunerLayer) and not isinstance(target, LoraLayer):
        # A mixed model's layer of another method: it is called, and LoRA comes on top.
        target = target.get_base_layer()
    if not isinstance(target, BaseTunerLayer):
        if is_dense_linear(target) or quantized_weight(target) is not None:
            return linear_class(target)
        for kind, cls in OTHER_LAYERS.items():
            if isinstance(target, kind):
                return cls
    raise ValueError(
        f"LoRA cannot adapt {path}, a {type(target).__name__}: it adapts torch.nn.Linear, Embedding, Conv1d, Conv2d, "
        "Conv3d and MultiheadAttention, transformers' Conv1D, bitsandbytes' Linear4bit and Linear8bitLt, and "
        "peft_fast.QuantizedLinear. Name other target_modules, use exclude_modules, or see LoraConfig's "
        "_register_custom_module"
    )


def _of_custom_class(cls: Any, target: nn.Module, path: str, adapter_name: str, **arguments: Any) -> nn.Module:
    layer = cls(target, adapter_name, **arguments)
    if not isinstance(layer, LoraLayer):
        raise TypeError(
            f"the custom class for {path} must be a subclass of peft_fast.tuners.lora.LoraLayer, got {cls.__name__}"
        )
    return layer
