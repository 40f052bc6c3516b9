"""lora_linear_multi: a frozen linear layer, dense or k-bit, in a batch whose rows belong to different adapters.

The base product is taken once for all rows, by whoever table.py names; the adapters' part of it takes two launches
however many adapters there are (three where few rows make K be split), and five in the backward.

Kept for backward: x as it came, s [M, largest rank], the dropout keys; never W, a mask, or a sorted copy of x.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_fast.dispatch import Backend, Choice, Op
from peft_fast.kernels import reference_multi
from peft_fast.kernels.segments import Constant, Drop, Segments, of_rows, of_samples
from peft_fast.quant.weight import QuantizedWeight

from . import plain, routes
from .checks import FLOATS, check_bias, check_device, check_floating
from .library import autocasting, define, flatten, is_unseen, product_dtype, resolve, unflatten, weight_shape


class Adapters:
    """The adapters of one linear layer in a batch: T tensors A_t [R_t, K] and B_t [N, R_t], in the dtype of what they
    multiply or fp32, T scales and T dropout probabilities. A rank of 0 adds nothing.

    `constant`: they do not change while this object lives, so that what is made of them once (stacked copies on the
    CPU, tables of addresses for Triton) serves every call without gradients: the steps of generating.
    Raises ValueError for shapes that do not fit, TypeError for dtypes that nothing is multiplied in.
    """

    def __init__(
        self,
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        scales: Sequence[float],
        dropout_p: Sequence[float] | None = None,
        *,
        constant: bool = False,
    ) -> None:
        kind = Constant if constant else tuple
        self.A, self.B = kind(A), kind(B)
        self.scales = tuple(float(scale) for scale in scales)
        self.p = (0.0,) * len(self.A) if dropout_p is None else tuple(float(p) for p in dropout_p)
        self.drops = any(self.p)
        self.K = self.A[0].shape[-1] if self.A else 0
        self.N = self.B[0].shape[0] if self.B else 0
        self._check()

    def _check(self) -> None:
        for name, entries in (("B", self.B), ("scales", self.scales), ("dropout_p", self.p)):
            if len(entries) != len(self.A):
                raise ValueError(f"of {len(self.A)} adapters {name} must have as many entries, got {len(entries)}")
        for t, (a, b) in enumerate(zip(self.A, self.B)):
            if a.dim() != 2 or a.shape[1] != self.K or b.shape != (self.N, a.shape[0]):
                shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise ValueError(f"adapter {t}: A must be [R, {self.K}] and B [{self.N}, R], got {shapes}")
            if a.dtype not in FLOATS or b.dtype not in FLOATS:
                raise TypeError(f"adapter {t}: A is {a.dtype} and B {b.dtype}: cast them to one of {FLOATS}")
            if a.device != self.A[0].device or b.device != self.A[0].device:
                raise ValueError(f"adapters must be on one device, got {a.device}, {b.device}, {self.A[0].device}")
        if any(not 0.0 <= p <= 1.0 for p in self.p):
            raise ValueError(f"dropout_p must lie in [0, 1], got {list(self.p)}")


def _why_not(dtype: torch.dtype, *adapters: torch.dtype) -> str | None:
    from peft_fast.kernels import lora_multi

    return lora_multi.why_not(dtype, adapters)


LORA_MULTI = Op("lora_linear_multi", "multi", _why_not)


def choose_multi(device: torch.device, dtype: torch.dtype, adapters: set[torch.dtype], backend: str | None) -> Choice:
    """Who computes the adapters' part of lora_linear_multi, and why; `adapters`: the dtypes of A and B."""
    return LORA_MULTI.choose(resolve(backend), device, dtype, *sorted(adapters, key=str))


def _dtypes(factors: Sequence[Tensor]) -> set[torch.dtype]:
    def found() -> set[torch.dtype]:
        return {factor.dtype for factor in factors}

    return factors.keep("dtypes", found) if isinstance(factors, Constant) else found()


def _implementation(x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], backend: Backend):
    choice = choose_multi(x.device, x.dtype, _dtypes(A) | _dtypes(B), backend)
    if choice.backend == "torch":
        return reference_multi
    from peft_fast.kernels import lora_multi

    return lora_multi


def _width(weight: list[Tensor], fmt: str, B: list[Tensor]) -> int:
    return weight_shape(weight, fmt)[0] if weight else B[0].shape[0]


def _forward_fake(x, weight, fmt, bias, A, B, order, lengths, scales, ps, keys, dtype, backend):
    M = x.shape[0]
    y = x.new_empty((M, _width(weight, fmt, B)), dtype=dtype)
    return y, x.new_empty((M, max((a.shape[0] for a in A), default=0)), dtype=dtype)


@define(
    "lora_linear_multi(Tensor x, Tensor[] weight, str fmt, Tensor? bias, Tensor[] A, Tensor[] B, Tensor? order, "
    "int[] lengths, float[] scales, float[] ps, Tensor? keys, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward(
    x: Tensor,
    weight: list[Tensor],
    fmt: str,
    bias: Tensor | None,
    A: list[Tensor],
    B: list[Tensor],
    order: Tensor | None,
    lengths: list[int],
    scales: list[float],
    ps: list[float],
    keys: Tensor | None,
    dtype: torch.dtype,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, largest rank]) in `dtype`; without a weight y is the adapters' part alone."""
    x = x.to(dtype)
    if weight:
        y = routes.product(x, unflatten(weight, fmt), bias, backend)
    else:
        y = x.new_zeros(x.shape[0], B[0].shape[0])
    if not any(lengths):
        return y, x.new_empty(x.shape[0], max((a.shape[0] for a in A), default=0))
    segments, run = Segments(order, tuple(lengths), x.shape[0]), _implementation(x, A, B, backend)
    s = run.lora_down_multi(x, A, segments, Drop(tuple(ps), keys))
    run.lora_up_add_multi_(y, s, B, scales, segments)
    return y, s


def _backward_fake(dy, x, s, weight, fmt, A, B, order, lengths, scales, ps, keys, needs, backend):
    sizes = (
        x.shape if needs[0] else (0,),
        *((sum(f.numel() for f in F) if n else 0,) for F, n in zip((A, B), needs[1:])),
    )
    return tuple(t.new_empty(size) for t, size in zip((x, A[0], B[0]), sizes))


@define(
    "lora_linear_multi_backward(Tensor dy, Tensor x, Tensor s, Tensor[] weight, str fmt, Tensor[] A, Tensor[] B, "
    "Tensor? order, int[] lengths, float[] scales, float[] ps, Tensor? keys, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: list[Tensor],
    fmt: str,
    A: list[Tensor],
    B: list[Tensor],
    order: Tensor | None,
    lengths: list[int],
    scales: list[float],
    ps: list[float],
    keys: Tensor | None,
    needs: list[bool],
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [M, K] in x's dtype, the dA_t one behind the other, the dB_t likewise); an empty tensor for each that `needs`
    = (x, A, B) does not ask for."""
    x_dtype, x = x.dtype, x.to(s.dtype)
    dx = None
    if needs[0]:
        dx = routes.product_dx(dy, unflatten(weight, fmt), backend) if weight else x.new_zeros(x.shape)
    if any(lengths):
        dA, dB = _adapters_backward(
            dy,
            x,
            s,
            A,
            B,
            Segments(order, tuple(lengths), x.shape[0]),
            scales,
            Drop(tuple(ps), keys),
            needs,
            dx,
            backend,
        )
    else:
        dA, dB = (torch.cat([f.flatten() for f in F]).zero_() if n else None for F, n in zip((A, B), needs[1:]))
    dx = x.new_empty(0) if dx is None else dx.to(x_dtype)
    return dx, *(dy.new_empty(0) if g is None else g for g in (dA, dB))  # type: ignore[return-value]


def _adapters_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    segments: Segments,
    scales: list[float],
    drop: Drop,
    needs: list[bool],
    dx: Tensor | None,
    backend: Backend,
) -> tuple[Tensor | None, Tensor | None]:
    """(the dA_t one behind the other, the dB_t likewise), None where not needed; the adapters' part is added to dx."""
    run = _implementation(x, A, B, backend)
    needs_dx, needs_dA, needs_dB = needs
    ds, dB = run.lora_up_multi_backward(dy, s, B, scales, segments, needs_dA or needs_dx, needs_dB)
    dA = None if ds is None else run.lora_down_multi_backward(ds, x, A, segments, drop, dx, needs_dA)
    return dA, dB


class _LoraLinearMulti(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        keys: Tensor | None,
        order: Tensor | None,
        settings: tuple,
        dtype: torch.dtype,
        *tensors: Tensor,
    ) -> Tensor:
        count, fmt, lengths, scales, ps, backend = settings
        A, B, weight = list(tensors[:count]), list(tensors[count : 2 * count]), list(tensors[2 * count :])
        y, s = _forward(x, weight, fmt, bias, A, B, order, lengths, scales, ps, keys, dtype, backend)
        ctx.save_for_backward(x, s, keys, order, *tensors)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        x, s, keys, order, *tensors = ctx.saved_tensors
        count, fmt, lengths, scales, ps, backend = ctx.settings
        A, B, weight = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        of = ctx.needs_input_grad
        of_A, of_B = of[6 : 6 + count], of[6 + count : 6 + 2 * count]
        needs = [of[0], any(of_A), any(of_B)]
        dbias = dy.sum(0) if of[1] else None
        if plain.is_differentiated_again():
            segments, drop = Segments(order, tuple(lengths), x.shape[0]), Drop(tuple(ps), keys)

            def call(x: Tensor, *given: Tensor) -> Tensor:
                A, B, weight = given[:count], given[count : 2 * count], given[2 * count :]
                return plain.linear_multi(x, A, B, None, segments, scales, drop, s.dtype, fmt, weight)

            first, *others = plain.gradients(call, [x, *tensors], [of[0], *of[6:]], [dy])
            return first, dbias, *(None,) * 4, *others
        dx: Tensor | None = None
        grads: list[Tensor | None] = [None] * (2 * count)
        if any(needs):
            dx, *flat = _backward(dy, x, s, weight, fmt, A, B, order, lengths, scales, ps, keys, needs, backend)
            for i, (factors, wanted) in enumerate(((A, of_A), (B, of_B))):
                if any(wanted):
                    parts = reference_multi.separated(flat[i], factors)
                    own = [g.to(f.dtype) if want else None for g, f, want in zip(parts, factors, wanted)]
                    grads[i * count : (i + 1) * count] = own
        dW = (dy.t() @ x.to(dy.dtype)).to(weight[0].dtype) if weight and of[6 + 2 * count] else None
        return (
            dx if of[0] else None,
            dbias,
            *(None,) * 4,
            *grads,
            *([dW] if weight else []),
            *(None for _ in weight[1:]),
        )


def lora_linear_multi(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    adapters: Adapters,
    segments: Segments,
    bias: Tensor | None = None,
    *,
    dropout_keys: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias + scale_t * dropout_t(x) @ A_t.T @ B_t.T, t being the adapter of each row.

    weight: frozen, [N, K]; None: the adapters' part alone. segments: which rows of x, seen as [M, K], are whose: of
    `segments_of_samples` or `segments_of_rows`, made once for all layers. dropout_keys: int32 [T, 2], where an adapter
    drops out. The mask of a row is that of its place within its adapter's rows: an adapter's output and gradients are
    those of a batch that it has for itself (up to rounding: another number of rows may make the base product sum in
    another order).

    dtype: of the product and the output; default: autocast's where that is on, else x's own. Differentiable in x, the
    adapters, bias and a dense weight. Raises ValueError for shapes that do not fit, TypeError for dtypes that do not.
    """
    if (y := _at_once(x, weight, adapters, segments, bias, dtype, backend)) is not None:
        return y
    tensors, fmt = ([], "") if weight is None else flatten(weight)
    N, K = weight.shape if weight is not None else (adapters.N, x.shape[-1])
    _check(x, (N, K), adapters, segments, dropout_keys)
    check_bias(bias, N)
    if weight is None and (bias is not None or not adapters.A):
        raise ValueError("without a weight there is the adapters' part alone: it has no bias, and needs an adapter")
    kind = product_dtype(x)
    if tensors and not fmt and dtype is None and not autocasting(x.device.type) and tensors[0].dtype != x.dtype:
        raise TypeError(
            f"x is {x.dtype} but the weight is {tensors[0].dtype}: cast one of them, give dtype, or use torch.autocast"
        )
    first = adapters.A[0] if adapters.A else None
    check_device(x, weight=tensors[0] if tensors else None, bias=bias, order=segments.order, A=first, key=dropout_keys)
    keys, kind, backend = dropout_keys if adapters.drops else None, dtype or kind, resolve(backend)
    rows = x.reshape(-1, K)
    numbers = segments.lengths, adapters.scales, adapters.p
    if plain.is_transformed():
        drop = Drop(adapters.p, keys)
        y = plain.linear_multi(rows, adapters.A, adapters.B, bias, segments, adapters.scales, drop, kind, fmt, tensors)
    elif torch.is_grad_enabled() or torch.compiler.is_compiling():
        settings = len(adapters.A), fmt, *map(list, numbers), backend
        y = _LoraLinearMulti.apply(rows, bias, keys, segments.order, settings, kind, *adapters.A, *adapters.B, *tensors)
    else:  # what is kept of constant A and B is kept where the op is not seen: it would get lists of them
        y, _ = _forward(rows, tensors, fmt, bias, adapters.A, adapters.B, segments.order, *numbers, keys, kind, backend)
    return y.view(*x.shape[:-1], N)


def _at_once(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    adapters: Adapters,
    segments: Segments,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    backend: str | None,
) -> Tensor | None:
    """y, where the adapters are constant and torch takes all of them in one product; else, and where something does not
    fit, None. What can be known of the adapters is asked once: a forward of 64 of rank 4, 32 wide, takes 34 us and not
    57 (one thread of an EPYC)."""
    A = adapters.A
    if weight is None or not isinstance(A, Constant) or torch.is_grad_enabled() or adapters.drops:
        return None
    if not is_unseen(x) or autocasting(x.device.type):
        return None
    N, K = weight.shape
    fits = x.numel() == segments.M * K and x.shape[-1] == K == adapters.K and N == adapters.N and K > 0
    is_as_x = weight.device == x.device and (isinstance(weight, QuantizedWeight) or weight.dtype == x.dtype)
    if not fits or not is_as_x or dtype not in (None, x.dtype) or plain.is_transformed():
        return None
    backend = resolve(backend)
    key = "at once", segments.lengths, segments.order is None, x.dtype, x.device, backend
    stacks = A.keep(key, lambda: _stacks(x, A, adapters, segments, backend))
    if stacks is None:
        return None
    check_bias(bias, N)
    rows = x.reshape(-1, K)
    y = routes.product(rows, weight, bias, backend)
    reference_multi.lora_add_at_once_(y, rows, stacks)
    return y.view(*x.shape[:-1], N)


def _stacks(
    x: Tensor, A: Constant, adapters: Adapters, segments: Segments, backend: Backend
) -> reference_multi.Stacks | None:
    B = adapters.B
    fits = len(segments.lengths) == len(A) > 0 and A[0].device == x.device and x.is_floating_point()
    if not fits or not isinstance(B, Constant) or _implementation(x, A, B, backend) is not reference_multi:
        return None
    return reference_multi.stacks_of(A, B, adapters.scales, segments, x.dtype)


def _check(x: Tensor, shape: tuple[int, int], adapters: Adapters, segments: Segments, keys: Tensor | None) -> None:
    """ValueError for what does not fit together."""
    K, T = shape[1], len(adapters.A)
    check_floating(x=x)
    if x.shape[-1] != K:
        raise ValueError(f"x must have K={K} features for a weight of shape {shape}, got {tuple(x.shape)}")
    if T and shape != (adapters.N, adapters.K):
        raise ValueError(f"the adapters are for a weight of shape {(adapters.N, adapters.K)}, got {shape}")
    if len(segments.lengths) != T:
        raise ValueError(f"the segments are of {len(segments.lengths)} adapters, got {T}")
    rows = x.numel() // K if K else 0
    if rows != segments.M:
        raise ValueError(f"the segments are of {segments.M} rows, and x {tuple(x.shape)} has {rows}")
    if adapters.drops and (keys is None or keys.shape != (T, 2) or keys.dtype != torch.int32):
        got = "None" if keys is None else f"{tuple(keys.shape)} {keys.dtype}"
        raise ValueError(f"dropout needs dropout_keys, int32 [{T}, 2], a new one per forward, got {got}")


segments_of_rows, segments_of_samples = of_rows, of_samples
