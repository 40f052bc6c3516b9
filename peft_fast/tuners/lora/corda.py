"""preprocess_corda: what CorDA (arXiv 2406.05223) needs of sample data, before get_peft_model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_fast.tuners.base_weight import is_conv1d
from peft_fast.tuners.matching import by_pattern

from .calibration import in_mode, is_there, linear_targets, read_tensors, write_tensors
from .config import LoraConfig
from .initialisation.corda import CordaEigens

FIELDS = ("S_WC", "U_WC", "V_WC")
INVERSE_ERROR = 0.05  # how far C C^-1 may be from the identity before C is damped more
MOST_DAMPING = 1e6


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Leave at each dense linear layer that `lora_config` names what init_lora_weights="corda" starts from.

    run_model: runs the model (or `hooked_model`, one with the same layers) over sample data, some hundred texts; while
      it does so the covariance of every layer's inputs is counted, [K, K] in fp32. May be left out where the files that
      corda_config names are there. lora_config's rank, rank_pattern and corda_config count.
    Raises ValueError for inputs that are not finite, for layers that run_model does not reach, and for files of other
    models; the layers are then without it.
    """
    options = lora_config.corda_config
    if options is None:
        raise ValueError("preprocess_corda needs a config with corda_config=CordaConfig(...)")
    layers = linear_targets(model, lora_config)
    ranks = {path: by_pattern(lora_config.rank_pattern, path, lora_config.r) for path in layers}
    device = next(model.parameters()).device
    if is_there(options.cache_file):
        names = [f"{path}.eigens.{field}" for path in layers for field in FIELDS]
        cache = read_tensors(options.cache_file, names, device)
        found = {path: CordaEigens(*(cache[f"{path}.eigens.{field}"] for field in FIELDS)) for path in layers}
    else:
        covariances = _covariances(model, layers, lora_config, run_model, hooked_model)
        steps = tqdm(layers.items(), desc="CorDA", unit="layer", disable=not options.verbose)
        found = {
            path: _eigens(layer, covariances[path], ranks[path], options.corda_method) for path, layer in steps
        }  # fmt: skip
        if options.cache_file is not None:
            tensors = {f"{p}.eigens.{field}": getattr(one, field) for p, one in found.items() for field in FIELDS}
            write_tensors(options.cache_file, tensors)
        if not options.prune_temporary_fields:
            for path, layer in layers.items():
                layer.covariance_matrix, layer.rank = covariances[path], ranks[path]
                layer.corda_method = options.corda_method
    for path, layer in layers.items():
        layer.eigens = found[path]


def _covariances(
    model: nn.Module, layers: dict[str, Any], config: LoraConfig, run_model: Any, hooked_model: nn.Module | None
) -> dict[str, Tensor]:
    """The mean of x^T x of each layer's inputs, every input divided by its largest value."""
    file = config.corda_config.covariance_file
    if is_there(file):
        return read_tensors(file, list(layers), next(model.parameters()).device)
    if run_model is None:
        raise ValueError("run_model is needed: there is neither the cache_file nor the covariance_file of corda_config")
    hooked = model if hooked_model is None else hooked_model
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    half = config.corda_config.use_float16_for_covariance
    handles = [
        hooked.get_submodule(path).register_forward_hook(partial(_count, path, sums, counts, half)) for path in layers
    ]
    try:
        with in_mode(hooked, False):
            run_model()
    finally:
        for handle in handles:
            handle.remove()
    idle = [path for path in layers if not counts[path]]
    if idle:
        raise ValueError(f"run_model did not run {len(idle)} of the layers, such as {idle[0]}: exclude them")
    covariances = {path: sums[path] / counts[path] for path in layers}
    if file is not None:
        write_tensors(file, covariances)
    return covariances


def _count(
    path: str, sums: dict[str, Tensor], counts: dict[str, int], half: bool, layer: Any, inputs: Any, output: Any
) -> None:
    x = inputs[0].detach()
    x = x.reshape(-1, x.shape[-1])
    x = x if half else x.float()
    x = x / x.max().abs()
    covariance = x.t() @ x
    if not bool(covariance.isfinite().all()):
        raise ValueError(f"the inputs of {path}, or their covariance, hold inf or NaN: check the sample data")
    sums[path] = sums[path] + covariance if counts[path] else covariance
    counts[path] += 1


def _eigens(layer: Any, covariance: Tensor, r: int, method: str) -> CordaEigens:
    weight = layer.weight.detach().float()
    weight = weight.t() if is_conv1d(layer) else weight
    if r > min(weight.shape):
        raise ValueError(f"CorDA needs a rank of at most {min(weight.shape)} for {tuple(weight.shape)}, got {r}")
    covariance, inverse = _inverted(covariance.float().to(weight.device))
    U, S, Vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    kept = slice(r) if method == "ipm" else slice(len(S) - r, None)
    return CordaEigens(S[kept].clone(), U[:, kept].clone(), (Vh[kept] @ inverse).t().contiguous())


def _inverted(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The covariance with so much added to its diagonal that it can be inverted, and the inverse."""
    size, mean, damping = len(covariance), covariance.diagonal().mean(), 0.01
    one = torch.eye(size, device=covariance.device)
    while damping < MOST_DAMPING:
        damped = covariance + torch.diag(torch.ones(size, device=covariance.device) * mean * damping)
        inverse = torch.linalg.inv_ex(damped).inverse
        if torch.dist(damped @ inverse, one).item() < INVERSE_ERROR:
            return damped, inverse
        damping *= 2
    raise ValueError(
        "the inputs' covariance cannot be inverted: run_model has to run over more, and other, sample data"
    )
