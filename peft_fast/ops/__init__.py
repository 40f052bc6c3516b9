"""The functional API: LoRA and k-bit linear algebra on tensors, differentiable, each with a route in Triton and one in
plain torch. Layers call these and never ask about devices.

    function        its autograd     what it runs
    lora_linear     linear.py        one of the routes of routes.py, picked by table.py
    lora_group      group.py         the same for layers that share x: their adapters read it once
    lora_linear_multi   multi.py    for a batch whose rows belong to different adapters: kernels/lora_multi.py
    lora_experts    experts.py       for the experts of a mixture, rows sorted by expert: kernels/lora_experts.py
    lora_mlp        mlp.py           three of these and the gate between: kernels/lora_glu.py, glu.py
    glu             glu.py           the middle of a gated MLP alone: kernels/glu.py or reference.py
    quant_matmul    quant.py         the same without an adapter
    dequantize      quant.py         kernels/dequantize.py, quant/blockwise.py or bitsandbytes
    lora_down       lora.py          kernels/lora_down.py or reference.py
    lora_up_add     lora.py          kernels/lora_up_add.py or reference.py
    scale_columns, merged_norms, row_squares   dora.py   kernels/scale_columns.py, reference_dora.py
    rms_norm        norm.py          torch's own rms_norm, twice
    lora_embedding, lora_embedding_add   embedding.py   kernels/lora_embedding.py, reference_embedding.py
"""

from peft_fast.kernels.dropout import new_key as new_dropout_key
from peft_fast.kernels.dropout import new_key_table as new_dropout_key_table
from peft_fast.kernels.dropout import new_keys as new_dropout_keys

from .dora import merged_norms, row_squares, scale_columns
from .embedding import choose_embedding, lora_embedding, lora_embedding_add
from .experts import ExpertAdapter, choose_experts, group_rows, lora_experts
from .glu import glu
from .group import lora_group
from .linear import lora_linear
from .lora import lora_down, lora_up_add
from .mlp import lora_mlp
from .multi import Adapters, choose_multi, lora_linear_multi, segments_of_rows, segments_of_samples
from .norm import rms_norm
from .projection import Projection
from .quant import dequantize, quant_matmul
from .table import Call, choose, choose_product

__all__ = [
    "Adapters",
    "Call",
    "ExpertAdapter",
    "Projection",
    "choose",
    "choose_embedding",
    "choose_experts",
    "choose_multi",
    "choose_product",
    "dequantize",
    "glu",
    "group_rows",
    "lora_down",
    "lora_embedding",
    "lora_embedding_add",
    "lora_experts",
    "lora_group",
    "lora_linear",
    "lora_linear_multi",
    "lora_mlp",
    "lora_up_add",
    "merged_norms",
    "new_dropout_key",
    "new_dropout_key_table",
    "new_dropout_keys",
    "quant_matmul",
    "rms_norm",
    "row_squares",
    "scale_columns",
    "segments_of_rows",
    "segments_of_samples",
]
