"""LoRA's up projection, added to the base layer's output in the same pass, and its backward, for up to three adapters.

    forward    y_j[M, N_j] += bias_j[N_j] + scale_j * s_j[M, R_j] @ B_j[N_j, R_j].T          in place
    backward   ds_j[M, R_j] = scale_j * dy_j[M, N_j] @ B_j         dB_j[N_j, R_j] = scale_j * dy_j.T @ s_j

The s_j lie side by side in one s [M, sum R_j], and so do the ds_j: what lora_down.py gives and takes. The forward reads
y once and writes it once; s @ B.T never reaches memory. The backward reads dy once for both outputs: a program owns
rows of one dy, keeps its ds in registers and leaves a partial dB, which a second stage sums in fixed order. B may be
fp32 under a 16-bit y: its tiles are rounded in registers. fp32 accumulation, one rounding on store; dB is written in
B's dtype. The same in plain torch: reference.py.

Several adapters share a launch and nothing else: each program belongs to one of them, and takes the branch of a kernel
that has its pointers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, tiles
from .reduce import sum_partials, sum_partials_of
from .tiles import in_one_launch, input_precision, rows, strides, thrice, warps

SLAB = 8192  # rows of dy per launch of the backward: bounds its workspace at SLAB / BLOCK_M * N * R * 4 bytes,
# 59 MB for N = 14336, R = 16


@triton.jit
def _add_up(
    y_ptr, s_ptr, b_ptr, bias_ptr, scale, M, N, R, stride_y_m, stride_s_m, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of y += bias + scale * s @ B.T; nothing beyond N"""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
        s = tl.load(s_ptr + m * stride_s_m + r, mask=(m < M) & (r < R), other=0.0)
        b = tl.load(b_ptr + n[:, None] * stride_b_n + r, mask=(n[:, None] < N) & (r < R), other=0.0)
        acc = tl.dot(s, tl.trans(b.to(s.dtype)), acc, input_precision=PRECISION)
    acc *= tl.cast(scale, tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M) & (n[None, :] < N)
    y_ptrs = y_ptr + m * stride_y_m + n[None, :]
    tl.store(y_ptrs, tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32) + acc, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _lora_up_add_fwd_kernel(
    y0_ptr, y1_ptr, y2_ptr, s_ptr, b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr,
    scale0, scale1, scale2, M, N0, N1, N2, R0, R1, R2,
    stride_y0_m, stride_y1_m, stride_y2_m, stride_s_m, stride_b0_n, stride_b1_n, stride_b2_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    COUNT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one y, which the third axis of the grid tells."""
    adapter = tl.program_id(2)
    if adapter == 0:
        _add_up(
            y0_ptr, s_ptr, b0_ptr, bias0_ptr, scale0, M, N0, R0, stride_y0_m, stride_s_m, stride_b0_n,
            BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
    if COUNT > 1:  # noqa: SIM102  this is a condition at compile time
        if adapter == 1:
            _add_up(
                y1_ptr, s_ptr + R0, b1_ptr, bias1_ptr, scale1, M, N1, R1, stride_y1_m, stride_s_m, stride_b1_n,
                BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
    if COUNT > 2:  # noqa: SIM102
        if adapter == 2:
            _add_up(
                y2_ptr, s_ptr + R0 + R1, b2_ptr, bias2_ptr, scale2, M, N2, R2, stride_y2_m, stride_s_m, stride_b2_n,
                BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip


@triton.jit
def _up_backward(
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, scale, program, M, N, R, stride_dy_m, stride_s_m, stride_b_n, stride_ds_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of dy, one tile of R; dB [N, R] to db_ptr"""
    m = program * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    factor = tl.cast(scale, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    s = tl.load(s_ptr + m * stride_s_m + r, mask=(m < M) & (r < R), other=0.0)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        dy = tl.load(dy_ptr + m * stride_dy_m + n[None, :], mask=(m < M) & (n[None, :] < N), other=0.0)
        of_b = (n[:, None] < N) & (r < R)
        if NEEDS_DS:
            b = tl.load(b_ptr + n[:, None] * stride_b_n + r, mask=of_b, other=0.0).to(dy.dtype)
            acc = tl.dot(dy, b, acc, input_precision=PRECISION)
        if NEEDS_DB:
            db = tl.dot(tl.trans(dy), s, input_precision=PRECISION) * factor
            tl.store(db_ptr + n[:, None].to(tl.int64) * R + r, db, mask=of_b)
    if NEEDS_DS:
        tl.store(ds_ptr + m * stride_ds_m + r, acc * factor, mask=(m < M) & (r < R))


@triton.jit(do_not_specialize=["M", "numel"])
def _lora_up_bwd_kernel(
    dy0_ptr, dy1_ptr, dy2_ptr, s_ptr, b0_ptr, b1_ptr, b2_ptr, ds_ptr, db_ptr,
    scale0, scale1, scale2, M, numel, N0, N1, N2, R0, R1, R2,
    stride_dy0_m, stride_dy1_m, stride_dy2_m, stride_s_m, stride_b0_n, stride_b1_n, stride_b2_n, stride_ds_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, COUNT: tl.constexpr,
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one dy, one tile of R. The dB_j go to db_ptr[program, numel], one after another."""
    program, adapter = tl.program_id(0).to(tl.int64), tl.program_id(2)
    db_ptr += program * numel
    if adapter == 0:
        _up_backward(
            dy0_ptr, s_ptr, b0_ptr, ds_ptr, db_ptr, scale0, program, M, N0, R0, stride_dy0_m, stride_s_m, stride_b0_n,
            stride_ds_m, BLOCK_M, BLOCK_N, BLOCK_R, NEEDS_DS, NEEDS_DB, PRECISION,
        )  # fmt: skip
    if COUNT > 1:
        db_ptr += tl.cast(N0, tl.int64) * R0
        if adapter == 1:
            _up_backward(
                dy1_ptr, s_ptr + R0, b1_ptr, ds_ptr + R0, db_ptr, scale1, program, M, N1, R1, stride_dy1_m, stride_s_m,
                stride_b1_n, stride_ds_m, BLOCK_M, BLOCK_N, BLOCK_R, NEEDS_DS, NEEDS_DB, PRECISION,
            )  # fmt: skip
    if COUNT > 2:
        db_ptr += tl.cast(N1, tl.int64) * R1
        if adapter == 2:
            _up_backward(
                dy2_ptr, s_ptr + R0 + R1, b2_ptr, ds_ptr + R0 + R1, db_ptr, scale2, program, M, N2, R2, stride_dy2_m,
                stride_s_m, stride_b2_n, stride_ds_m, BLOCK_M, BLOCK_N, BLOCK_R, NEEDS_DS, NEEDS_DB, PRECISION,
            )  # fmt: skip


def lora_up_add_group_(
    y: Sequence[Tensor], s: Tensor, B: Sequence[Tensor], scale: Sequence[float], bias: Sequence[Tensor | None]
) -> None:
    """y_j [M, N_j] += bias_j + scale_j * s_j @ B_j.T, in place, for s [M, sum R_j]. The rows of y_j must be dense."""
    assert all(t.stride(1) == 1 for t in y)
    s, B = rows(s), [rows(b) for b in B]
    M, ranks, widths = s.shape[0], [b.shape[1] for b in B], [b.shape[0] for b in B]
    if M == 0 or not any(widths):
        return
    if not in_one_launch(s, y):
        for one in zip(y, s.split(ranks, dim=1), B, scale, bias):
            lora_up_add_(*one)
        return
    bias = [None if b is None else b.contiguous() for b in bias]
    config = configs.lora_up_forward(max(ranks), y[0].element_size())
    grid = triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(max(widths), config["BLOCK_N"]), len(B)
    _lora_up_add_fwd_kernel[grid](
        *thrice(y, y[0]), s, *thrice(B, B[0]), *thrice(bias, None), *thrice(scale, 1.0), M, *thrice(widths, 0),
        *thrice(ranks, 0), *strides(y), s.stride(0), *strides(B),
        COUNT=len(B), PRECISION=input_precision(), num_warps=warps(*y, *B), enable_fp_fusion=True, **config,
    )  # fmt: skip


def lora_up_group_backward(
    dy: Sequence[Tensor],
    s: Tensor,
    B: Sequence[Tensor],
    scale: Sequence[float],
    needs_ds: bool = True,
    needs_dB: bool = True,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """ds [M, sum R_j] in the dtype of dy, and dB_j [N_j, R_j] in that of B_j, None where they are not needed."""
    dy, s, B = [rows(t) for t in dy], rows(s), [rows(b) for b in B]
    M, ranks, widths = s.shape[0], [b.shape[1] for b in B], [b.shape[0] for b in B]
    numel = sum(b.numel() for b in B)
    ds = dy[0].new_empty(M, sum(ranks)) if needs_ds else None
    before: Tensor | None = None
    dB: list[Tensor | None] = [b.new_zeros(b.shape) if needs_dB else None for b in B] if M == 0 else [None] * len(B)
    config = configs.lora_up_backward(max(ranks), s.element_size())
    for start in range(0, M, SLAB):
        slab = slice(start, min(start + SLAB, M))
        programs = triton.cdiv(slab.stop - start, config["BLOCK_M"])
        partial = torch.empty((programs if needs_dB else 0, numel), dtype=torch.float32, device=s.device)
        of_ds = partial if ds is None else ds[slab]
        _lora_up_bwd_kernel[(programs, triton.cdiv(max(ranks), config["BLOCK_R"]), len(B))](
            *thrice([t[slab] for t in dy], dy[0][slab]), s[slab], *thrice(B, B[0]), of_ds, partial,
            *thrice(scale, 1.0), slab.stop - start, numel, *thrice(widths, 0), *thrice(ranks, 0),
            *strides(dy), s.stride(0), *strides(B), of_ds.stride(0),
            COUNT=len(B), NEEDS_DS=needs_ds, NEEDS_DB=needs_dB, PRECISION=input_precision(),
            num_warps=warps(*dy), enable_fp_fusion=True, **config,
        )  # fmt: skip
        if needs_dB and slab.stop == M:
            dB[:] = sum_partials_of(partial, B, start=before)
        elif needs_dB:
            before = sum_partials(partial, torch.float32, start=before)
    return ds, dB


def lora_up_add_(y: Tensor, s: Tensor, B: Tensor, scale: float, bias: Tensor | None = None) -> None:
    """y [M, N] += bias + scale * s @ B.T, in place. The rows of y must be dense."""
    lora_up_add_group_([y], s, [B], [scale], [bias])


def lora_up_backward(
    dy: Tensor, s: Tensor, B: Tensor, scale: float, needs_ds: bool = True, needs_dB: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """ds [M, R] in dy's dtype and dB [N, R] in B's, each None where it is not needed."""
    ds, (dB,) = lora_up_group_backward([dy], s, [B], [scale], needs_ds, needs_dB)
    return ds, dB


def why_not(dtype: torch.dtype) -> str | None:
    """The reason these kernels cannot take y of this dtype, or None where they can. Shapes and strides are free."""
    return tiles.why_not("y", dtype)
