"""The functional API: LoRA and k-bit linear algebra on tensors, differentiable, each with a route in Triton and one in
plain torch. Layers call these and never ask about devices.

    function        Triton                                    torch
    lora_linear     linear.py: cuBLAS + the two below         kernels/reference.py
    lora_down       kernels/lora_down.py                      kernels/reference.py
    lora_up_add     kernels/lora_up_add.py                    kernels/reference.py
    quant_matmul    kernels/dequantize.py + cuBLAS            quant/blockwise.py + torch's matmul
    dequantize      kernels/dequantize.py                     quant/blockwise.py
"""

from peft_fast.kernels.dropout import new_key as new_dropout_key

from .linear import lora_linear
from .lora import lora_down, lora_up_add
from .quant import dequantize, quant_matmul

__all__ = ["dequantize", "lora_down", "lora_linear", "lora_up_add", "new_dropout_key", "quant_matmul"]
