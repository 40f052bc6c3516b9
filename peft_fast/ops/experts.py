"""lora_experts: a mixture's experts with LoRA, for rows that are sorted by expert.

    y[m, N] = x[m, K] @ W_e.T + scale * (x[m] @ A_e.T) @ B_e.T          m of expert e

The base product is torch's grouped one, as transformers has it; the adapters' part is kernels/lora_experts.py or
reference_experts.py. No W_e + B_e A_e is made, neither in forward nor as a gradient. Saved for backward: x, W as it is
stored, A, B, s [M, R].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_fast.dispatch import Backend, Choice, Op
from peft_fast.kernels import reference_experts, segments
from peft_fast.kernels.segments import Groups
from peft_fast.quant.weight import QuantizedWeight

from . import plain, routes
from .checks import check_device, check_floating
from .library import apply, define, flatten, resolve, unflatten


class ExpertAdapter(NamedTuple):
    """A [E * R, K], B [N, R * E] as peft keeps them: A's experts below each other, B's columns of a rank together."""

    A: Tensor
    B: Tensor
    scale: float


def _why_not(dtype: torch.dtype, *factors: torch.dtype) -> str | None:
    from peft_fast.kernels import tiles

    return next((why for d in (dtype, *factors) if (why := tiles.why_not("x", d))), None)


LORA_EXPERTS = Op("lora_experts", "grouped", _why_not)


def choose_experts(device: torch.device, dtype: torch.dtype, factors: set[torch.dtype], backend: str | None) -> Choice:
    """Who computes the adapters' part of lora_experts, and why; `factors`: the dtypes of A and B."""
    return LORA_EXPERTS.choose(resolve(backend), device, dtype, *sorted(factors, key=str))


def group_rows(numbers: Tensor, count: int, backend: str | None = None) -> Groups:
    """Groups of rows that are sorted by expert: `numbers`, int64 [M] from 0 to count - 1, ascending. Waits for nothing.

    Made once for all products of a layer."""
    if choose_experts(numbers.device, torch.float32, set(), backend).backend == "torch":
        return segments.of_sorted(numbers, count)
    from peft_fast.kernels import lora_experts

    return segments.of_sorted(numbers, count, lora_experts.pieces_of)


def _implementation(x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], backend: Backend) -> Any:
    factors = {f.dtype for f in (*A, *B)}
    if choose_experts(x.device, x.dtype, factors, backend).backend == "torch":
        return reference_experts
    from peft_fast.kernels import lora_experts

    return lora_experts


def _stacked_A(A: Tensor, E: int) -> Tensor:
    """[E, R, K], a view"""
    return A.unflatten(0, (E, -1))


def _stacked_B(B: Tensor, E: int, dtype: torch.dtype) -> Tensor:
    """[E, N, R] in `dtype`, a copy, made anew in the backward: for each layer as much as B itself would be kept."""
    view = B.unflatten(1, (-1, E)).permute(2, 0, 1)
    return torch.empty(view.shape, dtype=dtype, device=B.device).copy_(view)


def _base(weight: list[Tensor], fmt: str, E: int, dtype: torch.dtype, backend: Backend) -> Tensor:
    """W as it is stored, [E, N, K], or [E, K, N] where it is transposed"""
    W = unflatten(weight, fmt)
    W = routes.materialize(W, dtype, backend)
    return W.unflatten(0, (E, -1)) if W.dim() == 2 else W


def _width(weight: list[Tensor], fmt: str, is_transposed: bool, E: int) -> int:
    if not fmt:
        return weight[0].shape[2 if is_transposed else 1]
    rows, columns = unflatten(weight, fmt).shape
    return columns if is_transposed else rows // E


def _forward_fake(x, weight, fmt, is_transposed, starts, pieces, size, A, B, scales, backend):
    E = starts.shape[0] - 1
    y = x.new_empty((x.shape[0], _width(weight, fmt, is_transposed, E)))
    return y, [x.new_empty((x.shape[0], a.shape[0] // E)) for a in A]


@define(
    "lora_experts(Tensor x, Tensor[] weight, str fmt, bool is_transposed, Tensor starts, Tensor? pieces, int size, "
    "Tensor[] A, Tensor[] B, float[] scales, str backend) -> (Tensor, Tensor[])",
    _forward_fake,
)
def _forward(
    x: Tensor,
    weight: list[Tensor],
    fmt: str,
    is_transposed: bool,
    starts: Tensor,
    pieces: Tensor | None,
    size: int,
    A: list[Tensor],
    B: list[Tensor],
    scales: list[float],
    backend: Backend,
) -> tuple[Tensor, list[Tensor]]:
    """(y [M, N], s [M, R] of each adapter) in x's dtype."""
    groups, E = Groups(starts, pieces, size, x.shape[0]), starts.shape[0] - 1
    W = _base(weight, fmt, E, x.dtype, backend)
    y = reference_experts.product(x, W if is_transposed else W.mT, groups)
    if not x.shape[0]:
        return y, [x.new_empty(0, a.shape[0] // E) for a in A]
    run, kept = _implementation(x, A, B, backend), []
    for a, b, scale in zip(A, B, scales):
        s = run.lora_down_experts(x, _stacked_A(a, E), groups)
        run.lora_up_add_experts_(y, s, _stacked_B(b, E, x.dtype), scale, groups)
        kept.append(s)
    return y, kept


def _backward_fake(dy, x, s, weight, fmt, is_transposed, starts, pieces, size, A, B, scales, needs, backend):
    dx = x.new_empty(x.shape if needs[0] else (0,))
    return dx, [torch.empty_like(a) for a in A], [torch.empty_like(b) for b in B]


@define(
    "lora_experts_backward(Tensor dy, Tensor x, Tensor[] s, Tensor[] weight, str fmt, bool is_transposed, "
    "Tensor starts, Tensor? pieces, int size, Tensor[] A, Tensor[] B, float[] scales, bool[] needs, str backend) "
    "-> (Tensor, Tensor[], Tensor[])",
    _backward_fake,
)
def _backward(
    dy: Tensor,
    x: Tensor,
    s: list[Tensor],
    weight: list[Tensor],
    fmt: str,
    is_transposed: bool,
    starts: Tensor,
    pieces: Tensor | None,
    size: int,
    A: list[Tensor],
    B: list[Tensor],
    scales: list[float],
    needs: list[bool],
    backend: Backend,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dx, each dA, each dB); `needs` = (x, A and B); dx is empty where it is not needed."""
    groups, E, dx = Groups(starts, pieces, size, x.shape[0]), starts.shape[0] - 1, None
    if needs[0]:
        W = _base(weight, fmt, E, dy.dtype, backend)
        dx = reference_experts.product(dy, W.mT if is_transposed else W, groups)
    run, dA, dB = _implementation(x, A, B, backend), [], []
    for a, b, own, scale in zip(A, B, s, scales):
        ds, grad = run.lora_up_experts_backward(dy, own, _stacked_B(b, E, dy.dtype), scale, groups, True, needs[1])
        dB.append(torch.zeros_like(b) if grad is None else _as_B(grad, b))
        grad = run.lora_down_experts_backward(ds, x, _stacked_A(a, E), groups, dx, needs[1])
        dA.append(torch.zeros_like(a) if grad is None else grad.flatten(0, 1))
    return x.new_empty(0) if dx is None else dx, dA, dB


def _as_B(grad: Tensor, B: Tensor) -> Tensor:
    """[E, N, R] in B's layout and dtype"""
    out = torch.empty_like(B)
    out.unflatten(1, (-1, grad.shape[0])).copy_(grad.permute(1, 2, 0))
    return out


class _LoraExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, starts: Tensor, pieces: Tensor | None, settings: tuple, *tensors: Tensor
    ) -> Tensor:
        count, fmt, is_transposed, size, scales, backend = settings
        A, B, weight = list(tensors[:count]), list(tensors[count : 2 * count]), list(tensors[2 * count :])
        y, s = _forward(x, weight, fmt, is_transposed, starts, pieces, size, A, B, scales, backend)
        ctx.save_for_backward(x, starts, pieces, *s, *tensors)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        count, fmt, is_transposed, size, scales, backend = ctx.settings
        x, starts, pieces, *rest = ctx.saved_tensors
        s, tensors = rest[:count], rest[count:]
        A, B, weight = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        of_x, *of = ctx.needs_input_grad[:1] + ctx.needs_input_grad[4:]
        groups = Groups(starts, pieces, size, x.shape[0])
        if plain.is_differentiated_again():

            def call(x: Tensor, *given: Tensor) -> Tensor:
                A, B, weight = given[:count], given[count : 2 * count], given[2 * count :]
                return plain.experts(x, weight, fmt, is_transposed, groups, A, B, scales)

            first, *others = plain.gradients(call, [x, *tensors], [of_x, *of], [dy])
            return first, None, None, None, *others
        dy, needs = dy.contiguous(), [of_x, any(of[: 2 * count])]
        if any(needs):
            dx, dA, dB = _backward(
                dy, x, s, weight, fmt, is_transposed, starts, pieces, size, A, B, scales, needs, backend
            )
            grads = [grad if wanted else None for grad, wanted in zip([*dA, *dB], of)]
        else:
            dx, grads = None, [None] * (2 * count)
        dW = None
        if of[2 * count]:
            u, v = (x, dy) if is_transposed else (dy, x)
            dW = reference_experts.gram(u, v, groups)
        return dx if of_x else None, None, None, None, *grads, dW, *(None for _ in weight[1:])


def lora_experts(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    groups: Groups,
    adapters: Sequence[ExpertAdapter] = (),
    *,
    is_transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y [M, N] in x's dtype, for x [M, K] sorted by expert: `groups`, of `group_rows`.

    weight: [E, N, K], or [E, K, N] where it `is_transposed`, in x's dtype; or k-bit with all experts one below the
    other, [E * N, K] or [E * K, N]. adapters: of all experts, any number of any rank; what they give is added up.
    Differentiable in x, the adapters and a dense weight. Raises ValueError for shapes that do not fit, TypeError for
    dtypes.
    """
    tensors, fmt = flatten(weight)
    E = groups.starts.shape[0] - 1
    check_floating(x=x)
    K, N = _check(x, weight, groups, E, is_transposed)
    for adapter in adapters:
        R = adapter.A.shape[0] // E
        if adapter.A.shape != (E * R, K) or adapter.B.shape != (N, R * E):
            shapes = f"{tuple(adapter.A.shape)} and {tuple(adapter.B.shape)}"
            raise ValueError(f"of {E} experts A must be [{E} * R, {K}] and B [{N}, R * {E}], got {shapes}")
    check_device(x, weight=tensors[0], groups=groups.starts, A=adapters[0].A if adapters else None)
    A, B, scales = [a.A for a in adapters], [a.B for a in adapters], [float(a.scale) for a in adapters]
    if plain.is_transformed():
        return plain.experts(x, tensors, fmt, is_transposed, groups, A, B, scales)
    settings = len(A), fmt, is_transposed, groups.size, scales, resolve(backend)
    return apply(_LoraExperts, x, groups.starts, groups.pieces, settings, *A, *B, *tensors)


def _check(x: Tensor, weight: Tensor | QuantizedWeight, groups: Groups, E: int, is_transposed: bool) -> tuple[int, int]:
    """(K, N)"""
    shape = tuple(weight.shape)
    if isinstance(weight, QuantizedWeight):
        if shape[0] % E:
            raise ValueError(f"a k-bit weight must have the rows of {E} experts, got {shape}")
        shape = E, shape[0] // E, shape[1]
    elif x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype} but the weight is {weight.dtype}: cast one of them")
    if len(shape) != 3 or shape[0] != E:
        raise ValueError(f"the weight must be of {E} experts, as the groups are, got {shape}")
    K, N = shape[1:] if is_transposed else shape[:0:-1]
    if x.dim() != 2 or x.shape[1] != K or x.shape[0] != groups.M:
        raise ValueError(f"x must be [{groups.M}, {K}], got {tuple(x.shape)}")
    return K, N
