"""Models of published shapes without data, for peft_fast/memory.py to run on shapes alone: Llama-3-70B takes no memory
either. They are made on the meta device and adapted there, by HF PEFT or by peft_fast, as any model is.
"""

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

BLOCK, NESTED = 64, 256  # of QLoRA: weights that share a scale, scales that share one


def meta_model(config: PretrainedConfig, bits: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal language model on meta, in `dtype`, its linear layers but the head in NF4 with nested scales where bits
    is 4."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        for path, linear in list(model.named_modules()):
            if bits == 4 and isinstance(linear, nn.Linear) and path != "lm_head":
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, _four_bits(linear, dtype))
    if bits == 4:
        model.is_loaded_in_4bit = model.is_quantized = True
    model.config.use_cache = False
    return model.requires_grad_(False)


def _four_bits(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """As bitsandbytes leaves it after quantising; a plain parameter has the attributes of its Params4bit, as where FSDP
    has been at work."""
    N, K = linear.weight.shape
    layer: Any = bnb.nn.Linear4bit(K, N, linear.bias is not None, compute_dtype=dtype, quant_type="nf4")
    blocks = -(-N * K // BLOCK)
    inner = QuantState(
        absmax=torch.empty(-(-blocks // NESTED)), blocksize=NESTED, code=torch.empty(256), dtype=torch.float32
    )
    layer.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8), shape=torch.Size((N, K)), code=torch.empty(16), blocksize=BLOCK,
        quant_type="nf4", dtype=dtype, offset=torch.empty(()), state2=inner,
    )  # fmt: skip
    layer.weight = nn.Parameter(torch.empty(N * K // 2, 1, dtype=torch.uint8), requires_grad=False)
    _as_params4bit(layer)
    if linear.bias is not None:
        layer.bias = linear.bias
    return layer


def _as_params4bit(layer: Any) -> None:
    codes = layer.weight
    codes.quant_state, codes.compress_statistics, codes.quant_type = layer.quant_state, True, "nf4"
    codes.bnb_quantized, codes.blocksize, codes.quant_storage = True, BLOCK, torch.uint8


def without_data(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with FakeTensors of a CPU in place of all that it has, in place; tied weights stay tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in made:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    keep = [*model.parameters(), *model.buffers()]  # so that ids stay theirs
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                own[name] = fake(tensor)
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.quant_state
            for each in (state, state.state2):
                vars(each).update({name: fake(value) for name, value in vars(each).items()})
            _as_params4bit(module)
    del keep
    return model
