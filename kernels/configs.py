"""Launch configurations of all kernels: plain data by kernel, compute capability and class of shape. Nothing is tuned:
no kernel has run on a GPU yet, and every block says where its numbers come from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton

from .tiles import rank_block

_asked_for: int | None = None  # by `target`, whatever the device


def capability(device: torch.device) -> int:
    """The compute capability as a number, 89 for 8.9. Without a GPU (interpreter, recorded launches): 80."""
    if _asked_for is not None:
        return _asked_for
    if device.type != "cuda":
        return 80
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


def _newest(table: dict[int, dict], device: torch.device) -> dict:
    """The entry of the highest capability that is not above the device's."""
    own = capability(device)
    return table[max(known for known in table if known <= own)]


# A multiple of every quantisation block. Words a thread has in flight: 4, and 8 where there is more bandwidth to
# fill; 5.8 SASS instructions per weight with 4, 5.4 with 8 (sm_89, sm_90).
DEQUANTIZE = {75: dict(BLOCK=4096, num_warps=4), 90: dict(BLOCK=8192, num_warps=4)}


def dequantize(device: torch.device) -> dict:
    return _newest(DEQUANTIZE, device)


def dequantize_int8(K: int) -> dict:
    """As many elements, and whole rows where they are short."""
    block_k = min(max(triton.next_power_of_2(K), 128), 4096)
    return dict(BLOCK_N=4096 // block_k, BLOCK_K=block_k, num_warps=4)


# LoRA's two projections, by rank and bytes per element: the widest tiles that spill nothing on any target.


def lora_down_forward(R: int, itemsize: int) -> dict:
    block_r = rank_block(R, itemsize)
    return dict(BLOCK_M=32, BLOCK_K=128 if itemsize == 2 and block_r == 16 else 64, BLOCK_R=block_r)


def lora_down_backward(R: int, itemsize: int) -> dict:
    block_r = rank_block(R, itemsize)
    if itemsize == 4 or block_r == 64:
        return dict(BLOCK_M=16, BLOCK_K=32, BLOCK_R=block_r)
    return dict(BLOCK_M=32, BLOCK_K=64, BLOCK_R=block_r)


def lora_up_forward(R: int, itemsize: int) -> dict:
    return dict(BLOCK_M=64, BLOCK_N=128 if itemsize == 2 else 64, BLOCK_R=rank_block(R, itemsize))


def lora_up_backward(R: int, itemsize: int) -> dict:
    block_r = rank_block(R, itemsize)
    if itemsize == 4:
        return dict(BLOCK_M=32, BLOCK_N=32, BLOCK_R=block_r)
    return dict(BLOCK_M=128 if block_r == 16 else 64, BLOCK_N=32 if block_r == 32 else 64, BLOCK_R=block_r)


# Adding partials: a thread keeps four elements, 16 bytes per load, and DEPTH of them in flight.
SUM_PARTIALS = dict(BLOCK=512, num_warps=4)


def dequantize_merge(itemsize: int, aligned: bool) -> dict:
    """None of these spills. Eight warps hold 80 registers a thread and 24 warps fit an SM of sm_89, four hold 145 to 219
    and 8 to 12 fit. Ranks in tiles of 16, whatever the rank: wider ones take registers from the weights, and no more
    than half of the tiles' depth is ever padding. One stage: for most ranks the loop has one step or two."""
    if not aligned:
        return dict(BLOCK_N=32, BLOCK_K=64, BLOCK_R=16, num_warps=8, num_stages=1)
    if itemsize == 4:
        return dict(BLOCK_N=64, BLOCK_K=64, BLOCK_R=16, num_warps=4, num_stages=1)
    return dict(BLOCK_N=64, BLOCK_K=128, BLOCK_R=16, num_warps=8, num_stages=1)


def quant_matmul(device: torch.device, M: int, itemsize: int) -> dict:
    return dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, BLOCK_R=16, num_warps=4, num_stages=3)


def quant_matmul_dx(device: torch.device, M: int, itemsize: int) -> dict:
    return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, BLOCK_R=16, num_warps=4, num_stages=3)


PROGRAMS = 256


def split(length: int, block: int, tiles: int) -> tuple[int, int]:
    steps = triton.cdiv(length, block)
    per_split = triton.cdiv(steps, min(max(1, steps // 2), triton.cdiv(PROGRAMS, tiles)))
    return triton.cdiv(steps, per_split), per_split


def quant_gemv(M: int) -> dict:
    return dict(BLOCK_M=triton.next_power_of_2(M), BLOCK_N=8, BLOCK_K=1024, BLOCK_R=16, num_warps=4)
