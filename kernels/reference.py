"""Every op in plain torch: the specification, the path without Triton, and the oracle of the tests.

Axes: M tokens, K in features, N out features, R rank. x is [M, K], W is [N, K], A is [R, K], B is [N, R].

    s  = c * (mask * x) @ A.T                                lora_down            c = 1 / (1 - p)
    y += bias + scale * s @ B.T                              lora_up_add_
    ds = scale * dy @ B        dB = scale * dy.T @ s         lora_up_backward
    dA = c * ds.T @ (mask * x) dx += c * mask * (ds @ A)     lora_down_backward

    W  = code * absmax                                       dequantize
    W' = code * absmax + scale * B @ A                       dequantize_merge     rounded once
    y  = x @ W.T + bias + scale * s @ B.T                    quant_matmul
    dx = dy @ W + c * mask * (ds @ A)                        quant_matmul_dx

    h  = act(g) * u                                          glu
    dg = dh * u * act'(g)      du = dh * act(g)              glu_backward_        du over dh
    both of what LoRA makes of g, u and dh                   lora_up_glu, lora_glu_backward_

Products are taken in x's dtype, so fp32 A and B under a 16-bit x are rounded as autocast would round them, and x is
never copied to fp32; dA and dB come back in the dtype of A and B. In fp64 this file is the truth that tests compare to.
It imports torch only.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.quant import blockwise, int8
from peft_fast.quant.weight import QuantizedWeight

from . import dropout

GLU_ELEMENTS = 1 << 20  # of each tensor that glu takes at a time: bounds its temporaries (1 << 17 costs time)
MERGE_ROWS = 256  # rows of the weight that dequantize_merge widens to fp32 at a time: bounds its temporaries


def dequantize(weight: QuantizedWeight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """W [N, K] in `dtype` (default: the weight's own), rounded once from fp32; into `out`, contiguous, if given."""
    return (int8 if weight.bits == 8 else blockwise).dequantize(weight, dtype, out)


def dequantize_merge(
    weight: QuantizedWeight,
    A: Tensor,
    B: Tensor,
    scale: float,
    dtype: torch.dtype,
    needs_norms: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """W' [N, K] in `dtype`: the fp32 sum of the exact weight and scale * B @ A, rounded once; and, if asked for, the
    2-norms of its rows before rounding, float32 [N] (DoRA, arXiv 2402.09353, section 4.1).

    A and B are rounded to `dtype`, as for every other product with x of that dtype. Rounding W first and adding then
    would lose most of an update that is smaller than half an ulp of W.
    """
    wide = torch.promote_types(dtype, torch.float32)
    W = dequantize(weight, torch.float32)
    a, b = (t.to(dtype).to(wide) for t in (A, B))
    out = W.new_empty(weight.shape, dtype=dtype)
    norms = W.new_empty(weight.shape[0], dtype=wide) if needs_norms else None
    for start in range(0, weight.shape[0], MERGE_ROWS):
        rows = slice(start, start + MERGE_ROWS)
        merged = torch.addmm(W[rows].to(wide), b[rows], a, alpha=scale)
        out[rows] = merged
        if norms is not None:
            norms[rows] = merged.norm(dim=1)
    return out, norms


def quant_matmul(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    s: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias + scale * s @ B.T, W dequantised to x's dtype; without s and B, no LoRA."""
    y = F.linear(x, dequantize(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    if s is not None and B is not None:
        lora_up_add_(y, s, B, scale)
    return y


def quant_matmul_dx(
    dy: Tensor,
    weight: QuantizedWeight,
    ds: Tensor | None = None,
    A: Tensor | None = None,
    p: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """dx [M, K] = dy [M, N] @ W + c * mask * (ds @ A); without ds and A, no LoRA."""
    dx = dy @ dequantize(weight, dy.dtype)
    if ds is not None and A is not None:
        lora_down_backward(ds, dx, A, p, key, dx, needs_dA=False)
    return dx


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a @ b with one rounding: the factor is applied to the accumulator, or where it is a power of two, and so
    rounds nothing, to the product, because addmm in bf16 takes 1.9 times as long as mm (512 x 512 by 512 x 16, one
    thread of an EPYC)."""
    if factor == 1.0:
        return a @ b
    if a.dtype == torch.bfloat16 and abs(math.frexp(factor)[0]) == 0.5:
        return (a @ b).mul_(factor)
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=factor)


def _bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as integers as wide as `dtype`: all bits set where an element is kept, none where it is dropped."""
    return mask.to(_INTEGER[dtype.itemsize]).neg_()


def _kept(x: Tensor, bits: Tensor) -> Tensor:
    """x where it is kept, else 0; not a product, where 0 * inf would be NaN. A quarter of torch.where's time (bf16,
    512 x 1408, one thread of an EPYC)."""
    return x.view(bits.dtype).bitwise_and(bits).view(x.dtype)


_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def lora_down(x: Tensor, A: Tensor, p: float = 0.0, key: Tensor | None = None) -> Tensor:
    """s [M, R] in x's dtype: dropout with probability p and the mask of `key`, times A."""
    A = A.to(x.dtype)
    if p == 0.0:
        return x @ A.t()
    assert key is not None
    bits = _bits(dropout.mask(key, x.shape[0], x.shape[1], p), x.dtype)
    return _product(_kept(x, bits), A.t(), dropout.correction(p))


def lora_down_group(x: Tensor, A: Sequence[Tensor], p: Sequence[float], key: Sequence[Tensor | None]) -> Tensor:
    """s [M, sum R_j]: what lora_down gives for each A_j, side by side."""
    if len(A) == 1:
        return lora_down(x, A[0], p[0], key[0])
    if any(p):
        return torch.cat([lora_down(x, *adapter) for adapter in zip(A, p, key)], dim=1)
    return lora_down(x, _stacked(A, x.dtype))


def _stacked(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A_j one below the other: x is read once for all, at the price of copying A."""
    return torch.cat([a.to(dtype) for a in A])


def _columns(s: Tensor, B: Sequence[Tensor]) -> Sequence[Tensor]:
    """s [M, sum R_j] by adapter; Tensor.split takes 3.5 us of host time."""
    return [s] if len(B) == 1 else s.split([b.shape[1] for b in B], dim=1)


def lora_up_add_(y: Tensor, s: Tensor, B: Tensor, scale: float, bias: Tensor | None = None) -> None:
    """y [M, N] += bias + scale * s @ B.T, in place."""
    y.addmm_(s, B.to(s.dtype).t(), alpha=scale)
    if bias is not None:
        y += bias


def lora_up_backward(
    dy: Tensor, s: Tensor, B: Tensor, scale: float, needs_ds: bool = True, needs_dB: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """ds [M, R] in dy's dtype and dB [N, R] in B's, each None where it is not needed."""
    ds = _product(dy, B.to(dy.dtype), scale) if needs_ds else None
    if not needs_dB:
        return ds, None
    # [R, N] and then turned: a product with few rows takes .6 of the time of one with few columns (N = 512, M = 512).
    return ds, _product(s.t(), dy, scale).t().to(B.dtype).contiguous()


def lora_down_backward(
    ds: Tensor,
    x: Tensor,
    A: Tensor,
    p: float = 0.0,
    key: Tensor | None = None,
    dx: Tensor | None = None,
    needs_dA: bool = True,
) -> Tensor | None:
    """dA [R, K] in A's dtype, None where it is not needed; LoRA's part is added to dx [M, K], in place, if given."""
    if p == 0.0:
        if dx is not None:
            dx.addmm_(ds, A.to(ds.dtype))
        return (ds.t() @ x).to(A.dtype) if needs_dA else None
    assert key is not None
    bits, c = _bits(dropout.mask(key, x.shape[0], x.shape[1], p), x.dtype), dropout.correction(p)
    if dx is not None:
        dx += _kept(_product(ds, A.to(ds.dtype), c), bits)
    return _product(ds.t(), _kept(x, bits), c).to(A.dtype) if needs_dA else None


def lora_down_group_backward(
    ds: Tensor,
    x: Tensor,
    A: Sequence[Tensor],
    p: Sequence[float],
    key: Sequence[Tensor | None],
    dx: Tensor | None = None,
    needs_dA: bool = True,
) -> list[Tensor | None]:
    """lora_down_backward of each A_j for ds [M, sum R_j]."""
    if len(A) == 1:
        return [lora_down_backward(ds, x, A[0], p[0], key[0], dx, needs_dA)]
    ranks = [a.shape[0] for a in A]
    if any(p):
        adapters = zip(ds.split(ranks, dim=1), A, p, key)
        return [lora_down_backward(ds_j, x, a, q, k, dx, needs_dA) for ds_j, a, q, k in adapters]
    dA = lora_down_backward(ds, x, _stacked(A, ds.dtype), 0.0, None, dx, needs_dA)
    if dA is None:
        return [None] * len(A)
    return [part.to(a.dtype, copy=True) for part, a in zip(dA.split(ranks), A)]  # an op's outputs share no memory


def lora_up_add_group_(
    y: Sequence[Tensor], s: Tensor, B: Sequence[Tensor], scale: Sequence[float], bias: Sequence[Tensor | None]
) -> None:
    """lora_up_add_ of each y_j, for s [M, sum R_j]."""
    for y_j, s_j, b, factor, bias_j in zip(y, _columns(s, B), B, scale, bias):
        lora_up_add_(y_j, s_j, b, factor, bias_j)


def lora_up_group_backward(
    dy: Sequence[Tensor],
    s: Tensor,
    B: Sequence[Tensor],
    scale: Sequence[float],
    needs_ds: bool = True,
    needs_dB: bool = True,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """ds [M, sum R_j] and the dB_j of lora_up_backward, for each dy_j."""
    grads = [lora_up_backward(*part, needs_ds, needs_dB) for part in zip(dy, _columns(s, B), B, scale)]
    ds = [of_s for of_s, _ in grads if of_s is not None]
    dB = [of_B for _, of_B in grads]
    if not needs_ds:
        return None, dB
    return ds[0] if len(ds) == 1 else torch.cat(ds, dim=1), dB


def activated(g: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """act(g); without `out` under torch's own autograd. activation: "silu", "gelu" (by erf) or "gelu_tanh"."""
    if activation == "silu":
        return F.silu(g) if out is None else torch.ops.aten.silu.out(g, out=out)
    how = dict(approximate=_APPROXIMATION[activation])
    return F.gelu(g, **how) if out is None else torch.ops.aten.gelu.out(g, **how, out=out)


def _activation_backward(d_act: Tensor, g: Tensor, activation: str, out: Tensor) -> None:
    """out = d_act * act'(g)"""
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(d_act, g, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(d_act, g, approximate=_APPROXIMATION[activation], grad_input=out)


_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}


def _slabs(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of tensors [M, F], about GLU_ELEMENTS of each at a time."""
    step = max(1, GLU_ELEMENTS // max(1, tensors[0].shape[1]))
    return zip(*(t.split(step) for t in tensors))


def glu(g: Tensor, u: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """h [M, F] = act(g) * u in g's dtype; into `out` if given, which may be g.

    In 16 bits act(g) is rounded before it is multiplied, as by the modules of transformers: the same numbers. The
    kernels round once; widening here took 1.4 times the time (bf16, 512 x 1408, one thread).
    """
    h = torch.empty_like(g, memory_format=torch.contiguous_format) if out is None else out
    for some_g, some_u, some_h in _slabs(g, u, h):
        activated(some_g, activation, out=some_h).mul_(some_u)
    return h


def glu_backward_(
    dh: Tensor, g: Tensor, u: Tensor, activation: str, needs_h: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dg, du, h): du is written over dh, dg [M, F] into `out` if given, which may be g; h is None unless needed."""
    dg = torch.empty_like(dh, memory_format=torch.contiguous_format) if out is None else out
    h = torch.empty_like(dg) if needs_h else None
    for some_g, some_u, some_dh, some_dg, some_h in _slabs(g, u, dh, dg, dg if h is None else h):
        act = activated(some_g, activation)
        if h is not None:
            torch.mul(act, some_u, out=some_h)
        _activation_backward(some_dh * some_u, some_g, activation, some_dg)
        some_dh.mul_(act)
    return dg, dh, h


def lora_up_glu(
    g: Tensor,
    u: Tensor,
    s: Tensor,
    B: Sequence[Tensor],
    scale: Sequence[float],
    activation: str,
    update: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """h [M, F] of g + scale_g * s_g @ B_g.T and u likewise, s being [s_g, s_u]; g and u become these, in place, or
    without `update` stay what they are. h goes to `out` if given, which without `update` may be g: then nobody may read
    u again either.
    """
    if not update and out is not g:
        g, u = g.clone(), u.clone()
    lora_up_add_group_([g, u], s, B, scale, [None, None])
    return glu(g, u, activation, out=out)


def lora_glu_backward_(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    s: Tensor,
    B: Sequence[Tensor],
    scale: Sequence[float],
    ds: Tensor,
    A: Tensor,
    p: float,
    key: Tensor | None,
    activation: str,
    needs_dA: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dg, du, dA [R, F]) of the base layers' dh, g and u [M, F], where LoRA's parts are added to all three: to dh that
    of ds [M, R] and A [R, F], the down projection's, to g and u as lora_up_glu does. du is written over dh, dg into
    `out` if given, which may be g.
    """
    lora_down_backward(ds, dh, A, p, key, dh, needs_dA=False)
    g, u = g.clone(), u.clone()
    lora_up_add_group_([g, u], s, B, scale, [None, None])
    dg, du, h = glu_backward_(dh, g, u, activation, needs_h=needs_dA, out=out)
    return dg, du, None if h is None else lora_down_backward(ds, h, A, p, key)


def apply_dropout(x: Tensor, p: float, key: Tensor | None) -> Tensor:
    """x [M, K] with the mask of `key`, times c: under torch's own autograd."""
    if key is None:
        return x
    return dropout.correction(p) * torch.where(dropout.mask(key, x.shape[0], x.shape[1], p), x, 0)


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    p: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """y [M, N] = x @ W.T + bias + scale * dropout(x) @ A.T @ B.T, under torch's own autograd: the truth."""
    W = dequantize(weight, x.dtype) if isinstance(weight, QuantizedWeight) else weight
    s = apply_dropout(x, p, key) @ A.to(x.dtype).t()
    return F.linear(x, W, bias) + scale * s @ B.to(x.dtype).t()
