"""Names of peft.utils.loftq_utils."""

from torch import Tensor

from peft_fast import ops
from peft_fast.tuners.lora.initialisation.loftq import loftq
from peft_fast.tuners.lora.initialisation.replace_loftq import replace_lora_weights_loftq


def loftq_init(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """What LoftQ makes of a weight [N, K]: (the weight as `num_bits` hold it, in floating point and in its dtype;
    A [R, K]; B [N, R], in fp32). Where the weight is: no GPU is needed.

    Raises ValueError for another number of bits than 4 and 8, and for no iterations.
    """
    if num_bits not in (4, 8):
        raise ValueError(f"num_bits must be 4 (NF4) or 8, got {num_bits!r}")
    if num_iter <= 0:
        raise ValueError(f"num_iter must be 1 or more, got {num_iter!r}")
    start = loftq(weight.detach().float(), reduced_rank, 1, {"loftq_bits": num_bits, "loftq_iter": num_iter})
    assert start.replaced is not None
    return ops.dequantize(start.replaced, weight.dtype), start.A, start.B


__all__ = ["loftq_init", "replace_lora_weights_loftq"]
