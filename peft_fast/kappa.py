"""Which weights to adapt, by their condition numbers (KappaTune, arXiv 2506.16289).

A matrix whose singular values are all alike, kappa = largest / smallest near 1, uses its directions evenly and has
learnt least of its own: it is what can be adapted with the least harm to what the model knows.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import ops
from .quant.weight import QuantizedWeight
from .tuners.base_weight import base_weight

MOE_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
TINY = 1e-8  # added to the smallest singular value, as in peft: kappa of a singular matrix is large, not infinite


class KappaTuneSelector:
    """The condition numbers of a model's linear layers and of its experts, computed once, when first asked for.

    max_dim_size_to_analyze   matrices with a larger side are left out: their SVD takes minutes
    moe_param_suffixes        what the names of 3-d parameters end in that hold a matrix for each expert

    k-bit weights are dequantised, one at a time. A 3-d parameter has the mean of its experts' condition numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or MOE_SUFFIXES
        self.show_progress = show_progress
        self._found: tuple[dict[str, float], dict[str, float]] | None = None  # of modules, of parameters

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of linear layers, the smallest condition number first, for `target_modules`.

        The first of these that is given decides: `num_modules` of them, the fraction `top_p` of all (at least one),
        those up to `threshold`. Without any: all. Raises ValueError for a top_p outside 0 to 1 or a negative count.
        """
        return _best(self._condition_numbers()[0], top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same of experts' parameters, for `target_parameters`."""
        return _best(self._condition_numbers()[1], top_p, num_modules, threshold)

    def _condition_numbers(self) -> tuple[dict[str, float], dict[str, float]]:
        if self._found is None:
            layers = {name: base_weight(m) for name, m in self.model.named_modules() if isinstance(m, nn.Linear)}
            experts = {
                name: parameter
                for name, parameter in self.model.named_parameters()
                if name.endswith(self.moe_param_suffixes) and parameter.dim() == 3
            }
            self._found = self._measured("linear layers", layers), self._measured("experts", experts)
        return self._found

    def _measured(self, what: str, weights: Mapping[str, Tensor | QuantizedWeight]) -> dict[str, float]:
        """{name: the mean condition number of its matrices}"""
        small = {name: w for name, w in weights.items() if max(w.shape[-2:]) <= self.max_dim_size_to_analyze}
        bar = tqdm(small.items(), desc=f"condition numbers of {what}", disable=not (self.show_progress and small))
        return {name: _mean(map(condition_number, _matrices(weight))) for name, weight in bar}


def condition_number(matrix: Tensor) -> float:
    """The largest singular value over the smallest, of [N, K], in fp32."""
    values = torch.linalg.svdvals(matrix.float())
    return (values[0] / (values[-1] + TINY)).item()


def _matrices(weight: Tensor | QuantizedWeight) -> Iterable[Tensor]:
    if isinstance(weight, QuantizedWeight):
        return [ops.dequantize(weight, torch.float32)]
    return [weight.detach()] if weight.dim() == 2 else weight.detach()


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _best(
    numbers: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p is a fraction of the candidates, from 0 to 1, got {top_p}")
    if num_modules is not None and num_modules < 0:
        raise ValueError(f"num_modules must not be negative, got {num_modules}")
    names = sorted(numbers, key=numbers.__getitem__)
    if num_modules is not None:
        return names[:num_modules]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [name for name in names if numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """{"target_modules": ..., "target_parameters": ...} for LoraConfig: the fraction `top_p` of each with the smallest
    condition numbers; target_parameters is None where the model has no experts. See KappaTuneSelector."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    modules, parameters = selector.get_best_targets(top_p), selector.get_best_target_parameters(top_p)
    return {"target_modules": modules, "target_parameters": parameters or None}
