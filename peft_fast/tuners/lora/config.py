"""LoraConfig: every option of peft 0.21.2's, with the same defaults.

So that files load both ways, options that are not built yet are here too. They keep their default, or are refused by
name: NOT_BUILT is the list.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

from torch import nn

from peft_fast.config import PeftConfig
from peft_fast.option_help import with_help
from peft_fast.peft_types import PeftType
from peft_fast.tuners.options import are_indices, are_strings, compiled

from . import initialisation
from .subconfigs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, made

SWITCHES = ("fan_in_fan_out", "use_dora", "use_rslora", "lora_bias", "inference_mode", "ensure_weight_tying")
NOT_BUILT = (
    "megatron_config",
    "megatron_core",
    "velora_config",
    "use_qalora",
    "qalora_group_size",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
INITS_NOT_BUILT = ("mica",)


@with_help
@dataclass
class LoraRuntimeConfig:
    """Options of a run, never saved.

    ephemeral_gpu_offload: what a new adapter needs of base weights on the CPU is computed on the accelerator, if there
      is one: norms for DoRA, decompositions for PiSSA, OLoRA and LoftQ. No effect on other adapters.
    """

    ephemeral_gpu_offload: bool = False


@with_help
@dataclass
class LoraConfig(PeftConfig):
    """Low-rank adaptation, y = W x + scale * B A dropout(x) (arXiv 2106.09685).

    r: the rank. lora_alpha: scale = lora_alpha / r. use_rslora: lora_alpha / sqrt(r) (arXiv 2312.03732).
    target_modules: names of modules (the whole path or its end), or one regular expression for the whole path, or
      "all-linear" (all but the output layer), or None (by the model's architecture). exclude_modules: likewise, taken
      away.
    lora_dropout: probability, on the adapter's input. fan_in_fan_out: weights lie [in, out], as in transformers' Conv1D
      layers; it is set by the layers that are found.
    bias: which biases of the base model are trained: "none", "all", "lora_only" (those of adapted layers).
    lora_bias: B has a bias of its own.
    init_lora_weights: True (A Kaiming uniform, B zero), "gaussian" (A normal with deviation 1 / r, B zero), or False
      (both Kaiming uniform: the adapter does something at once, for tests). For linear layers, dense and k-bit:
      "pissa" (the weight's largest singular values and vectors, arXiv 2404.02948), "pissa_niter_16" (the same by a
      randomised SVD of so many iterations: much faster) and "olora" (its QR decomposition, arXiv 2406.01775), which
      take the adapter's part out of the base weight; "orthogonal" (random halves of one basis, whose product is zero;
      r is even); "loftq" (factors that make up for quantisation, arXiv 2310.08659, with loftq_config); "corda" (what
      sample data need of the weight, arXiv 2406.05223, after preprocess_corda) and "lora_ga" (its gradient, arXiv
      2407.05000, after preprocess_loraga), which take their part out of the base weight too; "eva" (A is the principal
      components of the layer's inputs, and ranks go to layers with the most to explain, arXiv 2410.07170), of an
      adapter that is there: see initialize_lora_eva_weights.
    loftq_config, corda_config, lora_ga_config, eva_config: a LoftQConfig, ..., or a dict of its options.
    layers_to_transform, layers_pattern: only layers of these indices, in the list of this name (None: any list).
    layer_replication: [[0, 4], [2, 5]] makes of five layers 0, 1, 2, 3, 2, 3, 4, in the weights that are there, each
      with adapters of its own. Of the first adapter of a model; nothing can be merged then.
    rank_pattern, alpha_pattern: {regular expression for the end of the path: value in place of r or lora_alpha}.
    target_parameters: names of parameters of modules that are no layers (the whole path or its end), such as the 3-d
      ones of experts. Not with lora_dropout, lora_bias, use_dora. Names of experts' layers in target_modules become
      such, where transformers keeps them as parameters.
    modules_to_save: names of modules that are trained and saved whole.
    trainable_token_indices: ids of tokens whose rows of the input embedding are trained and saved, or {name of a layer:
      ids}. An output layer with the embedding's weight follows.
    ensure_weight_tying: an embedding in modules_to_save or target_modules, and the output layer that shares its weight,
      are trained as one too.
    runtime_config: a LoraRuntimeConfig.
    alora_invocation_tokens: activated LoRA (arXiv 2504.12397): the adapter is there from the last occurrence of these
      token ids in a sample on, and the tokens before are the base model's. Of linear layers in causal language models,
      in forward and generate of a PeftModel; cannot be merged.
    use_dora: a magnitude of its own for every out feature (arXiv 2402.09353); not together with lora_bias.

    Raises ValueError for a value out of range, NotImplementedError for an option that is not built yet.
    """

    tied_to_weights: ClassVar[tuple[str, ...]] = (
        "peft_type",
        "r",
        "lora_alpha",
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "trainable_token_indices",
        "alora_invocation_tokens",
    )

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | set[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        for name in SWITCHES:
            if getattr(self, name) is None:  # in files of other programs
                setattr(self, name, False)
        for name in ("r", "lora_alpha", "lora_dropout"):
            setattr(self, name, _plain(getattr(self, name)))
        self._custom_modules: dict[type[nn.Module], type[nn.Module]] | None = None
        for name in ("target_modules", "exclude_modules"):
            if are_strings(getattr(self, name)):
                setattr(self, name, set(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name) or {}
            numbers = (
                {key: _plain(value) for key, value in pattern.items()} if isinstance(pattern, Mapping) else pattern
            )
            setattr(self, name, numbers)
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = asdict(self.loftq_config)
        self.loftq_config = self.loftq_config or {}
        if self.loftq_config and self.init_lora_weights != "loftq":
            warnings.warn("loftq_config is ignored: init_lora_weights is not 'loftq'", stacklevel=3)
            self.loftq_config = {}
        self.corda_config = made("corda_config", self.corda_config, CordaConfig)
        self.lora_ga_config = made("lora_ga_config", self.lora_ga_config, LoraGAConfig)
        if self.init_lora_weights == "corda" and self.corda_config is None:
            warnings.warn("init_lora_weights='corda' without corda_config: its defaults are taken", stacklevel=3)
            self.corda_config = CordaConfig()
        if self.init_lora_weights != "corda" and self.corda_config is not None:
            warnings.warn("corda_config is ignored: init_lora_weights is not 'corda'", stacklevel=3)
        self.eva_config = made("eva_config", self.eva_config, EvaConfig)
        if self.init_lora_weights == "eva" and self.eva_config is None:
            warnings.warn("init_lora_weights='eva' without eva_config: its defaults are taken", stacklevel=3)
            self.eva_config = EvaConfig()
        if self.init_lora_weights != "eva" and self.eva_config is not None:
            warnings.warn("eva_config is ignored: init_lora_weights is not 'eva'", stacklevel=3)
        if self.alora_invocation_tokens and self.task_type != "CAUSAL_LM":
            warnings.warn(
                f"alora_invocation_tokens are looked for by models for CAUSAL_LM, and task_type is {self.task_type!r}: "
                "give alora_offsets in each call, or the adapter is never there",
                stacklevel=3,
            )
        self.check()
        if (
            self.use_rslora
            and (self.rank_pattern or self.alpha_pattern)
            and initialisation.subtracts(self.init_lora_weights)
        ):
            warnings.warn(
                f"an adapter with use_rslora, rank_pattern or alpha_pattern, and init_lora_weights="
                f"{self.init_lora_weights!r} cannot be saved as plain LoRA (path_initial_model_for_weight_conversion)",
                stacklevel=3,
            )

    def _register_custom_module(self, mapping: Mapping[type[nn.Module], type[nn.Module]]) -> None:
        """Adapt layers of other types, {type of layer: class of its LoRA layer}: peft's experimental extension point.

        The class is tried before the built-in ones, is a subclass of peft_fast.tuners.lora.LoraLayer, and is called as

            cls(layer, adapter_name, config=config, r=r, lora_alpha=lora_alpha)

        It calls LoraLayer.__init__(layer) and update_layer(adapter_name, r, lora_alpha, config), which asks
        `make_factors` for the weights in lora_A and lora_B; `forward` uses them for `adapters_in_effect()`, and
        `get_delta_weight` is what merging adds. For a linear layer in a foreign format, see LinearLike. The mapping is
        of this process: it is not saved, and has to be registered again before such an adapter is loaded.
        """
        for layer, cls in mapping.items():
            if not (isinstance(layer, type) and isinstance(cls, type)):
                raise TypeError(f"the mapping must be from classes to classes, got {layer!r}: {cls!r}")
        self._custom_modules = {**(self._custom_modules or {}), **mapping}

    def custom_class(self, layer: nn.Module) -> type[nn.Module] | None:
        """The class registered for a layer of this type, or None."""
        mapping = self._custom_modules or {}
        return next((cls for kind, cls in mapping.items() if isinstance(layer, kind)), None)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["runtime_config"]
        return values

    def check(self) -> None:
        """Raise for what cannot be done. Called again before an adapter is made: attributes can be set."""
        _check_built(self)
        _check_types(self)
        _check_numbers(self)
        _check_patterns(self)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} needs target_modules as a list, got the string {self.target_modules!r}: put the layer "
                        "indices into the regular expression, or give the names as a list"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: the indices within that list of layers")
        if self.alora_invocation_tokens and (self.use_dora or self.target_parameters):
            raise ValueError("alora_invocation_tokens are not supported with use_dora or target_parameters")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias is not supported with use_dora: leave one of them out")
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(f"lora_bias needs init_lora_weights True or False, got {self.init_lora_weights!r}")
        if self.layer_replication:
            _check_replication(self.layer_replication)
            if initialisation.changes_base(self.init_lora_weights):
                raise ValueError(
                    f"init_lora_weights={self.init_lora_weights!r} changes the base weights, which replicated layers "
                    "share: leave it out, or layer_replication"
                )
        if self.init_lora_weights == "loftq":
            _check_loftq(self.loftq_config)


def _check_built(config: LoraConfig) -> None:
    default = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(config)}
    for name in NOT_BUILT:
        value = getattr(config, name)
        unset = value is None or (not default[name] and value == [])  # for MoE models peft writes target_parameters=[]
        if value != default[name] and not unset:
            raise NotImplementedError(
                f"LoraConfig option {name}={value!r} is not built in peft_fast yet: leave it at {default[name]!r}, or "
                "use peft for this adapter"
            )
    init = config.init_lora_weights
    if isinstance(init, str) and init in INITS_NOT_BUILT:
        raise NotImplementedError(
            f"LoraConfig option init_lora_weights={init!r} is not built in peft_fast yet: use one of True, False, "
            f"'gaussian', {', '.join(initialisation.NAMES)}"
        )
    initialisation.method_of(init)


def _check_replication(ranges: Any) -> None:
    fits = isinstance(ranges, (list, tuple)) and all(
        isinstance(one, (list, tuple)) and len(one) == 2 and are_indices(list(one)) and 0 <= one[0] < one[1]
        for one in ranges
    )
    if not fits:
        raise ValueError(f"layer_replication must be a list of [first layer, layer after the last], got {ranges!r}")


def _check_loftq(options: Any) -> None:
    if not isinstance(options, dict):
        raise TypeError(f"loftq_config must be a LoftQConfig or a dict of its options, got {options!r}")
    if not options:
        raise ValueError("init_lora_weights='loftq' needs loftq_config: LoftQConfig(loftq_bits=4)")
    if unknown := options.keys() - asdict(LoftQConfig()).keys():
        raise TypeError(f"loftq_config has loftq_bits and loftq_iter, got {sorted(unknown)} too")
    bits, steps = (asdict(LoftQConfig()) | options).values()
    if bits not in (4, 8):
        raise ValueError(f"loftq_bits must be 4 or 8, got {bits!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 999:
        raise ValueError(f"loftq_iter must be an integer from 1 to 999, got {steps!r}")


def _check_types(config: LoraConfig) -> None:
    rules: list[tuple[str, str, bool]] = []
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        fits = value is None or isinstance(value, str) or are_strings(value)
        rules.append((name, "a list of module names or one regular expression", fits))
    saved = config.modules_to_save
    rules.append(("modules_to_save", "a list of module names", saved is None or (are_strings(saved) and all(saved))))
    names = config.target_parameters
    rules.append(("target_parameters", "a list of names of parameters", names is None or are_strings(names)))
    layers, lists = config.layers_to_transform, config.layers_pattern
    rules.append(("layers_to_transform", "an index or a list of indices", layers is None or are_indices(layers)))
    rules.append(
        ("layers_pattern", "a name or a list of names", lists is None or are_strings([lists]) or are_strings(lists))
    )
    for name in ("rank_pattern", "alpha_pattern"):
        rules.append((name, "a dict from patterns to numbers", isinstance(getattr(config, name), dict)))
    tokens = config.trainable_token_indices
    of_layers = tokens if isinstance(tokens, dict) else {"": tokens}
    named = are_strings(list(of_layers)) and (all(of_layers) or not isinstance(tokens, dict))
    fits = tokens is None or (named and all(map(_are_ids, of_layers.values())))
    rules.append(("trainable_token_indices", "a list of token ids, or a dict from layers to such lists", fits))
    invocation = config.alora_invocation_tokens
    rules.append(("alora_invocation_tokens", "a list of token ids", invocation is None or _are_ids(invocation)))
    rules.append(("runtime_config", "a LoraRuntimeConfig", isinstance(config.runtime_config, LoraRuntimeConfig)))
    for name in SWITCHES:
        rules.append((name, "True or False", isinstance(getattr(config, name), bool)))
    for name, rule, fits in rules:
        if not fits:
            raise TypeError(f"{name} must be {rule}, got {getattr(config, name)!r}")


def _check_numbers(config: LoraConfig) -> None:
    ranks = {"r": config.r} | {f"rank_pattern[{key!r}]": rank for key, rank in config.rank_pattern.items()}
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
            raise ValueError(f"{name} must be a positive integer, got {rank!r}: 8 to 64 are usual ranks")
    alphas = {"lora_alpha": config.lora_alpha} | {f"alpha_pattern[{k!r}]": a for k, a in config.alpha_pattern.items()}
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"{name} must be a finite number, got {alpha!r}")
    tokens = config.trainable_token_indices
    for name, ids in (tokens if isinstance(tokens, dict) else {"": tokens}).items():
        if ids is not None and (not ids or min(ids) < 0):
            where = f"[{name!r}]" if name else ""
            raise ValueError(f"trainable_token_indices{where} must be one or more ids from 0 on, got {ids!r}")
    p = config.lora_dropout
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"lora_dropout must be a probability from 0 to 1, got {p!r}")


def _check_patterns(config: LoraConfig) -> None:
    layers = config.layers_pattern
    patterns = {
        "target_modules": [config.target_modules] if isinstance(config.target_modules, str) else [],
        "exclude_modules": [config.exclude_modules] if isinstance(config.exclude_modules, str) else [],
        "layers_pattern": [layers] if isinstance(layers, str) else layers or [],
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    for name, texts in patterns.items():
        for text in texts:
            compiled(name, text)


def _are_ids(values: Any) -> bool:
    return isinstance(values, list) and are_indices(values)


def _plain(number: Any) -> Any:
    """NumPy's numbers, as a search for hyperparameters gives them, as Python's, which JSON can hold."""
    if isinstance(number, (bool, int, float)) or not isinstance(number, Real):
        return number
    return int(number) if isinstance(number, Integral) else float(number)
