"""Launch configurations of all kernels: plain data by kernel, compute capability and class of shape. Nothing is tuned:
no kernel has run on a GPU yet, and every block says where its numbers come from."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .tiles import cdiv, power_of_2, rank_block

MANY = 1 << 62  # rows: above every class of M
_asked_for: int | None = None  # by `target`, whatever the device


def capability(device: torch.device) -> int:
    """The compute capability as a number, 89 for 8.9: `cc` below. No GPU (interpreter, recorded launches): 80."""
    if _asked_for is not None:
        return _asked_for
    return _capability(device) if device.type == "cuda" else 80


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextmanager
def target(asked_for: int) -> Iterator[None]:
    """Within, configurations are those of this capability: bench/compile.py records launches for GPUs that are not
    here."""
    global _asked_for
    before, _asked_for = _asked_for, asked_for
    try:
        yield
    finally:
        _asked_for = before


def _newest(table: dict[int, Any], cc: int) -> Any:
    """The entry of the highest capability that is not above this one."""
    return table[max(known for known in table if known <= cc)]


# A multiple of every quantisation block. Words a thread has in flight: 4, and 8 where there is more bandwidth to
# fill; 5.84 SASS instructions per weight with 4, 5.45 with 8 (sm_89, sm_90: bench/results/compile).
DEQUANTIZE = {75: dict(BLOCK=4096, num_warps=4), 90: dict(BLOCK=8192, num_warps=4)}


def dequantize(cc: int, numel: int) -> dict:
    """The longer program only where all are full: with masks on every element it spills (sm_120)."""
    config = _newest(DEQUANTIZE, cc)
    return DEQUANTIZE[75] if numel % config["BLOCK"] else config


def dequantize_int8(K: int) -> dict:
    """As many elements, and whole rows where they are short; eight a thread where each has an address of its own."""
    elements, warps = (2048, 8) if K % 16 else (4096, 4)
    block_k = min(max(power_of_2(K), 128), elements)
    return dict(BLOCK_N=elements // block_k, BLOCK_K=block_k, num_warps=warps)


# LoRA's two projections, by rank and bytes per element: the widest tiles that spill nothing on any target.


def lora_down_forward(R: int, itemsize: int, count: int = 1) -> dict:
    """`count` adapters share x. Two: 16 rows or three stages spill 8 to 24 bytes somewhere from sm_80 to sm_120."""
    block_r = rank_block(R, itemsize)
    if count == 2:
        return dict(BLOCK_M=32, BLOCK_K=64, BLOCK_R=min(block_r, 32), num_stages=2)
    if count > 2:
        return dict(BLOCK_M=32, BLOCK_K=32, BLOCK_R=min(block_r, 32))
    return dict(BLOCK_M=32, BLOCK_K=128 if itemsize == 2 and block_r == 16 else 64, BLOCK_R=block_r)


def lora_down_backward(
    cc: int,
    R: int,
    itemsize: int,
    count: int = 1,
    aligned: bool = True,
    needs_dx: bool = True,
    narrows: bool = False,
) -> dict:
    """Not aligned: x is loaded element by element (tiles.warps), and its addresses take registers. `narrows`: A is
    wider than x; several such spill with three stages (sm_86 to sm_100), tiles of rank 32 on sm_100 with two."""
    block_r = rank_block(R, itemsize)
    if count > 1:
        config = dict(BLOCK_M=16, BLOCK_K=64 if count == 2 else 32, BLOCK_R=min(block_r, 32))
        stages = 1 if block_r >= 32 and cc // 10 == 10 else 2
        return config | dict(num_stages=stages) if narrows else config
    if itemsize == 4 or block_r == 64:
        return dict(BLOCK_M=16, BLOCK_K=32, BLOCK_R=block_r)
    if block_r == 32 and not aligned:
        return dict(BLOCK_M=16, BLOCK_K=64, BLOCK_R=block_r)
    return dict(BLOCK_M=32, BLOCK_K=64, BLOCK_R=block_r, num_stages=3 if needs_dx else 2)  # dA alone: spills on sm_120


def lora_up_forward(R: int, itemsize: int) -> dict:
    block_m, block_n = (64, 128) if itemsize == 2 else (32, 64)
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=rank_block(R, itemsize))


def lora_up_glu(R: int) -> dict:
    """16 bits only. Two tiles of lora_up_forward at once, half as wide: with 4 warps they took 188 registers and one
    variant spilled (sm_120), with 8 it is 98."""
    return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_R=rank_block(R, 2), num_warps=8)


WIDEST_GATE = 64  # ranks that lora_glu_backward takes: all of a rank in one tile


def lora_glu_backward(R: int) -> dict:
    """16 bits only. dA's tile is to be wider than high: else Triton gives every warp all columns of the other products
    (its rule for chained ones), and they spill 24 to 650 bytes. Without maxnreg ptxas spills 8 to 16 bytes here and
    there to stay below 128 registers; 168 are three blocks of four warps on a multiprocessor."""
    block_r = rank_block(R, 2)
    if block_r == 64:
        return dict(BLOCK_M=16, BLOCK_F=128, BLOCK_R=block_r, num_warps=8, num_stages=2, maxnreg=255)
    most = 168 if block_r == 16 else 255
    return dict(BLOCK_M=16, BLOCK_F=64, BLOCK_R=block_r, num_warps=4, num_stages=3, maxnreg=most)


def lora_up_backward(R: int, itemsize: int, aligned: bool = True) -> dict:
    """BLOCK_N * BLOCK_R elements of dB are kept in registers."""
    block_r = rank_block(R, itemsize)
    if itemsize == 4:
        return dict(BLOCK_M=16, BLOCK_N=64, BLOCK_R=block_r, num_warps=8 if not aligned else 4)
    if not aligned:
        return dict(BLOCK_M=16, BLOCK_N=128, BLOCK_R=block_r, num_warps=8)
    return dict(BLOCK_M=32, BLOCK_N=8192 // block_r, BLOCK_R=block_r, num_warps=8, num_stages=2)


def lora_embedding(R: int, itemsize: int) -> dict:
    """Every element of A that is gathered has an address of its own: tiles of lora_up_forward's size spill (sm_80 to
    sm_120, ranks above 32)."""
    return dict(BLOCK_M=32, BLOCK_N=64, BLOCK_R=min(rank_block(R, itemsize), 32), num_stages=2)


def segment_sum(R: int) -> dict:
    """A warp a segment: most words come once or twice in a batch, and 16 ids at once serve those that come often."""
    block_r = min(max(16, power_of_2(R)), 64)
    return dict(BLOCK_M=16, BLOCK_R=block_r, num_warps=1, enable_fp_fusion=True)


# Many adapters in one batch. Of a decoding step each adapter has a row or two: 16, the least that tl.dot takes.


def lora_down_multi(length: int, R: int, itemsize: int, aligned: bool) -> dict:
    """`length`: the longest segment's."""
    block_r = rank_block(R, itemsize)
    block_c = 128 if itemsize == 2 and block_r == 16 and aligned else 64
    return dict(BLOCK_M=16 if length <= 16 else 32, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=4 if aligned else 8)


def lora_up_multi(length: int, R: int, itemsize: int, aligned: bool) -> dict:
    """With 64 rows a rank tile of 64 spills on every target."""
    block_m, block_c = (
        (16 if length <= 16 else 64 if itemsize == 2 and length > 32 else 32),
        128 if itemsize == 2 else 64,
    )
    block_r = min(rank_block(R, itemsize), 64 if block_m == 16 else 32)
    return dict(BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=4 if aligned else 8)


def lora_gram_multi(R: int, itemsize: int) -> dict:
    """Three stages spill on sm_100, with dropout and gradients in fp32; 32 rows of fp32 on four others, and of bf16 on
    sm_100 with a rank tile of 64 and gradients in fp32."""
    block_r = rank_block(R, itemsize)
    block_m = 32 if itemsize == 2 and block_r < 64 else 16
    return dict(BLOCK_M=block_m, BLOCK_C=64, BLOCK_R=block_r, num_warps=4, num_stages=2)


# Adding partials: a thread keeps four elements, 16 bytes per load, and DEPTH of them in flight.
SUM_PARTIALS = dict(BLOCK=512, num_warps=4, enable_fp_fusion=True)


def dequantize_merge(itemsize: int, aligned: bool) -> dict:
    """None of these spills. Eight warps hold 64 to 102 registers a thread in 16 bits (sm_89, make compile), so that 16
    to 24 warps fit an SM; four hold twice as many weights and registers each. Ranks come in tiles of 16, whatever the
    rank: wider ones take registers from the weights. One stage: for most ranks the loop has one step or two."""
    if not aligned:
        return dict(BLOCK_N=32, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=1)
    if itemsize == 4:
        return dict(BLOCK_N=64, BLOCK_K=64, BLOCK_R=16, num_warps=4, num_stages=1)
    return dict(BLOCK_N=64, BLOCK_K=128, BLOCK_R=16, num_warps=8, num_stages=1)


# Products with a k-bit weight. The default comes first, what PEFT_FAST_AUTOTUNE=1 would try against it after.
#
# GEMM, by the largest M: none spills on any target, compile matrix. A decoded weight serves BLOCK_M rows, so BLOCK_M
# covers M up to 128. 64 columns (rows for dx) of W leave 124 to 201 registers a thread and two or three programs on an
# SM, which hide each other's decoding; tiles 128 wide spilled in dx when tried. Prior for the tiles of M: bitsandbytes'
# kernel for sm_80 takes 32, 64 and 128 too.


def _gemm(BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, num_warps: int) -> dict:
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=16, num_warps=num_warps)


GEMM_16_BIT = (
    (16, (_gemm(16, 64, 128, 4), _gemm(16, 64, 64, 4))),
    (32, (_gemm(32, 64, 128, 4), _gemm(32, 64, 64, 4))),
    (64, (_gemm(64, 64, 64, 4), _gemm(32, 64, 128, 4))),
    (MANY, (_gemm(128, 64, 64, 8), _gemm(64, 64, 64, 4))),
)
GEMM_32_BIT = (
    (16, (_gemm(16, 32, 64, 4),)),
    (MANY, (_gemm(32, 32, 32, 4),)),
)
# Buffers of the pipeline: as many as fit twice into the shared memory of an SM (163 and 227 KB against 99). With three
# the largest tiles spill on sm_89, in dx with dropout.
GEMM_STAGES = {80: 4, 86: 3, 90: 4, 120: 3}
GEMM_STAGES_89 = 2


def quant_matmul(cc: int, M: int, itemsize: int, aligned: bool) -> list[dict]:
    """The same for the forward and for dx, whose sum runs along BLOCK_N. Not aligned: rows of the activations do not
    start at multiples of 16, or the weight lies at an odd address; what is loaded element by element needs eight warps
    for its addresses (tiles.warps)."""
    candidates = next(c for most, c in (GEMM_16_BIT if itemsize == 2 else GEMM_32_BIT) if most >= M)
    stages = _newest(GEMM_STAGES, cc)
    if candidates[0]["BLOCK_M"] == 128 and cc == 89:
        stages = GEMM_STAGES_89
    if not aligned:
        block_m, block_k = min(candidates[0]["BLOCK_M"], 64), min(candidates[0]["BLOCK_K"], 64)
        warps = 4 if block_m == 32 and itemsize == 2 else 8  # 32 rows spill with 8 (sm_86, sm_89), in fp32 with 4
        return [dict(candidates[0], BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=2)]
    return [dict(config, num_stages=stages) for config in candidates]


# GEMV: the threads of a program lie along K, so that each reads its piece of x once for BLOCK_N rows of W and has as
# many loads in flight; with more rows of x there are registers for fewer rows of W (128 at M = 8). BLOCK_N by BLOCK_M;
# 8 rows spill on sm_100, and 4 with int8.
GEMV = {
    75: {1: (8, 4), 2: (4, 8), 4: (4, 2), 8: (4, 2)},
    100: {1: (4,), 2: (4, 2), 4: (2, 1), 8: (4, 2)},
    120: {1: (8, 4), 2: (4, 8), 4: (4, 2), 8: (4, 2)},
}


def quant_gemv(cc: int, M: int, aligned: bool) -> list[dict]:
    """Not aligned: rows of x do not start at multiples of 16, and their addresses take the registers of half of W's, of
    more with 4 rows."""
    block_m = power_of_2(M)
    known = _newest(GEMV, cc)[block_m]
    rows = known if aligned else (1 if block_m == 4 else known[0] // 2,)
    return [dict(BLOCK_M=block_m, BLOCK_N=n, BLOCK_K=1024, BLOCK_R=16, num_warps=4) for n in rows]


# How many programs a split sum aims at: about two per SM of the largest cards we know, and for GEMV four, whose
# programs have 4 KB of W in flight each (1 TB/s times 1 us is 1 MB). Not device dependent, so that the order of the
# sums, and with it every bit of the result, is the same on all of them.
PROGRAMS = {"gemm": 256, "gemv": 512, "lora_down": 32, "lora_down_multi": 256, "lora_backward": 256}


def split(kind: str, length: int, block: int, tiles: int) -> tuple[int, int]:
    """(splits, steps per split) of a sum over `length` in steps of `block`, for each of `tiles` tiles of the output.
    No split gets less than two steps: a partial result costs 4 bytes written and read again. No tiles: a rank of 0."""
    steps = cdiv(length, block)
    splits = min(max(1, steps // 2), cdiv(PROGRAMS[kind], max(1, tiles)))
    per_split = max(1, cdiv(steps, splits))
    return max(1, cdiv(steps, per_split)), per_split


def split_rows(M: int, block: int, columns: int) -> tuple[int, int]:
    """(splits, rows per split) of a sum over M rows in steps of `block`, for each of `columns` tiles of the output."""
    steps = cdiv(M, block)
    rows = cdiv(steps, min(steps, cdiv(PROGRAMS["lora_backward"], columns))) * block
    return cdiv(M, rows), rows


def split_lora_down(M: int, K: int, block: int, tiles: int) -> tuple[int, int]:
    """As `split`, for lora_down's K. Only where few programs would each walk through all of K one after another: up to
    128 tokens. With more the second stage costs a launch and gains little."""
    return split("lora_down", K, block, tiles) if M <= 128 else (1, max(1, cdiv(K, block)))
