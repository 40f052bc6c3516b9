"""The functions of reference.py, in Triton: same names, same arguments, same results up to rounding."""

from .dequantize import dequantize
from .dequantize_merge import dequantize_merge
from .glu import glu, glu_backward_
from .lora_down import lora_down, lora_down_backward, lora_down_group, lora_down_group_backward
from .lora_glu import lora_glu_backward_, lora_up_glu
from .lora_up_add import lora_up_add_, lora_up_add_group_, lora_up_backward, lora_up_group_backward
from .quant_matmul import quant_matmul, quant_matmul_dx

__all__ = [
    "dequantize",
    "dequantize_merge",
    "glu",
    "glu_backward_",
    "lora_down",
    "lora_down_backward",
    "lora_down_group",
    "lora_down_group_backward",
    "lora_glu_backward_",
    "lora_up_add_",
    "lora_up_add_group_",
    "lora_up_backward",
    "lora_up_glu",
    "lora_up_group_backward",
    "quant_matmul",
    "quant_matmul_dx",
]
