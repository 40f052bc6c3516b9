"""How several adapters' tensors become one: task arithmetic, TIES, DARE and pruning by magnitude.

Each takes tensors of one shape (any iterable of them: a generator is read once, one tensor after the other), their
weights [number of tensors] and, where it prunes, `density`, the share of values that is kept. None stacks the tensors.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

MajoritySign = Literal["total", "frequency"]


def task_arithmetic(task_tensors: Iterable[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum (arXiv 2212.04089)."""
    return _weighted_sum(task_tensors, weights)


def magnitude_prune(task_tensors: Iterable[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of each tensor's largest values."""
    return _weighted_sum((prune(tensor, density, "magnitude") for tensor in task_tensors), weights)


def ties(
    task_tensors: Iterable[Tensor], weights: Tensor, density: float, majority_sign_method: MajoritySign = "total"
) -> Tensor:
    """TIES (arXiv 2306.01708): the largest values of each, and of these the weighted mean of those that have the sign
    that most have, by their sum ("total") or their number ("frequency")."""
    pruned = [prune(tensor, density, "magnitude") for tensor in task_tensors]
    return _mean_of_the_majority(pruned, weights, majority_sign_method)


def dare_linear(task_tensors: Iterable[Tensor], weights: Tensor, density: float) -> Tensor:
    """DARE (arXiv 2311.03099): values dropped at random, the rest scaled up for it, then the weighted sum. Draws from
    torch's generator."""
    return _weighted_sum((prune(tensor, density, "random", rescale=True) for tensor in task_tensors), weights)


def dare_ties(
    task_tensors: Iterable[Tensor], weights: Tensor, density: float, majority_sign_method: MajoritySign = "total"
) -> Tensor:
    """DARE's pruning, then TIES' mean of those that have the majority's sign."""
    pruned = [prune(tensor, density, "random", rescale=True) for tensor in task_tensors]
    return _mean_of_the_majority(pruned, weights, majority_sign_method)


def prune(
    tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> Tensor:  # fmt: skip
    """The tensor with zeros in place of all but a share `density` of its values. From 1 on the tensor itself, with a
    warning. Raises ValueError for a negative density, and for a method that is none."""
    if density >= 1:
        warnings.warn(f"density {density}: from 1 on nothing is pruned", stacklevel=3)
        return tensor
    if density < 0:
        raise ValueError(f"density must be a share from 0 to 1, got {density}")
    if method not in ("magnitude", "random"):
        raise ValueError(f"method must be 'magnitude' or 'random', got {method!r}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    return random_pruning(tensor, density, rescale)


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Only the largest absolute values are kept, int(density * number of values) of them."""
    kept = torch.topk(tensor.abs().reshape(-1), int(density * tensor.numel())).indices
    result = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    result.view(-1)[kept] = tensor.reshape(-1)[kept]
    return result


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Every value is kept with probability `density`, and divided by it if `rescale`."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale and density else kept


def calculate_majority_sign_mask(tensor: Tensor, method: MajoritySign = "total") -> Tensor:
    """tensor [number of tensors, ...] -> where each has the sign that most have, bool of the same shape. A draw counts
    as positive. Raises ValueError for a method that is none."""
    return tensor.sign() == _majority_sign(tensor, method)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Both [number of tensors, ...] -> the mean over the first dimension of what the mask leaves; 0 where it leaves
    nothing."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1.0)


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """weights with dimensions of 1 at the end, as many as task_tensors has."""
    return weights.view(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def _majority_sign(tensors: Iterable[Tensor], method: MajoritySign) -> Tensor:
    values: dict[str, Callable[[Tensor], Tensor]] = {"total": lambda tensor: tensor, "frequency": Tensor.sign}
    if method not in values:
        raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {method!r}")
    total: Tensor | float = 0.0
    for tensor in tensors:
        total = total + values[method](tensor)
    assert isinstance(total, Tensor)
    return torch.where(total >= 0, 1, -1)


def _mean_of_the_majority(tensors: list[Tensor], weights: Tensor, method: MajoritySign) -> Tensor:
    sign = _majority_sign(tensors, method)
    count = sum(tensor.sign() == sign for tensor in tensors)
    total = _weighted_sum((tensor * (tensor.sign() == sign) for tensor in tensors), weights)
    return total / torch.as_tensor(count).clamp(min=1.0)


def _weighted_sum(tensors: Iterable[Tensor], weights: Tensor) -> Tensor:
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights):
        weighted = tensor * weight.view([1] * tensor.dim())  # with a dimension, so that the wider dtype counts
        total = weighted if total is None else total + weighted
    if total is None:
        raise ValueError("there must be one tensor at least to be merged")
    return total
