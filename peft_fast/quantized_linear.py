"""4-bit linear layers without bitsandbytes: quantize_linear_layers(model) and the layer it puts in place.

The bytes, and the names in the state dict, are those of bitsandbytes.nn.Linear4bit.
"""

from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from . import ops
from .quant import blockwise
from .quant.state import from_state, state_keys, to_state
from .quant.weight import QuantizedWeight


class QuantizedLinear(nn.Module):
    """y = x @ W.T + bias with a frozen W in 4 bits: a `nn.Linear` whose weight cannot be trained.

    `weight` is a uint8 parameter [ceil(N * K / 2), 1] that holds the packed codes. The scales are neither parameters
    nor buffers: `model.half()` must not touch them. They follow the weight to its device.
    """

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.data.view(-1, 1), requires_grad=False)
        self.bias = bias
        self._state = weight

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
    ) -> "QuantizedLinear":
        """The quantised twin of `linear`; shares its bias."""
        weight = blockwise.quantize(linear.weight, quant_type, blocksize, double_quant)
        return cls(weight, linear.bias).train(linear.training)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        state = self._state
        return QuantizedWeight(
            self.weight.data.view(-1),
            state.absmax,
            state.code,
            state.shape,
            state.blocksize,
            state.quant_type,
            state.dtype,
            state.nested,
        )

    def set_quantized_weight(self, weight: QuantizedWeight) -> None:
        """Put another weight of the same shape in place of this one."""
        if weight.shape != self._state.shape:
            raise ValueError(f"the layer's weight is {self._state.shape}, got {weight.shape}")
        self.weight.data, self._state = weight.data.view(-1, 1), weight

    def forward(self, x: Tensor) -> Tensor:
        return ops.quant_matmul(x, self.quantized_weight, self.bias)

    def extra_repr(self) -> str:
        state = self._state
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{state.quant_type} in blocks of {state.blocksize}{', nested scales' if state.nested else ''}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        super()._apply(fn, recurse)
        if self._state.absmax.device != self.weight.device:
            self._state = self._state.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in to_state(self.quantized_weight).items():
            if name != "weight":
                destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        keys = state_keys(state_dict, prefix)
        try:
            self.set_quantized_weight(from_state(state_dict, prefix).to(self.weight.device))
        except KeyError as missing:
            missing_keys.append(str(missing.args[0]))
        except ValueError as wrong:
            error_msgs.append(f"{prefix}weight: {wrong}")
        rest = {k: v for k, v in state_dict.items() if k not in keys}
        rest[prefix + "weight"] = self.weight.data
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip


def quantize_linear_layers(
    model: nn.Module,
    bits: int = 4,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    skip_modules: list[str] | None = None,
) -> nn.Module:
    """Replace the `nn.Linear` layers of `model`, in place, by 4-bit ones (QLoRA, arXiv 2305.14314); return the model.

    bits          4; 8-bit weights come from bitsandbytes
    quant_type    "nf4" or "fp4"
    blocksize     weights that share a scale: 32 to 4096
    double_quant  quantise the scales too: 0.516 bytes a weight instead of 0.5625 for blocks of 64
    skip_modules  names, or last parts of names, to leave alone; by default the output embedding (`lm_head`)

    Layers are replaced one by one: a second copy of the model never exists. Raises ValueError before anything is
    replaced where an argument is out of range or no layer matches, and for a weight that holds inf or NaN.
    """
    if bits != 4:
        raise ValueError(f"bits must be 4, got {bits}: for 8 bits load the model with transformers' BitsAndBytesConfig")
    skipped = [_output_embedding_name(model)] if skip_modules is None else skip_modules
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(name == s or name.endswith("." + s) for s in skipped if s)
    }
    if not layers:
        raise ValueError(f"no nn.Linear to quantise in {type(model).__name__} besides {skipped}")
    blockwise.check_arguments(quant_type, blocksize)
    for name, linear in layers.items():
        if not bool(linear.weight.isfinite().all()):
            raise ValueError(f"{name}.weight holds inf or NaN, which 4 bits cannot store: check the checkpoint")
    for name in tqdm(list(layers), desc=f"quantising to {quant_type}", unit="layer", disable=None, leave=False):
        parent, _, child = name.rpartition(".")
        # Popped: the dense weight is freed as soon as its layer is replaced.
        quantized = QuantizedLinear.from_linear(layers.pop(name), quant_type, blocksize, double_quant)
        setattr(model.get_submodule(parent), child, quantized)
    return model


def _output_embedding_name(model: Any) -> str:
    """The name of the output embedding: transformers says which it is; elsewhere it is called lm_head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), "lm_head") if head else "lm_head"
