"""The gate of a MLP whose three layers have LoRA: their adapters and the activation, one pass each way.

    forward    g  = g + scale_g * s_g[M, R_g] @ B_g[F, R_g].T        u likewise        h[M, F] = act(g) * u
    backward   dh = dh + c * mask * (ds[M, R] @ A[R, F])             A: of the down projection, whose input is h
               dg = dh * u * act'(g)        du = dh * act(g)         dA[R, F] = c * ds.T @ (mask * h)

g and u [M, F] come from the base products, s_g and s_u side by side in one s, as lora_down.py gives them. The forward
reads g and u once and writes them back only if asked to: the backward can add LoRA's parts to what the base gave once
more, for two products of rank R a tile. It also makes h again, which only dA is computed from, and adds LoRA's part to
dh before it uses it. At 4096 tokens of a Llama-3-8B MLP (F = 14336, 16 bits) the forward moves 235 MB less than with g
and u written, and the backward 470 MB less than lora_down_backward for dh, glu_backward_ with h, and lora_down_backward
for dA, in two launches less.

g, u and h are rounded as by the one-by-one kernels; dh is not, except where they are taken for what the kernel does not
cover. fp32 accumulation; dA is summed in two stages, in fixed order, no atomics. Masks: lora_down.py. Activations:
glu.py. The same in plain torch: reference.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, dropout, glu, lora_down
from .glu import activation_and_slope
from .launch import Plan, planned
from .lora_up_add import lora_up_add_group_, up_tile
from .reduce import sum_partials_of
from .tiles import cdiv, dropout_mask, in_one_launch, input_precision, layout, rows


@triton.jit
def _with_lora(
    y_ptrs, s_ptr, b_ptr, scale, m, n, inside, M, F, R, stride_s_m, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y + scale * s @ B.T, in y's dtype"""
    acc = up_tile(s_ptr, b_ptr, scale, m, n, M, F, R, stride_s_m, stride_b_n, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION)
    y = tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32) + acc
    return y.to(y_ptrs.dtype.element_ty)


@triton.jit(do_not_specialize=["M"])
def _lora_up_glu_kernel(
    g_ptr, u_ptr, h_ptr, s_ptr, bg_ptr, bu_ptr, scale_g, scale_u, M, F, R_g, R_u,
    stride_g_m, stride_u_m, stride_h_m, stride_s_m, stride_bg_n, stride_bu_n,
    ACTIVATION: tl.constexpr, UPDATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: a tile of g, u and h. Every element is read before it is written, by the program that writes it."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = (m < M) & (n[None, :] < F)
    g_ptrs, u_ptrs = g_ptr + m * stride_g_m + n[None, :], u_ptr + m * stride_u_m + n[None, :]
    g = _with_lora(
        g_ptrs, s_ptr, bg_ptr, scale_g, m, n, inside, M, F, R_g, stride_s_m, stride_bg_n,
        BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip
    u = _with_lora(
        u_ptrs, s_ptr + R_g, bu_ptr, scale_u, m, n, inside, M, F, R_u, stride_s_m, stride_bu_n,
        BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip
    if UPDATE:
        tl.store(g_ptrs, g, mask=inside)
        tl.store(u_ptrs, u, mask=inside)
    act, _ = activation_and_slope(g.to(tl.float32), ACTIVATION)
    tl.store(h_ptr + m * stride_h_m + n[None, :], act * u.to(tl.float32), mask=inside)


@planned
def _forward_plan(
    M: int, F: int, ranks: tuple[int, ...], distances: tuple[int, ...], scale: tuple[float, ...], activation: str,
    update: bool, precision: str,
) -> Plan:  # fmt: skip
    """distances: of the rows of g, u, h, s, B_g, B_u."""
    config = configs.lora_up_glu(max(ranks))
    return Plan(
        _lora_up_glu_kernel, (cdiv(M, config["BLOCK_M"]), cdiv(F, config["BLOCK_N"])),
        (*scale, M, F, *ranks, *distances),
        ACTIVATION=activation, UPDATE=update, PRECISION=precision, enable_fp_fusion=True, **config,
    )  # fmt: skip


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
    """h [M, F] in g's dtype from g and u [M, F] of the base layers, s [M, R_g + R_u] and B_g [F, R_g], B_u [F, R_u].

    With `update`, g and u become what h is computed from, in place; without, they are left as they are. h goes to `out`
    if given, which without `update` may be g: then nobody may read u again either.
    """
    assert g.stride(1) == u.stride(1) == 1
    assert out is None or out.stride(1) == 1
    assert not update or out is None or out.data_ptr() != g.data_ptr()
    s, B, (M, F), ranks = rows(s), [rows(b) for b in B], g.shape, tuple([b.shape[1] for b in B])
    h = torch.empty_like(g, memory_format=torch.contiguous_format) if out is None else out
    if not h.numel():
        return h
    if not in_one_launch(g.element_size(), layout(g, u)[1]):
        if not update and h is not g:
            g, u = g.clone(), u.clone()
        lora_up_add_group_([g, u], s, B, scale, [None, None])
        return glu.glu(g, u, activation, out=h)
    launch = _forward_plan(M, F, ranks, layout(g, u, h, s, *B)[0], tuple(scale), activation, update, input_precision())
    launch(g, u, h, s, *B)
    return h


@triton.jit
def _tile_with_lora(y, s_ptr, stride_s_m, b, scale, m, M, r, R, PRECISION: tl.constexpr):
    """y + scale * s @ b in y's dtype: a tile [BLOCK_M, BLOCK_F]; b [BLOCK_R, BLOCK_F] has all of the rank"""
    s = tl.load(s_ptr + m * stride_s_m + r, mask=(m < M) & (r < R), other=0.0)
    part = tl.dot(s, b, input_precision=PRECISION)
    return (y.to(tl.float32) + part * tl.cast(scale, tl.float32)).to(y.dtype)


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _lora_glu_bwd_kernel(
    dh_ptr, g_ptr, u_ptr, s_ptr, bg_ptr, bu_ptr, ds_ptr, a_ptr, dg_ptr, da_ptr, key_ptr,
    scale_g, scale_u, M, F, R_g, R_u, R, rows_per_split, threshold, c,
    stride_dh_m, stride_g_m, stride_u_m, stride_s_m, stride_bg_n, stride_bu_n, stride_ds_m, stride_a_r, stride_dg_m,
    ACTIVATION: tl.constexpr, NEEDS_DA: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F columns, rows_per_split rows; dA goes to da_ptr[split, R, F]. Every element is read before
    it is written, by the program that writes it: du lies over dh, dg may lie over g."""
    f0, split = tl.program_id(0) * BLOCK_F, tl.program_id(1).to(tl.int64)
    f, r = f0 + tl.arange(0, BLOCK_F)[None, :], tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_F], [1, BLOCK_R]
    column, rank = tl.trans(f), tl.trans(r)
    dtype = g_ptr.dtype.element_ty
    b_g = tl.load(bg_ptr + column * stride_bg_n + r, mask=(column < F) & (r < R_g), other=0.0).to(dtype)
    b_u = tl.load(bu_ptr + column * stride_bu_n + r, mask=(column < F) & (r < R_u), other=0.0).to(dtype)
    a = tl.load(a_ptr + rank * stride_a_r + f, mask=(rank < R) & (f < F), other=0.0).to(dtype)
    b_g, b_u = tl.trans(b_g), tl.trans(b_u)
    acc = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    start = split * rows_per_split
    for m0 in range(start, tl.minimum(start + rows_per_split, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
        inside = (m < M) & (f < F)
        g = tl.load(g_ptr + m * stride_g_m + f, mask=inside, other=0.0)
        u = tl.load(u_ptr + m * stride_u_m + f, mask=inside, other=0.0)
        g = _tile_with_lora(g, s_ptr, stride_s_m, b_g, scale_g, m, M, r, R_g, PRECISION)
        u = _tile_with_lora(u, s_ptr + R_g, stride_s_m, b_u, scale_u, m, M, r, R_u, PRECISION)
        act, slope = activation_and_slope(g.to(tl.float32), ACTIVATION)

        ds = tl.load(ds_ptr + m * stride_ds_m + r, mask=(m < M) & (r < R), other=0.0)
        part = tl.dot(ds, a, input_precision=PRECISION) * tl.cast(c, tl.float32)
        h = (act * u.to(tl.float32)).to(g.dtype)
        if DROPOUT:
            pairs = f0 // 2 + tl.arange(0, BLOCK_F // 2)[None, :]
            kept = dropout_mask(key_ptr, m, pairs, (F + 1) // 2, threshold)
            part, h = tl.where(kept, part, 0.0), tl.where(kept, h, 0.0)
        if NEEDS_DA:
            acc = tl.dot(tl.trans(ds), h, acc, input_precision=PRECISION)

        dh_ptrs = dh_ptr + m * stride_dh_m + f
        dh = tl.load(dh_ptrs, mask=inside, other=0.0).to(tl.float32) + part
        tl.store(dh_ptrs, dh * act, mask=inside)
        tl.store(dg_ptr + m * stride_dg_m + f, dh * u.to(tl.float32) * slope, mask=inside)
    if NEEDS_DA:
        da_ptrs = da_ptr + (split * R + rank) * F + f
        tl.store(da_ptrs, acc * tl.cast(c, tl.float32), mask=(rank < R) & (f < F))


@planned
def _backward_plan(
    M: int, F: int, ranks: tuple[int, int, int], distances: tuple[int, ...], scale: tuple[float, ...], p: float,
    activation: str, needs_dA: bool, precision: str,
) -> tuple[int, Plan]:  # fmt: skip
    """(splits of M, the launch). distances: of the rows of dh, g, u, s, B_g, B_u, ds, A, dg."""
    config = configs.lora_glu_backward(max(ranks))
    columns = cdiv(F, config["BLOCK_F"])
    splits, rows_per_split = configs.split_rows(M, config["BLOCK_M"], columns)
    numbers = (*scale, M, F, *ranks, rows_per_split, dropout.threshold(p), dropout.correction(p), *distances)
    return splits, Plan(
        _lora_glu_bwd_kernel, (columns, splits), numbers,
        ACTIVATION=activation, NEEDS_DA=needs_dA, DROPOUT=p > 0, PRECISION=precision, enable_fp_fusion=True, **config,
    )  # fmt: skip


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
    """(dg, du, dA [R, F] in A's dtype or None) of the base layers' dh, g and u [M, F]: dh = dy @ W of down, ds [M, R]
    and A [R, F] its adapter's; s, B and scale as lora_up_glu takes them. du is written over dh, dg into `out` if given,
    which may be g."""
    assert dh.stride(1) == g.stride(1) == u.stride(1) == 1
    assert out is None or out.stride(1) == 1
    s, B, ds, A, (M, F) = rows(s), [rows(b) for b in B], rows(ds), rows(A), g.shape
    ranks = (B[0].shape[1], B[1].shape[1], A.shape[0])
    if not g.numel() or why_not(g.dtype, F, ranks) or not in_one_launch(g.element_size(), layout(dh, g, u)[1]):
        lora_down.lora_down_backward(ds, dh, A, p, key, dh, needs_dA=False)  # rounds dh once more
        g, u = g.clone(), u.clone()
        lora_up_add_group_([g, u], s, B, scale, [None, None])
        dg, du, h = glu.glu_backward_(dh, g, u, activation, needs_h=needs_dA, out=out)
        return dg, du, None if h is None else lora_down.lora_down_backward(ds, h, A, p, key)
    dg = torch.empty_like(dh, memory_format=torch.contiguous_format) if out is None else out
    distances, _ = layout(dh, g, u, s, *B, ds, A, dg)
    splits, launch = _backward_plan(M, F, ranks, distances, tuple(scale), p, activation, needs_dA, input_precision())
    if not needs_dA:
        launch(dh, g, u, s, *B, ds, A, dg, None, key)
        return dg, dh, None
    partial = torch.empty((splits, *A.shape), dtype=A.dtype if splits == 1 else torch.float32, device=g.device)
    launch(dh, g, u, s, *B, ds, A, dg, partial, key)
    return dg, dh, partial[0] if splits == 1 else sum_partials_of(partial, [A])[0]


def why_not(dtype: torch.dtype, F: int, ranks: Sequence[int]) -> str | None:
    """The reason the backward is not one launch, or None where it is: all of a rank has to fit in one tile."""
    if dtype.itemsize != 2:
        return f"g is {dtype}, the kernel for the gate takes float16 and bfloat16"
    if F % 16:
        return f"rows of {F} features do not start at multiples of 16"
    if max(ranks) > configs.WIDEST_GATE:
        return f"rank {max(ranks)} is above {configs.WIDEST_GATE}"
    return None
