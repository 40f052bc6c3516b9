"""How tests compare: against fp64, and as strictly as plain torch itself is accurate. For users' kernels too."""

import torch
from torch import Tensor

# Granted to sums in fp32 whatever torch's error is: backends add in orders of their own, some luckier. 64
# terms for one row: 0.6 eps by a GEMV of AVX-512, 1.2 by Triton's interpreter; a gradient of 8 such sums, 1.1 and 2.9.
ORDER = 2 * torch.finfo(torch.float32).eps


def relative_error(value: Tensor, truth: Tensor) -> float:
    """norm(value - truth) / norm(truth) in fp64; inf where value holds NaN or has another shape."""
    if value.shape != truth.shape:
        return float("inf")
    difference = (value.double() - truth.double()).norm().item()
    scale = truth.double().norm().item()
    error = difference / scale if scale else difference
    return error if error == error else float("inf")


def assert_as_accurate_as_torch(
    name: str,
    value: Tensor,
    by_torch: Tensor,
    truth: Tensor,
    dtype: torch.dtype | None = None,
    factor: float = 1.5,
    eps: float = 0.25,
) -> None:
    """Raise AssertionError unless the error of `value` is at most `factor` times plain torch's at the same dtype.

    `by_torch` is the same quantity computed by plain torch in the dtype under test, `truth` in fp64. On top `eps` times
    the eps of `dtype` (what products were taken in; default: value's own) is granted: on a handful of elements torch is
    sometimes exact by luck. Below fp64 ORDER is granted too.
    """
    error, allowed = relative_error(value, truth), relative_error(by_torch, truth)
    dtype = dtype or value.dtype
    limit = factor * allowed + torch.finfo(dtype).eps * eps + (ORDER if dtype != torch.float64 else 0.0)
    if error <= limit:
        return
    if value.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
    distance = (value.double() - truth.double()).abs().nan_to_num(nan=float("inf"))
    worst = torch.unravel_index(distance.argmax(), distance.shape)
    index = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{name} {tuple(value.shape)} {value.dtype}: error {error:.2e}, torch's {allowed:.2e}, limit {limit:.2e}; "
        f"worst at {index}: got {value[index]:.6g}, torch {by_torch[index]:.6g}, truth {truth[index]:.6g}"
    )
