"""The gate of a transformer's MLP: SwiGLU and GeGLU (arXiv 2002.05202), forward and backward in one pass each.

    forward    h[M, F]  = act(g[M, F]) * u[M, F]
    backward   dg[M, F] = dh * u * act'(g)        du[M, F] = dh * act(g), over dh        h again, if asked for

    act   "silu"        g * sigmoid(g)
          "gelu"        g * Phi(g) = g * (1 + erf(g / sqrt(2))) / 2
          "gelu_tanh"   g * sigmoid(2 * sqrt(2 / pi) * (g + 0.044715 * g**3)), which is its usual form with tanh

fp32 inside, one rounding on store, no tensor cores: it runs on every GPU that Triton knows. The backward that gives h
saves a pass over g and u to whoever needs both (ops/mlp.py). The same in plain torch: reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import Plan, planned
from .tiles import cdiv, rows

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
BLOCK = 1024  # elements a program takes of one row: with 4 warps, 16 bytes a thread and load where they have 16 bits
CONFIG = dict(BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)


@triton.jit
def _logistic(z):
    """(c, c') for c = sigmoid(z): without overflow, and with full precision where c is close to 1."""
    e = tl.exp(-tl.abs(z))
    d = 1.0 / (1.0 + e)
    return tl.where(z < 0, e * d, d), e * d * d


@triton.jit
def activation_and_slope(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)): all are g * c(g) with a cumulative distribution c, hence act' = c + g * c'."""
    if ACTIVATION == "gelu":
        c = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)  # 1 / sqrt(2)
        slope = 0.3989422804014327 * tl.exp(-0.5 * g * g)  # 1 / sqrt(2 pi)
    elif ACTIVATION == "gelu_tanh":
        c, slope = _logistic(1.5957691216057308 * (g + 0.044715 * g * g * g))  # 2 * sqrt(2 / pi)
        slope *= 1.5957691216057308 * (1.0 + 0.134145 * g * g)  # 3 * 0.044715
    else:
        tl.static_assert(ACTIVATION == "silu")
        c, slope = _logistic(g)
    return g * c, c + g * slope


@triton.jit
def _place(F, BLOCK: tl.constexpr):
    """(row as int64, columns [BLOCK]) of this program: along a row first, and no axis of the grid is short for M."""
    program, per_row = tl.program_id(0), tl.cdiv(F, BLOCK)
    return (program // per_row).to(tl.int64), (program % per_row) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _glu_fwd_kernel(
    g_ptr, u_ptr, h_ptr,
    F, stride_g_m, stride_u_m, stride_h_m,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m, f = _place(F, BLOCK)
    g = tl.load(g_ptr + m * stride_g_m + f, mask=f < F, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + m * stride_u_m + f, mask=f < F, other=0.0).to(tl.float32)
    act, _ = activation_and_slope(g, ACTIVATION)
    tl.store(h_ptr + m * stride_h_m + f, act * u, mask=f < F)


@triton.jit
def _glu_bwd_kernel(
    dh_ptr, g_ptr, u_ptr, dg_ptr, h_ptr,
    F, stride_dh_m, stride_g_m, stride_u_m, stride_dg_m, stride_h_m,
    ACTIVATION: tl.constexpr, NEEDS_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every element is read before it is written, by the program that writes it: du may lie over dh, dg over g."""
    m, f = _place(F, BLOCK)
    dh_ptrs = dh_ptr + m * stride_dh_m + f
    dh = tl.load(dh_ptrs, mask=f < F, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + m * stride_g_m + f, mask=f < F, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + m * stride_u_m + f, mask=f < F, other=0.0).to(tl.float32)
    act, slope = activation_and_slope(g, ACTIVATION)
    tl.store(dh_ptrs, dh * act, mask=f < F)
    tl.store(dg_ptr + m * stride_dg_m + f, dh * u * slope, mask=f < F)
    if NEEDS_H:
        tl.store(h_ptr + m * stride_h_m + f, act * u, mask=f < F)


def glu(g: Tensor, u: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """h [M, F] = act(g) * u in g's dtype; into `out` if given, which may be g. Rows may lie apart."""
    g, u, (M, F) = rows(g), rows(u), g.shape
    h = torch.empty_like(g, memory_format=torch.contiguous_format) if out is None else out
    assert h.stride(1) == 1
    if h.numel():
        _forward_plan(M, F, g.stride(0), u.stride(0), h.stride(0), activation)(g, u, h)
    return h


@planned
def _forward_plan(M: int, F: int, of_g: int, of_u: int, of_h: int, activation: str) -> Plan:
    return Plan(_glu_fwd_kernel, (M * cdiv(F, BLOCK),), (F, of_g, of_u, of_h), ACTIVATION=activation, **CONFIG)


def glu_backward_(
    dh: Tensor, g: Tensor, u: Tensor, activation: str, needs_h: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dg, du, h): du is written over dh, dg [M, F] into `out` if given, which may be g; h is None unless needed."""
    assert dh.stride(1) == 1
    g, u, (M, F) = rows(g), rows(u), g.shape
    dg = torch.empty_like(dh, memory_format=torch.contiguous_format) if out is None else out
    assert dg.stride(1) == 1
    h = torch.empty_like(dg) if needs_h else None
    if dh.numel():
        of_h = 0 if h is None else h.stride(0)
        launch = _backward_plan(M, F, (dh.stride(0), g.stride(0), u.stride(0), dg.stride(0), of_h), activation, needs_h)
        launch(dh, g, u, dg, h)
    return dg, dh, h


@planned
def _backward_plan(M: int, F: int, distances: tuple[int, ...], activation: str, needs_h: bool) -> Plan:
    """distances: of the rows of dh, g, u, dg, h."""
    constants = dict(ACTIVATION=activation, NEEDS_H=needs_h, **CONFIG)
    return Plan(_glu_bwd_kernel, (M * cdiv(F, BLOCK),), (F, *distances), **constants)


def why_not(dtype: torch.dtype) -> str | None:
    """The reason these kernels cannot take g and u of this dtype, or None. Shapes and the distance of rows are free."""
    return tiles.why_not("g", dtype)
