"""Reading bitsandbytes' layers: with bitsandbytes_kernels.py the only files of the library that name it.

bitsandbytes is never imported here: a model that holds one of its layers has imported it already. What is returned
are views of the layer's own tensors. The layouts are weight.py's; the traps are (versions 0.49 to 0.50):

Linear4bit
* `quant_storage`: the same bytes may lie in a bf16, fp16 or fp32 tensor (FSDP wants floats).
* FSDP and others turn `Params4bit` into a plain `Parameter`, and the state is then only at the module.
* On CPUs with avx512_bf16 the layer's own forward repacks its weight in eval mode (other nibble order, transposed
  scales rounded to bf16), and gradients through it are lost from then on. `stop_repacking` prevents that.

Linear8bitLt
* The row scales SCB belong to `weight` until the first forward, which moves them to `module.state`. The codes, `CB`
  there and here, are the memory of `weight` itself, or a second copy of it: pickling a layer leaves it two.
* With `has_fp16_weights` the weight stays a float matrix that is quantised anew in every forward: not k-bit.
* The dtype that the weight had before is not kept. It was rounded to fp16 on the way, so fp16 it is.
"""

import math
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .weight import INT8, NestedScales, QuantizedWeight

REPACKS = "support_avx512bf16_for_cpu"  # the attribute that a Linear4bit's forward asks before it repacks


def _layer_type(name: str) -> type | None:
    bnb = sys.modules.get("bitsandbytes")
    return getattr(bnb.nn, name) if bnb else None


def is_linear4bit(module: nn.Module) -> bool:
    kind = _layer_type("Linear4bit")
    return kind is not None and isinstance(module, kind)


def is_linear8bit(module: nn.Module) -> bool:
    """Also true of one with `has_fp16_weights`, which is not k-bit."""
    kind = _layer_type("Linear8bitLt")
    return kind is not None and isinstance(module, kind)


def is_kbit(module: Any) -> bool:
    """Whether this is a layer of bitsandbytes whose weight is kept in 4 or 8 bits, or will be once it is quantised."""
    return is_linear4bit(module) or (is_linear8bit(module) and not module.state.has_fp16_weights)


def read_linear(module: nn.Module) -> QuantizedWeight | None:
    """The weight of a `Linear4bit` or `Linear8bitLt` without a copy, or None for any other module and for a
    Linear8bitLt with `has_fp16_weights`.

    Raises ValueError while the layer is not quantised yet (bitsandbytes quantises when it is moved to a device).
    """
    if is_linear4bit(module):
        return _read_4bit(module)
    return _read_8bit(module) if is_kbit(module) else None


def read_parameter(weight: nn.Parameter, state: Any = None) -> QuantizedWeight:
    """The weight that a Params4bit is, or an Int8Params with the `state` of its layer: without a copy."""
    layer: Any = SimpleNamespace(weight=weight, state=state)
    return _read_8bit(layer) if type(weight).__name__ == "Int8Params" else _read_4bit(layer)


def write_linear(module: nn.Module, weight: QuantizedWeight) -> None:
    """Put `weight` into a layer in place of the one it holds; same shape, block size, type and nesting.

    ValueError for any other. What a layer with `has_fp16_weights` holds is no QuantizedWeight: write to its matrix.
    """
    here = read_linear(module)
    if here is None or here.format != weight.format:
        raise ValueError(f"the layer holds {here.format if here else None}, got {weight.format}: they must be equal")
    if weight.quant_type == INT8:
        for codes in _of_weight_and_state(module, "CB"):
            codes.copy_(weight.data.view(codes.shape))
        for scales in _of_weight_and_state(module, "SCB"):
            scales.copy_(weight.absmax)
        _stored(module).copy_(weight.data.view(weight.shape))
        return
    state = _quant_state(module)
    _as_bytes(_stored(module)).copy_(weight.data)
    state.absmax.copy_(weight.absmax)
    if weight.nested:
        state.state2.absmax.copy_(weight.nested.absmax)
        state.offset.copy_(weight.nested.offset)


def forget_codes(module: Any) -> None:
    """To be called after writing to the matrix of a Linear8bitLt with `has_fp16_weights`: in eval mode it goes on with
    the codes of its last forward. Any other module is left alone."""
    if is_linear8bit(module) and module.state.has_fp16_weights:
        module.state.reset_grads()


def _stored(module: nn.Module) -> Tensor:
    """The stored bytes, in whatever dtype bitsandbytes keeps them."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data


_CAST = (
    "the codes of a {} x {} weight in 4 bits must be {} bytes, got {}, as {}: they were cast, which FSDP's mixed "
    "precision does to codes that are stored as floats of another dtype. Give bnb_4bit_quant_storage and "
    "MixedPrecisionPolicy's param_dtype the same dtype"
)
_NOT_QUANTISED = (
    "a {} layer is not quantised yet: bitsandbytes quantises when the layer is moved to a device, "
    'so call model.to("cuda") (or "cpu") first'
)


def _read_8bit(module: Any) -> QuantizedWeight:
    codes = _stored(module)
    scales = next(_of_weight_and_state(module, "SCB"), None)
    if codes.dtype != torch.int8 or scales is None:
        raise ValueError(_NOT_QUANTISED.format("Linear8bitLt"))
    N, K = codes.shape
    if scales.device != codes.device:  # moving a module moves its parameters; the scales are none
        scales = scales.to(codes.device)
    return QuantizedWeight(codes.view(-1), scales, None, (N, K), K, INT8, torch.float16)


def _of_weight_and_state(module: Any, name: str) -> Iterator[Tensor]:
    """CB or SCB wherever a Linear8bitLt has it: at its weight, at its state, or at both."""
    for owner in (module.weight, module.state):
        tensor = getattr(owner, name, None)
        if tensor is not None:
            yield tensor


def _read_4bit(module: nn.Module) -> QuantizedWeight:
    state = _quant_state(module)
    if is_repacked(module):
        _unpack_for_cpu(module, state)
    return _of_state(_stored(module), state)


def _of_state(stored: Tensor, state: Any) -> QuantizedWeight:
    """[N, K]; of a parameter [E, N, K] the E matrices below each other, [E * N, K]: the bytes are the same."""
    nested = None
    if state.nested:
        inner = state.state2
        nested = NestedScales(inner.absmax, inner.code, state.offset, inner.blocksize)
    *rows, K = state.shape
    N, data = math.prod(rows), _as_bytes(stored)
    if data.numel() != (N * K + 1) // 2:
        raise ValueError(_CAST.format(N, K, (N * K + 1) // 2, data.numel(), stored.dtype))
    return QuantizedWeight(
        data, state.absmax, state.code, (N, K), state.blocksize, state.quant_type, state.dtype, nested
    )


def _parametrization(module: nn.Module, name: str) -> Any:
    """What bitsandbytes.nn.parametrize.replace_parameter_4bit has put before a parameter, or None."""
    ours = sys.modules.get("bitsandbytes.nn.parametrize")
    if ours is None or not parametrize.is_parametrized(module, name):
        return None
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    return chain if len(chain) == 1 and isinstance(chain[0], ours.Bnb4bitParametrization) else None


def read_4bit_parameter(module: nn.Module, name: str) -> QuantizedWeight | None:
    """A parameter that replace_parameter_4bit has quantised, without a copy: [N, K], or [E * N, K] where it is
    [E, N, K]. None for any other."""
    chain = _parametrization(module, name)
    return None if chain is None else _of_state(chain.original.data, chain[0].quant_state)


def is_hooked_for_4bit_parameters(module: nn.Module) -> bool:
    """Whether all of a module's hooks are those of replace_parameter_4bit, which keep a dequantised parameter for the
    time of a forward."""
    if "forward" in vars(module) or module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return all(getattr(hook, "__module__", None) == "bitsandbytes.nn.parametrize" for hook in hooks)


def _find_quant_state(module: nn.Module) -> Any:
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _quant_state(module: nn.Module) -> Any:
    state = _find_quant_state(module)
    if state is None:
        raise ValueError(_NOT_QUANTISED.format("Linear4bit"))
    return state


def _as_bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8).view(-1)


def is_repacked(module: nn.Module) -> bool:
    """Whether a Linear4bit's forward has rewritten its weight into the form of its CPU kernel."""
    return bool(getattr(_find_quant_state(module), "packing_format_for_cpu", False))


def stop_repacking(module: nn.Module) -> bool:
    """Have a Linear4bit never repack its weight; one that is repacked is unpacked. Whether there was a change to undo.

    The switch is the layer's own attribute: no class is patched, and `allow_repacking` undoes it. The price is
    bitsandbytes' CPU kernel for inference: its default one, which takes over, is slower, and exact.
    """
    if not is_linear4bit(module):
        return False
    if is_repacked(module):
        _unpack_for_cpu(module, _quant_state(module))
    if not getattr(module, REPACKS, False):
        return False
    setattr(module, REPACKS, False)
    return True


def allow_repacking(module: nn.Module) -> None:
    setattr(module, REPACKS, True)


def _unpack_for_cpu(module: nn.Module, state: Any) -> None:
    """Undo bitsandbytes' CPU packing in the module itself, with plain scales.

    Packed: rows n in groups of 32; a byte holds rows i (low nibble) and i + 16 (high), runs of 32 bytes = 64 nibbles
    cover two columns of a group; scales lie transposed, [K / G, N], in bf16. The nibbles come back exactly. The
    scales keep the bf16 rounding that the packing gave them: a relative error of up to 2**-9.
    """
    warnings.warn(
        "bitsandbytes repacked this model's 4-bit weights when it was run in eval mode on the CPU, which rounds their "
        "scales to bf16; peft_fast goes on with the rounded ones. Add the adapter before the first evaluation, or "
        "reload the model, to have the exact ones.",
        stacklevel=2,
    )
    N, K = state.shape
    packed = _stored(module).view(torch.uint8).view(-1, 32)
    nibbles = torch.cat([packed & 0xF, packed >> 4], dim=1).view(N // 32, K // 2, 32, 2)
    flat = nibbles.transpose(1, 2).reshape(-1)
    data = (flat[0::2] << 4) | flat[1::2]
    storage = getattr(state, "original_storage_type", None) or torch.uint8
    module.weight.data = data.view(storage).view(-1, 1)  # type: ignore[union-attr]
    state.absmax = state.absmax.t().float().reshape(-1).contiguous()
    state.dtype = state.original_dtype
    state.packing_format_for_cpu = False
