"""k-bit linear layers without bitsandbytes: quantize_linear_layers(model) and the layer it puts in place.

The bytes, and the names in the state dict, are those of bitsandbytes' Linear4bit and Linear8bitLt.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import ops
from .quant import blockwise, int8
from .quant.state import from_state, state_keys, to_state
from .quant.weight import INT8, QuantizedWeight
from .sharded import is_sharded


class QuantizedLinear(nn.Module):
    """y = x @ W.T + bias with a frozen W in 4 or 8 bits: a `nn.Linear` whose weight cannot be trained.

    `weight` is a parameter that holds the codes: uint8 [ceil(N * K / 2), 1], two in a byte, or int8 [N, K]. The scales
    are neither parameters nor buffers: `model.half()` must not touch them. They follow the weight to its device.
    x stays in floating point: it is multiplied by the dequantised weight, in training and in eval mode alike.
    """

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._take(weight)
        self.bias = bias

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
    ) -> "QuantizedLinear":
        """The quantised twin of `linear`; shares its bias.

        `quant_type`: "nf4", "fp4", or "int8", which has one scale a row: the other two arguments then mean nothing.
        """
        if quant_type == INT8:
            weight = int8.quantize(linear.weight)
        else:
            weight = blockwise.quantize(linear.weight, quant_type, blocksize, double_quant)
        return cls(weight, linear.bias).train(linear.training)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        if self._lost or (self._scales[0].is_meta and not self.weight.is_meta):
            raise ValueError(
                "the scales of a 4- or 8-bit layer went to the meta device and have not come back: load the model's "
                "state dict after to_empty(), and leave cpu_ram_efficient_loading off for FSDP, which sends weights "
                "alone to the other processes"
            )
        return QuantizedWeight.from_tensors([self.weight.data.view(-1), *self._scales], self._format)

    def set_quantized_weight(self, weight: QuantizedWeight) -> None:
        """Put another weight of the same shape in place of this one. Its tensors are taken, not copied."""
        shape = (self.out_features, self.in_features)
        if weight.shape != shape:
            raise ValueError(f"the layer's weight is {shape}, got {weight.shape}")
        self._take(weight)

    _lost = False  # its scales: see quantized_weight

    def _take(self, weight: QuantizedWeight) -> None:
        rows = weight.shape if weight.bits == 8 else (-1, 1)
        self.weight = nn.Parameter(weight.data.view(rows), requires_grad=False)
        self._format, self._scales, self._lost = weight.format, weight.tensors()[1:], False

    def forward(self, x: Tensor) -> Tensor:
        return ops.quant_matmul(x, self.quantized_weight, self.bias)

    def extra_repr(self) -> str:
        fmt = self._format
        blocks = "rows" if fmt.bits == 8 else f"blocks of {fmt.blocksize}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{fmt.quant_type} in {blocks}{', nested scales' if fmt.nested_blocksize else ''}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        super()._apply(fn, recurse)
        device = self.weight.device
        self._lost = self._lost or (not self.weight.is_meta and any(t.is_meta for t in self._scales))
        self._scales = [
            torch.empty_like(t, device=device) if t.is_meta else t.to(device)  # off meta: to_empty was called
            for t in self._scales
        ]
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_sharded(self.weight):  # torch's distributed checkpoints want parameters and buffers alone, and scales are
            return  # on every process: bitsandbytes' layers leave them out, too
        for name, tensor in to_state(self.quantized_weight).items():
            if name != "weight":
                destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if is_sharded(self.weight):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        keys = state_keys(state_dict, prefix)
        try:
            weight = from_state(state_dict, prefix, int8_dtype=self._format.dtype)
            if self.weight.is_meta and not assign:
                error_msgs.append(f"{prefix}weight is on the meta device: load with assign=True")
            else:
                self.set_quantized_weight(weight if assign else weight.to(self.weight.device, copy=True))
        except KeyError as missing:
            missing_keys.append(str(missing.args[0]))
        except ValueError as wrong:
            error_msgs.append(f"{prefix}weight: {wrong}")
        rest = {k: v for k, v in state_dict.items() if k not in keys}
        rest[prefix + "weight"] = self.weight  # dealt with above
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip


def quantize_linear_layers(
    model: nn.Module,
    bits: int = 4,
    *,
    quant_type: str | None = None,
    blocksize: int | None = None,
    double_quant: bool | None = None,
    skip_modules: list[str] | None = None,
) -> nn.Module:
    """Replace the `nn.Linear` layers of `model`, in place, by k-bit ones; return the model.

    bits          4 (QLoRA, arXiv 2305.14314) or 8 (the weights of LLM.int8, arXiv 2208.07339: one scale a row)
    skip_modules  names, or last parts of names, to leave alone. By default the output embedding (`lm_head`), and what
                  the model's class wants in fp32 (T5's `wo`, whose dtype its code reads)

    Only for 4 bits:
    quant_type    "nf4" (the default) or "fp4"
    blocksize     weights that share a scale: 32 to 4096, by default 64
    double_quant  quantise the scales too, as by default: 0.516 bytes a weight instead of 0.5625 for blocks of 64

    Layers are replaced one by one: a second copy of the model never exists. Call it before get_peft_model. Raises
    ValueError before anything is replaced where an argument is out of range, a name or no layer at all matches, the
    model has adapters, or a weight holds inf or NaN.
    """
    quant_type, blocksize, double_quant = _checked_format(bits, quant_type, blocksize, double_quant)
    layers = _layers_to_quantize(model, skip_modules)
    for name, linear in layers.items():
        if problem := _why_not(linear.weight, bits):
            raise ValueError(f"{name}.weight holds {problem}, which {bits} bits cannot store: check the checkpoint")
    twins: dict[nn.Linear, QuantizedLinear] = {}  # of layers that stand in the model under several names
    shared = Counter(layers.values())
    for name in tqdm(list(layers), desc=f"quantising to {quant_type}", unit="layer", disable=None, leave=False):
        parent, _, child = name.rpartition(".")
        linear = layers.pop(name)  # popped: the dense weight is freed as soon as its layer is replaced
        twin = twins.get(linear) or QuantizedLinear.from_linear(linear, quant_type, blocksize, double_quant)
        if shared.pop(linear, 1) > 1:
            twins[linear] = twin
        setattr(model.get_submodule(parent), child, twin)
    return model


def _checked_format(
    bits: int, quant_type: str | None, blocksize: int | None, double_quant: bool | None
) -> tuple[str, int, bool]:
    """The arguments of QuantizedLinear.from_linear, the defaults filled in."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")
    if bits == 4:
        checked = ("nf4" if quant_type is None else quant_type, 64 if blocksize is None else blocksize)
        blockwise.check_arguments(*checked)
        return *checked, double_quant is not False
    given = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        raise ValueError(f"8 bits come in one format, one scale a row; leave out {given}, which are of 4 bits")
    return INT8, 64, False


def _why_not(weight: Tensor, bits: int) -> str | None:
    """What a weight holds that codes of so many bits cannot stand for, or None."""
    if not bool(weight.isfinite().all()):
        return "inf or NaN"
    if bits == 8 and not bool(weight.half().isfinite().all()):
        return "values beyond fp16's 65504"
    return None


def _layers_to_quantize(model: nn.Module, skip_modules: list[str] | None) -> dict[str, nn.Linear]:
    """The linear layers by name, shared ones under each of their names."""
    if isinstance(model, nn.Linear):
        raise ValueError("model is itself a layer: use QuantizedLinear.from_linear(layer)")
    if any(hasattr(module, "adapter_layer_names") for module in model.modules()):
        raise ValueError("the model has adapters already: quantise it first, then call get_peft_model")
    if isinstance(skip_modules, str):
        raise TypeError(f"skip_modules must be a list of names, got the string {skip_modules!r}")
    skipped = skip_modules
    if skipped is None:
        skipped = [_output_embedding_name(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    modules = dict(model.named_modules(remove_duplicate=False))
    skip = {n: {name for name in modules if name == n or name.endswith("." + n)} for n in skipped}
    unmatched = [name for name, found in skip.items() if not found]
    if unmatched and skip_modules is not None:
        raise ValueError(f"skip_modules {unmatched} name no module of {type(model).__name__}")
    left_alone = set().union(*skip.values())
    layers = {name: m for name, m in modules.items() if type(m) is nn.Linear and name not in left_alone}
    if not layers:
        raise ValueError(f"no nn.Linear to quantise in {type(model).__name__} besides {skipped}")
    return layers


def _output_embedding_name(model: Any) -> str:
    """The name of the output embedding: transformers says which it is; elsewhere it is called lm_head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), "lm_head") if head else "lm_head"
