"""Products with a k-bit weight that is decoded tile by tile, inside the GEMM, and never written to memory.

    y[M, N]  = x[M, K] @ W[N, K].T + bias[N] + scale * s[M, R] @ B[N, R].T       quant_matmul
    dx[M, K] = dy[M, N] @ W[N, K] + c * mask * (ds[M, R] @ A[R, K])              quant_matmul_dx     c = 1 / (1 - p)

W is decoded exactly and rounded to x's dtype before the product: the weights are those that dequantize writes. A and B
may be fp32 under a 16-bit x. fp32 accumulation, one rounding on store; LoRA is added to the accumulator. Where tiles
are fewer than the programs that a GPU wants, the sum is split, and its parts are added by a second stage in fixed
order. With M of at most 8 there is too little to multiply for a tile of tl.dot: quant_gemv.py. The same in plain torch:
reference.py.

A decoded weight costs about five instructions for each tile of M that uses it, so this pays while M is a few tiles:
whoever routes decides up to which M (dequantise once and leave the rest to cuBLAS above).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.quant.weight import Format, QuantizedWeight

from . import autotune, configs, decode, dropout, quant_gemv, tiles
from .launch import Plan, planned
from .reduce import sum_partials
from .tiles import cdiv, dropout_mask, input_precision, layout, power_of_2, rows


@triton.jit(do_not_specialize=["M", "steps_per_split"])
def _quant_matmul_kernel(
    data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    x_ptr, y_ptr, bias_ptr, s_ptr, b_ptr,
    scale, M, N, K, R, steps_per_split,
    stride_x_m, stride_b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    G: tl.constexpr, NESTED_G: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LORA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of y, steps_per_split tiles of K, to y_ptr[split, M, N]; the first split adds bias and LoRA.
    Tiles of M are neighbours in the grid, so that all but the first find W in L2."""
    split = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    n0 = tl.program_id(1) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_LORA:
        for r0 in range(0, tl.where(split == 0, R, 0), BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
            s = tl.load(s_ptr + m.to(tl.int64) * R + r, mask=(m < M) & (r < R), other=0.0)
            b = tl.load(b_ptr + n[:, None].to(tl.int64) * stride_b_n + r, mask=(n[:, None] < N) & (r < R), other=0.0)
            acc = tl.dot(s, tl.trans(b.to(s.dtype)), acc, input_precision=PRECISION)
        acc *= tl.cast(scale, tl.float32)
    x_row = x_ptr + m.to(tl.int64) * stride_x_m
    start = split * steps_per_split * BLOCK_K
    for k0 in range(start, tl.minimum(start + steps_per_split * BLOCK_K, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
        x = tl.load(x_row + k, mask=m < M if EVEN else (m < M) & (k < K), other=0.0)
        w = decode.tile(
            data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
            n0, k0, N, K, BLOCK_N, BLOCK_K, G, NESTED_G, UNIT, ALIGNED, EVEN,
        )  # fmt: skip
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=(n < N) & (split == 0), other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + (split.to(tl.int64) * M + m) * N + n[None, :], acc, mask=(m < M) & (n[None, :] < N))


@triton.jit(do_not_specialize=["M", "steps_per_split"])
def _quant_matmul_dx_kernel(
    data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
    dy_ptr, dx_ptr, ds_ptr, a_ptr, key_ptr,
    M, N, K, R, steps_per_split, threshold, c,
    stride_dy_m, stride_a_r,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    G: tl.constexpr, NESTED_G: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    HAS_LORA: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dx, steps_per_split tiles of N, to dx_ptr[split, M, K]. The first split starts from LoRA's
    part, masked in the accumulator, on which W's part then adds up."""
    split = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if HAS_LORA:
        for r0 in range(0, tl.where(split == 0, R, 0), BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            ds = tl.load(ds_ptr + m.to(tl.int64) * R + r[None, :], mask=(m < M) & (r[None, :] < R), other=0.0)
            a = tl.load(a_ptr + r[:, None].to(tl.int64) * stride_a_r + k, mask=(r[:, None] < R) & (k < K), other=0.0)
            acc = tl.dot(ds, a.to(ds.dtype), acc, input_precision=PRECISION)
        if DROPOUT:
            pairs = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            keep = dropout_mask(key_ptr, m.to(tl.int64), pairs, (K + 1) // 2, threshold)
            acc = tl.where(keep, acc * tl.cast(c, tl.float32), 0.0)
    dy_row = dy_ptr + m.to(tl.int64) * stride_dy_m
    start = split * steps_per_split * BLOCK_N
    for n0 in range(start, tl.minimum(start + steps_per_split * BLOCK_N, N), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
        dy = tl.load(dy_row + n, mask=m < M if EVEN else (m < M) & (n < N), other=0.0)
        w = decode.tile(
            data_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
            n0, k0, N, K, BLOCK_N, BLOCK_K, G, NESTED_G, UNIT, ALIGNED, EVEN,
        )  # fmt: skip
        acc = tl.dot(dy, w.to(dy.dtype), acc, input_precision=PRECISION)
    tl.store(dx_ptr + (split.to(tl.int64) * M + m) * K + k, acc, mask=(m < M) & (k < K))


def quant_matmul(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    s: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """y [M, N] in x's dtype; s [M, R] and B [N, R] for LoRA's part."""
    x, N = rows(x), weight.shape[0]
    M = x.shape[0]
    assert M == 0 or why_not(weight.format, x.dtype, configs.capability(x.device), M) is None
    if M <= quant_gemv.MAX_M:
        return quant_gemv.quant_gemv(x, weight, bias, s, B, scale)
    s, B = (None, None) if s is None or B is None else (s.contiguous(), rows(B))
    R = 0 if B is None else B.shape[1]
    if M * N == 0:
        return x.new_empty(M, N)

    distances = (x.stride(0), 0 if B is None else B.stride(0))
    whole_words, cc = decode.is_aligned(weight), configs.capability(x.device)
    facts = (weight.format, whole_words, M, R, distances, scale, bias is not None, B is not None, input_precision())

    def launch(config: dict) -> Tensor:
        splits, run = _plan(*facts, tuple(config.items()))
        y = x.new_empty(M, N) if splits == 1 else torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
        run(*decode.pointers(weight), x, y, None if bias is None else bias.contiguous(), s, B)
        return y if splits == 1 else sum_partials(y, x.dtype)

    candidates = configs.quant_matmul(cc, M, x.element_size(), _aligned(x, N, whole_words))
    tuned_for = (weight.format, x.dtype, power_of_2(M), R)
    return launch(autotune.pick("quant_matmul", tuned_for, candidates, launch, x.device))


@planned
def _plan(
    fmt: Format, whole_words: bool, M: int, R: int, distances: tuple[int, int], scale: float, has_bias: bool,
    has_lora: bool, precision: str, config: tuple[tuple[str, int], ...],
) -> tuple[int, Plan]:  # fmt: skip
    """(splits of K, the launch). distances: of the rows of x and B."""
    tile = dict(config)
    grid = cdiv(M, tile["BLOCK_M"]), cdiv(fmt.N, tile["BLOCK_N"])
    splits, steps = configs.split("gemm", fmt.K, tile["BLOCK_K"], grid[0] * grid[1])
    return splits, Plan(
        _quant_matmul_kernel, (*grid, splits), (scale, M, fmt.N, fmt.K, R, steps, *distances),
        **decode.tile_constants(fmt, whole_words, tile["BLOCK_N"], tile["BLOCK_K"]),
        HAS_BIAS=has_bias, HAS_LORA=has_lora, PRECISION=precision, enable_fp_fusion=False, **tile,
    )  # fmt: skip


def quant_matmul_dx(
    dy: Tensor,
    weight: QuantizedWeight,
    ds: Tensor | None = None,
    A: Tensor | None = None,
    p: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """dx [M, K] in dy's dtype; ds [M, R] and A [R, K] for LoRA's part, `key` int32 [2] where p > 0."""
    dy, K = rows(dy), weight.shape[1]
    M = dy.shape[0]
    assert M == 0 or why_not_dx(weight.format, dy.dtype, configs.capability(dy.device)) is None
    ds, A = (None, None) if ds is None or A is None else (ds.contiguous(), rows(A))
    R = 0 if A is None else A.shape[0]
    if M * K == 0:
        return dy.new_empty(M, K)

    distances = (dy.stride(0), 0 if A is None else A.stride(0))
    whole_words, cc = decode.is_aligned(weight), configs.capability(dy.device)
    facts = (weight.format, whole_words, M, R, distances, p, A is not None, input_precision())

    def launch(config: dict) -> Tensor:
        splits, run = _dx_plan(*facts, tuple(config.items()))
        dx = dy.new_empty(M, K) if splits == 1 else torch.empty(splits, M, K, dtype=torch.float32, device=dy.device)
        run(*decode.pointers(weight), dy, dx, ds, A, key)
        return dx if splits == 1 else sum_partials(dx, dy.dtype)

    candidates = configs.quant_matmul(cc, M, dy.element_size(), _aligned(dy, K, whole_words))
    tuned_for = (weight.format, dy.dtype, power_of_2(M), R, p > 0)
    return launch(autotune.pick("quant_matmul_dx", tuned_for, candidates, launch, dy.device))


@planned
def _dx_plan(
    fmt: Format, whole_words: bool, M: int, R: int, distances: tuple[int, int], p: float, has_lora: bool,
    precision: str, config: tuple[tuple[str, int], ...],
) -> tuple[int, Plan]:  # fmt: skip
    """(splits of N, the launch). distances: of the rows of dy and A."""
    tile = dict(config)
    grid = cdiv(M, tile["BLOCK_M"]), cdiv(fmt.K, tile["BLOCK_K"])
    splits, steps = configs.split("gemm", fmt.N, tile["BLOCK_N"], grid[0] * grid[1])
    return splits, Plan(
        _quant_matmul_dx_kernel, (*grid, splits),
        (M, fmt.N, fmt.K, R, steps, dropout.threshold(p), dropout.correction(p), *distances),
        **decode.tile_constants(fmt, whole_words, tile["BLOCK_N"], tile["BLOCK_K"]),
        HAS_LORA=has_lora, DROPOUT=p > 0, PRECISION=precision, enable_fp_fusion=False, **tile,
    )  # fmt: skip


def _aligned(x: Tensor, columns: int, whole_words: bool) -> bool:
    """Whether activations and weight are loaded several elements at a time. `columns`: of the output."""
    return layout(x)[1] and columns % 16 == 0 and whole_words


def why_not(fmt: Format, dtype: torch.dtype, capability: int, M: int) -> str | None:
    """The reason quant_matmul cannot take x [M, K] of this dtype, or None where it can. Rank, N, strides are free."""
    if M <= quant_gemv.MAX_M:
        return tiles.why_not("x", dtype) or _why_not_weight(fmt)
    return why_not_dx(fmt, dtype, capability)


def why_not_dx(fmt: Format, dtype: torch.dtype, capability: int) -> str | None:
    """The reason quant_matmul_dx, or quant_matmul with more rows than a GEMV, cannot run, or None where they can."""
    if capability < 80:
        return f"Triton multiplies tiles on tensor cores from sm_80 on, this is sm_{capability}"
    return tiles.why_not("x", dtype) or _why_not_weight(fmt)


def _why_not_weight(fmt: Format) -> str | None:
    # Eight weights are decoded at a time, out of one word of 32 bits (64 for int8).
    if fmt.K % 8:
        return f"K is {fmt.K}, no multiple of 8: rows of the weight would begin within a word"
    return decode.why_not(fmt)
