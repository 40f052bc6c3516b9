"""add_weighted_adapter: a new adapter from several. Layer by layer, where the adapters' weights are, in fp32.

"svd" and "cat" give the weighted sum of what the adapters add, s B A, exactly or as well as the rank allows; "linear",
"ties", "dare_linear", "dare_ties" and "magnitude_prune" combine the A's and the B's, each by themselves; the same names
with "_svd" combine the products and decompose the result.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from peft_fast.transaction import unchanged_on_error
from peft_fast.tuners.modules_to_save import ModulesToSaveWrapper

from . import merge_utils
from .config import LoraConfig
from .layer import LoraLayer

OF_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = ("svd", "cat", *OF_FACTORS, *(f"{name}_svd" for name in OF_FACTORS if name != "linear"))
REFUSED = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")


@dataclass
class Combination:
    """What add_weighted_adapter was asked for, checked."""

    adapters: list[str]
    weights: list[float]
    type: str
    svd_rank: int | None
    svd_clamp: float | None
    svd_driver: str | None
    density: float | None
    majority_sign_method: str

    def merge(self, tensors: Any, weights: Sequence[float], device: torch.device) -> Tensor:
        """Tensors of one shape as one."""
        factors = torch.tensor(weights, device=device)
        name = self.type.removesuffix("_svd")
        if name == "linear":
            return merge_utils.task_arithmetic(tensors, factors)
        function: Callable[..., Tensor] = getattr(merge_utils, name)
        more = (self.majority_sign_method,) if "ties" in name else ()
        return function(tensors, factors, self.density, *more)


def add_weighted_adapter(tuner: Any, adapter_name: str, wanted: Combination) -> None:
    """See LoraModel.add_weighted_adapter."""
    if adapter_name in tuner.peft_config:
        warnings.warn(f"adapter {adapter_name!r} exists already and stays as it is, as in peft", stacklevel=3)
        return
    _check(wanted)
    _check_adapters(tuner, wanted)
    config = _config_of_the_new(tuner, wanted)
    layers = {path: layer for path, layer in tuner.layers() if _here(layer, wanted)}
    for path, layer in layers.items():
        _check_layer(path, layer, wanted)
    with unchanged_on_error(tuner):
        tuner.put_in(adapter_name, config)
        for layer in tqdm(layers.values(), desc=wanted.type, unit="layer", disable=None, leave=False):
            _fill(layer, adapter_name, wanted)
        _copy_whole_modules(tuner, adapter_name, wanted)


@torch.no_grad()
def _fill(layer: LoraLayer, adapter_name: str, wanted: Combination) -> None:
    A, B = _combined(layer, wanted)
    for parameter, value, dim in zip(_parameters(layer, adapter_name), (A, B), (0, 1)):
        parameter.zero_()
        value = value.view(*value.shape[: dim + 1], *parameter.shape[dim + 1 :])
        parameter.narrow(dim, 0, value.shape[dim]).copy_(value)


def _combined(layer: LoraLayer, wanted: Combination) -> tuple[Tensor, Tensor]:
    """(A [R, K], B [N, R]) of the new adapter, whose scale is 1; of at most its rank."""
    pairs = [(name, weight) for name, weight in zip(wanted.adapters, wanted.weights) if name in layer.scaling]
    factors = [tuple(factor.detach().float() for factor in layer.dora_factors(name)) for name, _ in pairs]
    scales = [weight * layer.scaling[name] for name, weight in pairs]
    device = factors[0][0].device
    if wanted.type in OF_FACTORS:
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(root, scale) for root, scale in zip(roots, scales)]
        A = wanted.merge((A for A, _ in factors), signed, device)
        return A, wanted.merge((B for _, B in factors), roots, device)
    if wanted.type in ("cat", "svd"):
        A = torch.cat([A * scale for (A, _), scale in zip(factors, scales)])
        B = torch.cat([B for _, B in factors], dim=1)
        if wanted.type == "cat":
            return A, B
        if wanted.svd_clamp is not None:  # which depends on the vectors' signs: LAPACK's for the product, as in peft
            return _as_factors(torch.linalg.svd(B @ A, full_matrices=False, driver=wanted.svd_driver), wanted)
        return _as_factors(_svd_of_product(A, B, wanted.svd_driver), wanted)
    products = (layer.get_delta_weight(name).float() for name, _ in pairs)
    delta = wanted.merge(products, [weight for _, weight in pairs], device).flatten(1)
    delta = delta.t() if layer.out_dim else delta
    return _as_factors(torch.linalg.svd(delta, full_matrices=False, driver=wanted.svd_driver), wanted)


def _svd_of_product(A: Tensor, B: Tensor, driver: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of B A, through matrices of at most as many rows and columns as A has rows: B A is never made."""
    (Q, R), (P, L) = torch.linalg.qr(B), torch.linalg.qr(A.t())
    U, S, Vh = torch.linalg.svd(R @ L.t(), full_matrices=False, driver=driver)
    return Q @ U, S, Vh @ P.t()


def _as_factors(decomposed: tuple[Tensor, Tensor, Tensor], wanted: Combination) -> tuple[Tensor, Tensor]:
    (U, S, Vh), rank = decomposed, wanted.svd_rank
    A, B = Vh[:rank], U[:, :rank] * S[:rank]
    if wanted.svd_clamp is not None:
        limit = _quantile(torch.cat([B.flatten(), A.flatten()]), wanted.svd_clamp)
        A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
    return A, B


def _quantile(values: Tensor, share: float) -> Tensor:
    """torch.quantile, which takes at most 2**24 values."""
    place = share * (values.numel() - 1)
    low, high = values.kthvalue(math.floor(place) + 1).values, values.kthvalue(math.ceil(place) + 1).values
    return torch.lerp(low, high, place - math.floor(place))


def _parameters(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight  # type: ignore[return-value]


def _here(layer: Any, wanted: Combination) -> bool:
    return isinstance(layer, LoraLayer) and any(name in layer.scaling for name in wanted.adapters)


def _check(wanted: Combination) -> None:
    if not wanted.adapters:
        raise ValueError("adapters must name one adapter at least, got []")
    if len(wanted.adapters) != len(wanted.weights):
        raise ValueError(
            f"there must be a weight for each adapter, got {len(wanted.adapters)} and {len(wanted.weights)}"
        )
    for weight in wanted.weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"weights must be finite numbers, got {weight!r}")
    if wanted.type not in TYPES:
        raise ValueError(f"combination_type must be one of {', '.join(TYPES)}, got {wanted.type!r}")
    if len(wanted.adapters) == 1:
        wanted.type = "linear"
    prunes = wanted.type.removesuffix("_svd") not in ("svd", "linear", "cat")
    density = wanted.density
    if prunes and (isinstance(density, bool) or not isinstance(density, (int, float)) or not density >= 0):
        raise ValueError(f"combination_type {wanted.type!r} needs density, the share that is kept, got {density!r}")
    if wanted.majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {wanted.majority_sign_method!r}")
    rank, clamp = wanted.svd_rank, wanted.svd_clamp
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ValueError(f"svd_rank must be a positive integer, got {rank!r}")
    if clamp is not None and not 0 <= clamp <= 1:
        raise ValueError(f"svd_clamp must be a quantile from 0 to 1, got {clamp!r}")


def _check_adapters(tuner: Any, wanted: Combination) -> None:
    tuner._check_known(wanted.adapters)
    for name in wanted.adapters:
        for option in REFUSED:
            if getattr(tuner.peft_config[name], option):
                raise ValueError(
                    f"add_weighted_adapter does not combine {option}, and adapter {name!r} has it: leave it out"
                )
    invocations = [tuner.peft_config[name].alora_invocation_tokens for name in wanted.adapters]
    if any(one != invocations[0] for one in invocations):
        raise ValueError(f"adapters to combine must have the same alora_invocation_tokens, got {invocations}")
    for path, module in tuner.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            have = [name for name in wanted.adapters if name in module.modules_to_save]
            if len(have) > 1:
                raise ValueError(
                    f"whole modules cannot be combined, and adapters {have} each have {path} in modules_to_save: leave "
                    "out all of them but one"
                )
    kinds = {isinstance(tuner.peft_config[name].target_modules, str) for name in wanted.adapters}
    if len(kinds) > 1:
        raise ValueError(
            "the adapters' target_modules must be lists for all of them, or expressions for all of them: "
            f"{[tuner.peft_config[name].target_modules for name in wanted.adapters]}"
        )


def _check_layer(path: str, layer: LoraLayer, wanted: Combination) -> None:
    ranks = {name: layer.r[name] for name in wanted.adapters if name in layer.r}
    if wanted.type in OF_FACTORS and len(set(ranks.values())) > 1:
        raise ValueError(
            f"combination_type {wanted.type!r} needs adapters of the same rank, got {ranks} in {path}: use 'svd' or "
            "'cat'"
        )
    if wanted.type not in OF_FACTORS and getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise ValueError(
            f"combination_type {wanted.type!r} is not for {path}, a convolution of "
            f"{layer.get_base_layer().groups} groups, whose ranks belong to the groups: use 'linear'"
        )


def _config_of_the_new(tuner: Any, wanted: Combination) -> LoraConfig:
    """The first adapter's, with a scale of 1, of a rank that all fit into, for every layer that one of them has."""
    configs = [tuner.peft_config[name] for name in wanted.adapters]
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    if wanted.type in OF_FACTORS and len(set(ranks)) > 1:
        raise ValueError(
            f"combination_type {wanted.type!r} needs adapters of the same rank, got "
            f"{dict(zip(wanted.adapters, ranks))}: use 'svd' or 'cat'"
        )
    rank = sum(ranks) if wanted.type == "cat" else ranks[0]
    if wanted.type == "svd" or wanted.type.endswith("_svd"):
        rank = wanted.svd_rank = wanted.svd_rank or max(ranks)
    new = copy.deepcopy(configs[0])
    new.r = new.lora_alpha = rank
    new.rank_pattern, new.alpha_pattern, new.use_rslora = {}, {}, False
    new.init_lora_weights, new.loftq_config, new.ensure_weight_tying = True, {}, False
    saved = {name for config in configs for name in config.modules_to_save or ()}
    new.modules_to_save = sorted(saved) or None
    limits = ("exclude_modules", "layers_to_transform", "layers_pattern")
    if any(getattr(config, limit) != getattr(new, limit) for config in configs for limit in limits):
        new.target_modules = {path for path, layer in tuner.layers() if _here(layer, wanted)}
        new.exclude_modules = new.layers_to_transform = new.layers_pattern = None
    elif isinstance(new.target_modules, str):
        new.target_modules = "|".join(f"({config.target_modules})" for config in configs)
    else:
        new.target_modules = {name for config in configs for name in config.target_modules or ()}
    return new


def _copy_whole_modules(tuner: Any, adapter_name: str, wanted: Combination) -> None:
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for name in wanted.adapters:
                if name in module.modules_to_save:
                    values = module.modules_to_save[name].state_dict()
                    module.modules_to_save[adapter_name].load_state_dict(values)
