"""y[M, N] = x[M, K] @ W[N, K].T + bias[N] + scale * s[M, R] @ B[N, R].T for M of at most 8: generation.

W is read once and everything else is small, so nothing is multiplied by tensor cores (sm_75 will do): a thread decodes
a word of eight weights per row, rounds them to x's dtype as dequantize would, and adds their products with each row of
x in fp32. Where N alone makes too few programs, K is split among several; the first adds bias and LoRA, and a second
stage sums their parts in fixed order. The same in plain torch: reference.py, quant_matmul.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.quant.weight import Format, QuantizedWeight

from . import autotune, configs, decode
from .launch import Plan, planned
from .reduce import sum_partials
from .tiles import cdiv, layout, power_of_2, rows

MAX_M = 8  # beyond, the products outweigh the decoding, and tl.dot's smallest tile, 16, is half full


@triton.jit
def _eighths(t):
    """Every eighth column, eight times over: the order is the same for all t."""
    a, b = tl.split(t.reshape(t.shape[0], t.shape[1] // 8, 2, 2, 2))
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    e0, e1 = tl.split(a0)
    e2, e3 = tl.split(a1)
    e4, e5 = tl.split(b0)
    e6, e7 = tl.split(b1)
    return e0, e1, e2, e3, e4, e5, e6, e7


@triton.jit(do_not_specialize=["M", "steps_per_split"])
def _quant_gemv_kernel(
    data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    x_ptr, y_ptr, bias_ptr, s_ptr, b_ptr,
    scale, M, N, K, R, steps_per_split,
    stride_x_m, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    G: tl.constexpr, NESTED_G: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LORA: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of y, steps_per_split tiles of K. y_ptr[split, M, N]."""
    n0, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    n = n0 + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K // 8], tl.float32)
    start = split * steps_per_split * BLOCK_K
    for k0 in range(start, tl.minimum(start + steps_per_split * BLOCK_K, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + m[:, None].to(tl.int64) * stride_x_m + k, mask=(m[:, None] < M) & (k < K), other=0.0)
        w = decode.tile(
            data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
            n0, k0, N, K, BLOCK_N, BLOCK_K, G, NESTED_G, UNIT, ALIGNED, EVEN,
        )  # fmt: skip
        xs, ws = _eighths(x.to(tl.float32)), _eighths(w.to(x.dtype).to(tl.float32))
        for i in tl.static_range(8):
            acc = tl.fma(xs[i][:, None, :], ws[i][None, :, :], acc)
    y = tl.sum(acc, axis=2)
    if split == 0:
        if HAS_LORA:
            for r0 in range(0, R, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)[None, :]
                s = tl.load(s_ptr + m[:, None] * R + r, mask=(m[:, None] < M) & (r < R), other=0.0)
                b = tl.load(
                    b_ptr + n[:, None].to(tl.int64) * stride_b_n + r, mask=(n[:, None] < N) & (r < R), other=0.0
                )
                part = s.to(tl.float32)[:, None, :] * b.to(s.dtype).to(tl.float32)[None, :, :]
                y += tl.sum(part, axis=2) * tl.cast(scale, tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y_ptr + (split.to(tl.int64) * M + m[:, None]) * N + n[None, :], y, mask=inside)


def quant_gemv(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, s: Tensor | None, B: Tensor | None, scale: float
) -> Tensor:
    """y [M, N] in x's dtype, for 0 <= M <= MAX_M."""
    x, N = rows(x), weight.shape[0]
    M = x.shape[0]
    s, B = (None, None) if s is None or B is None else (s.contiguous(), rows(B))
    R = 0 if B is None else B.shape[1]
    if M * N == 0:
        return x.new_empty(M, N)

    of_x, aligned = layout(x)
    distances = (*of_x, 0 if B is None else B.stride(0))
    facts = (weight.format, decode.is_aligned(weight), M, R, distances, scale, bias is not None)

    def launch(config: dict) -> Tensor:
        splits, run = _plan(*facts, tuple(config.items()))
        y = x.new_empty(M, N) if splits == 1 else torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
        run(*decode.pointers(weight), x, y, None if bias is None else bias.contiguous(), s, B)
        return y if splits == 1 else sum_partials(y, x.dtype)

    candidates = configs.quant_gemv(configs.capability(x.device), M, aligned)
    return launch(autotune.pick("quant_gemv", (weight.format, x.dtype, power_of_2(M), R), candidates, launch, x.device))


@planned
def _plan(
    fmt: Format, aligned: bool, M: int, R: int, distances: tuple[int, ...], scale: float, has_bias: bool,
    config: tuple[tuple[str, int], ...],
) -> tuple[int, Plan]:  # fmt: skip
    """(splits of K, the launch). aligned: the weight. distances: of the rows of x and B."""
    tile = dict(config)
    columns = cdiv(fmt.N, tile["BLOCK_N"])
    splits, steps = configs.split("gemv", fmt.K, tile["BLOCK_K"], columns)
    return splits, Plan(
        _quant_gemv_kernel, (columns, splits), (scale, M, fmt.N, fmt.K, R, steps, *distances),
        **decode.tile_constants(fmt, aligned, tile["BLOCK_N"], tile["BLOCK_K"]),
        HAS_BIAS=has_bias, HAS_LORA=R > 0, enable_fp_fusion=False, **tile,
    )  # fmt: skip
