"""The base model, the same weights for every library: from a directory, or of a published shape with random weights.

Of a shape: made layer by layer on the device and quantised there, so that nothing is downloaded, and no more than one
layer is ever held in 16 bits.
"""

import zlib
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from .options import Options

LLAMA_3 = dict(
    vocab_size=128256, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)  # fmt: skip


def config_of(shape: str) -> PretrainedConfig:
    """As published in the models' config.json; "small": for CPUs."""
    if shape == "small":
        return LlamaConfig(
            vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, head_dim=64,
        )  # fmt: skip
    if shape == "llama-3-8b":
        return LlamaConfig(
            **LLAMA_3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
        )
    if shape == "llama-3.2-1b":
        return LlamaConfig(
            **{**LLAMA_3, "head_dim": 64}, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, tie_word_embeddings=True,
        )  # fmt: skip
    return Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )  # fmt: skip


def load(options: Options, device: torch.device) -> Any:
    """A causal language model on `device`, in options.bits bits, the same one in every process."""
    if options.model in ("small", "llama-3.2-1b", "qwen3-4b", "llama-3-8b"):
        return _of_shape(config_of(options.model), options, device)
    quantization = {}
    if options.bits == 4:
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, device_map={"": device}, local_files_only=True, **quantization
    )


def _of_shape(config: PretrainedConfig, options: Options, device: torch.device) -> Any:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head" and options.bits == 4:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _four_bits(module, path, options.seed, device))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            value = _drawn(parameter.shape, f"{path}.{name}", options.seed, device)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        if "rotary" in path:  # its buffers are computed when it is made
            parent, _, name = path.rpartition(".")
            with torch.device(device):
                setattr(model.get_submodule(parent), name, type(module)(config))
    model.tie_weights()
    if options.bits == 4:
        model.is_loaded_in_4bit = model.is_quantized = True
    return model


def _drawn(shape: torch.Size, path: str, seed: int, device: torch.device) -> torch.Tensor:
    """bf16; of a norm ones, of all else normal with the 0.02 that Llama starts with, by the path and the seed."""
    if len(shape) < 2:
        return (torch.zeros if path.endswith("bias") else torch.ones)(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{path}".encode()))
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02, generator=generator)


def _four_bits(linear: nn.Linear, path: str, seed: int, device: torch.device) -> nn.Module:
    """NF4 with nested scales, as QLoRA has them."""
    N, K = linear.weight.shape
    layer: Any = bnb.nn.Linear4bit(
        K, N, bias=linear.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    weight = _drawn(linear.weight.shape, f"{path}.weight", seed, device)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    ).to(device)
    if linear.bias is not None:
        layer.bias = nn.Parameter(_drawn(linear.bias.shape, f"{path}.bias", seed, device), requires_grad=False)
    return layer
