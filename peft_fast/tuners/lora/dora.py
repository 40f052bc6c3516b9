"""DoRA (arXiv 2402.09353): the merged weight's direction, and a magnitude of its own for every out feature.

    y = m / |W + scale * B A| * (W x + scale * B A dropout(x)) + bias

The norm is a constant to the gradients (section 4.3 of the paper). It is taken from |W|^2, which is kept, and from
W A^T: W + scale * B A is never made (ops/dora.py). Under dropout in training W x is dropped out too where the magnitude
changes it: y = W x + bias + (factor - 1) * W d + factor * scale * B A d with d = dropout(x), as in peft.
"""

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.tuners.base_weight import HALF_DTYPES

from . import initialisation
from .scales import folded


class DoraLayer(nn.Module):
    """The magnitudes of one adapter."""

    def __init__(self, magnitude: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude)

    def forward(self, norms: Tensor) -> Tensor:
        """m / norms, in the norms' dtype: [out features]. Called, so that FSDP can gather m for it.

        A 16-bit m is divided by norms that are rounded as it was, so that a new adapter multiplies by exactly 1.
        """
        m = self.weight.view(-1)
        return m.to(norms.dtype) / norms.to(m.dtype).to(norms.dtype)

    def __repr__(self) -> str:
        return f"lora.dora.{super().__repr__()}"


class DoraLinearLayer(DoraLayer):
    """[out_features]"""


class DoraEmbeddingLayer(DoraLayer):
    """[embedding_dim]"""


class DoraConv1dLayer(DoraLayer):
    """[1, out_channels, 1]"""


class DoraConv2dLayer(DoraLayer):
    """[1, out_channels, 1, 1]"""


class DoraConv3dLayer(DoraLayer):
    """[1, out_channels, 1, 1, 1]"""


class DoraCaching:
    """Within `with DoraCaching():` layers in eval mode keep the norms of DoRA between forwards, a number for every out
    feature: each saves reading its base weight once more. `DoraCaching()(enabled=True)` does so for good.

    Norms are computed anew when a layer was in training mode in between, when its scale changes, when its adapter has
    other tensors, and when torch counts an in-place change of its adapter or base weight; what is written through
    `.data` is not counted.
    """

    enabled_now = False

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before, DoraCaching.enabled_now = DoraCaching.enabled_now, self.enabled

    def __exit__(self, *exception: object) -> None:
        DoraCaching.enabled_now = self.before

    def __call__(self, enabled: bool = True) -> None:
        DoraCaching.enabled_now = enabled


def factor(layer: Any, name: str) -> Tensor:
    """m / |W + scale * B A| [out features], in fp32 or wider; differentiable in m."""
    norms = _norms_by_calling(layer, name) if layer.is_called(name) else _norms(layer, name)
    return layer.lora_magnitude_vector[name](norms.detach())  # no_grad does not make them constants in forward mode


@torch.no_grad()
def _norms_by_calling(layer: Any, name: str) -> Tensor:
    """The norms where A and B have to be called (called.py): what they make of each in feature alone is B A."""
    (A, B), weight = layer.factors(name), layer.rows_of_base()
    dense = weight if isinstance(weight, Tensor) else ops.dequantize(weight)
    wide = torch.promote_types(dense.dtype, torch.float32)
    each = torch.eye(dense.shape[1], device=dense.device, dtype=layer.factor_dtype(name))
    return torch.linalg.norm(dense.to(wide) + layer.scaling[name] * B(A(each)).t().to(wide), dim=1)


def _norms(layer: Any, name: str) -> Tensor:
    (A, B), weight = layer.dora_factors(name), layer.rows_of_base()
    scale = layer.scaling[name]
    _check_at_hand(weight, A)
    squares = layer.kept_squares()
    caching = DoraCaching.enabled_now and not layer.training and not torch.compiler.is_compiling()
    made_of = (squares, *layer.adapter_parameters(name)) if caching else ()  # the very tensors
    now = (A._version, B._version, float(scale)) if caching else None
    if caching and name in layer.kept_norms:
        tensors, key, norms = layer.kept_norms[name]
        if key == now and len(tensors) == len(made_of) and all(map(is_, tensors, made_of)):
            return norms
    norms = ops.merged_norms(weight, A, *folded(B, scale), squares, layer.backend)
    if caching:
        layer.kept_norms[name] = (made_of, now, norms)
    return norms


def _check_at_hand(weight: Tensor | QuantizedWeight, A: Tensor) -> None:
    if weight.device.type == "meta" and A.device.type != "meta":
        raise ValueError(
            "DoRA needs the base weight for its norms, and that is on the meta device: offloaded layers cannot have "
            "it. Leave them out of target_modules, or keep them on the device"
        )


def initial_magnitude(layer: Any, name: str) -> Tensor:
    """The norms as they are now, so that the adapter starts as LoRA does; in the base weight's dtype and place."""
    weight: Any = layer.rows_of_base()
    A, B = layer.dora_factors(name)
    if A.is_meta:
        return torch.empty(B.shape[0], device="meta", dtype=weight.dtype)
    _check_at_hand(weight, A)
    start = layer.starts.get(name)
    if start is not None and start.changes_base:  # the base weight has not been changed yet
        start.norms = torch.linalg.norm(start.merged(initialisation.rows_in_full(layer), layer.scaling[name]), dim=1)
        return start.norms.to(weight.dtype)
    home, accelerator = weight.device, torch.accelerator.current_accelerator(check_available=True)
    if layer.ephemeral_gpu_offload and home.type == "cpu" and accelerator is not None:
        weight, A, B = (part.to(accelerator) for part in (weight, A, B))
    if not bool(A.any()) or not bool(B.any()):
        dense = weight.detach() if isinstance(weight, Tensor) else ops.dequantize(weight)
        return torch.linalg.norm(dense, dim=1).to(home)
    return ops.merged_norms(weight, A, *folded(B, layer.scaling[name])).to(home, weight.dtype)


@torch.no_grad()
def unround(layer: Any, name: str) -> None:
    """Of a new adapter around a 16-bit layer whose magnitudes were made fp32: with the bits that the 16 could not hold.

    peft leaves them rounded, and rounds its norms; ours are fp32, and rows would start off by half an ulp.
    """
    m, weight = layer.lora_magnitude_vector[name].weight, layer.rows_of_base()
    if m.dtype == torch.float32 and weight.dtype in HALF_DTYPES and not m.is_meta:
        norms = layer.starts[name].norms if name in layer.starts else None
        if norms is None:
            A, B = layer.dora_factors(name)
            norms = ops.merged_norms(weight, A, *folded(B, layer.scaling[name]))
        m.copy_(norms.view(m.shape))


def forward(
    layer: Any, x: Tensor, names: list[str], weight: Tensor | QuantizedWeight | None, *args: Any, **kwargs: Any
) -> Tensor:
    """What a linear layer gives with these adapters, some with magnitudes; each takes what those before it gave.

    weight  to multiply by in place of calling the base layer, or None where it has to be called
    """
    y: Tensor | None = None  # until something needs W x + bias as it is
    bias = layer.bias
    for i, name in enumerate(names):
        if name not in layer.lora_magnitude_vector:
            y = layer.base(x, weight, *args, **kwargs) if y is None else y
            y = _plus(layer, y, x, name)
            continue
        scaled, called = factor(layer, name), layer.is_called(name)
        if not _drops(layer, name, called):
            if y is None and weight is not None and not called:
                z = layer.product(name, x, weight)
            else:
                y = layer.base(x, weight, *args, **kwargs) if y is None else y
                z = y if bias is None else y - bias
                z = _plus_of(layer, z, x.to(layer.factor_dtype(name)), name) if called else layer.plus(z, x, [name])
            y = ops.scale_columns(z, scaled, bias, backend=layer.backend)
            continue
        dropped = layer.dropped(name, x).to(x.dtype)
        if called:
            z = layer.base(dropped, weight, *args, **kwargs)
            z = _plus_of(layer, z if bias is None else z - bias, dropped, name)
        else:
            z = layer.product(name, dropped, weight, *args, **kwargs)
        if i == 0 and weight is not None:
            rest = layer.base(x - dropped, weight)  # W x - W d + bias in one product
        else:
            y = layer.base(x, weight, *args, **kwargs) if y is None else y
            rest = y - layer.base(dropped, weight, *args, **kwargs)
            rest = rest if bias is None else rest + bias
        y = rest + ops.scale_columns(z, scaled, backend=layer.backend)
    assert y is not None
    return y


def _drops(layer: Any, name: str, called: bool) -> bool:
    """Whether something is dropped now: as peft says it where the adapter's modules are called, whatever they are."""
    dropout = layer.lora_dropout[name]
    if called:
        return layer.training and not isinstance(dropout, nn.Identity)
    return isinstance(dropout, nn.Dropout) and dropout.training and bool(dropout.p)


def _plus(layer: Any, y: Any, x: Tensor, name: str) -> Tensor:
    """y plus what an adapter without magnitudes makes of x."""
    return _plus_of(layer, y, layer.dropped(name, x), name) if layer.is_called(name) else layer.plus(y, x, [name])


def _plus_of(layer: Any, y: Any, x: Tensor, name: str) -> Tensor:
    A, B = layer.factors(name)
    x = x.to(layer.factor_dtype(name)) if layer.cast_input_dtype_enabled else x
    return y + (B(A(x)) * layer.scaling[name]).to(y.dtype)
