"""LoRA's up projections of a gated MLP's two branches and the gate, in one pass over both.

    g[M, F] += scale_g * s_g[M, R_g] @ B_g[F, R_g].T        u[M, F] += scale_u * s_u[M, R_u] @ B_u[F, R_u].T
    h[M, F]  = act(g) * u

g and u come from the base products, s_g and s_u side by side in one s, as lora_down.py gives them. One by one the three
would read g and u twice; here they are read once, and written, rounded, only if somebody wants them for a backward: at
4096 tokens of a Llama-3-8B MLP 235 MB are saved, and 470 MB without a backward. h is computed from the rounded g and u,
so that it is what glu.py would compute from them again. Activations: glu.py. The same in plain torch: reference.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .glu import activation_and_slope, glu
from .launch import Plan, planned
from .lora_up_add import lora_up_add_group_
from .tiles import cdiv, in_one_launch, input_precision, layout, rows


@triton.jit
def _with_lora(
    y_ptrs, s_ptr, b_ptr, scale, m, n, inside, M, F, R, stride_s_m, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y + scale * s @ B.T, in y's dtype"""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
        s = tl.load(s_ptr + m * stride_s_m + r, mask=(m < M) & (r < R), other=0.0)
        b = tl.load(b_ptr + n[:, None] * stride_b_n + r, mask=(n[:, None] < F) & (r < R), other=0.0)
        acc = tl.dot(s, tl.trans(b.to(s.dtype)), acc, input_precision=PRECISION)
    y = tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32) + acc * tl.cast(scale, tl.float32)
    return y.to(y_ptrs.dtype.element_ty)


@triton.jit(do_not_specialize=["M"])
def _lora_up_glu_kernel(
    g_ptr, u_ptr, h_ptr, s_ptr, bg_ptr, bu_ptr, scale_g, scale_u, M, F, R_g, R_u,
    stride_g_m, stride_u_m, stride_h_m, stride_s_m, stride_bg_n, stride_bu_n,
    ACTIVATION: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
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
    if KEEP:
        tl.store(g_ptrs, g, mask=inside)
        tl.store(u_ptrs, u, mask=inside)
    act, _ = activation_and_slope(g.to(tl.float32), ACTIVATION)
    tl.store(h_ptr + m * stride_h_m + n[None, :], act * u.to(tl.float32), mask=inside)


@planned
def _plan(
    M: int, F: int, ranks: tuple[int, ...], distances: tuple[int, ...], scale: tuple[float, ...], activation: str,
    keep: bool, precision: str,
) -> Plan:  # fmt: skip
    """distances: of the rows of g, u, h, s, B_g, B_u."""
    config = configs.lora_up_glu(max(ranks))
    return Plan(
        _lora_up_glu_kernel, (cdiv(M, config["BLOCK_M"]), cdiv(F, config["BLOCK_N"])),
        (*scale, M, F, *ranks, *distances),
        ACTIVATION=activation, KEEP=keep, PRECISION=precision, enable_fp_fusion=True, **config,
    )  # fmt: skip


def lora_up_glu(
    g: Tensor, u: Tensor, s: Tensor, B: Sequence[Tensor], scale: Sequence[float], activation: str, keep: bool = True
) -> Tensor:
    """h [M, F] in g's dtype from g and u [M, F] of the base layers, s [M, R_g + R_u] and B_g [F, R_g], B_u [F, R_u].

    With `keep`, g and u are what they became, in place; without, h lies over g and u is left alone.
    """
    assert g.stride(1) == u.stride(1) == 1
    s, B, (M, F), ranks = rows(s), [rows(b) for b in B], g.shape, tuple([b.shape[1] for b in B])
    h = torch.empty_like(g, memory_format=torch.contiguous_format) if keep else g
    if not h.numel():
        return h
    if not in_one_launch(g.element_size(), layout(g, u)[1]):
        lora_up_add_group_([g, u], s, B, scale, [None, None])
        return glu(g, u, activation, out=h)
    launch = _plan(M, F, ranks, layout(g, u, h, s, *B)[0], tuple(scale), activation, keep, input_precision())
    launch(g, u, h, s, *B)
    return h
