"""A mixture's experts with adapters on their parameters, all experts at once: ops.lora_experts.

    rows, sorted by expert -> gate_up_proj -> gate -> down_proj -> times the router's weight -> back in order, summed

It takes the place of the forward that transformers 5 has for its experts (integrations/moe.py, "grouped_mm"), whose
contract is that of the class: parameters [experts, out, in] or transposed, biases, a gate of its own. peft adds B A of
every expert to its weight in each forward, and multiplies the gradient of the whole weight back: here nothing of the
weight's size is made (bench/bench_experts.py). What this does not cover keeps the sum: see `why_not`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peft_fast import ops
from peft_fast.kernels.segments import Groups
from peft_fast.ops import ExpertAdapter
from peft_fast.ops.library import autocast
from peft_fast.quant import bitsandbytes
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.sharded import is_plain
from peft_fast.tuners.base_weight import is_touched
from peft_fast.tuners.offload import only_brings

from .called import why_called
from .scales import folded

ASKED = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts", "_is_expert_parallel")
GROUPED = ("grouped_mm", "batched_mm")  # in config._experts_implementation: what this is another form of
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")  # of the forward in transformers


def why_not(experts: Any, wrappers: dict[str, Any]) -> str | None:
    """Why the sum of parameter and adapters must be made, or None where `forward` can be called. `wrappers`: those in
    effect around `experts`, by parameter."""
    if not all(hasattr(experts, name) for name in ASKED):
        return "its module is none of transformers' experts"
    asked_for = getattr(experts.config, "_experts_implementation", None)
    if asked_for not in GROUPED:
        return f"the model's experts_implementation is {asked_for!r}, not one of {', '.join(GROUPED)}"
    if experts._is_expert_parallel:
        return "its experts are spread over several GPUs"
    if is_touched(experts) and not (only_brings(experts) or bitsandbytes.is_hooked_for_4bit_parameters(experts)):
        return "the module of its experts has hooks or a forward of its own"
    for name in _projections(experts):
        if bitsandbytes.read_4bit_parameter(experts, name) is not None:
            continue
        if parametrize.is_parametrized(experts, name):
            return f"{name} is computed from other parameters"
        weight = getattr(experts, name)
        if not is_plain(weight) or not weight.is_floating_point():
            return f"{name} is a {type(weight).__name__} of {weight.dtype}"
    for name, wrapper in wrappers.items():
        if name not in _projections(experts):
            return f"{name} is no projection of its experts"
        why = "it has hooks" if is_touched(wrapper) else why_called(wrapper, wrapper.adapters_in_effect())
        if why:
            return why
    return None


def _projections(experts: Any) -> tuple[str, ...]:
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def _weight(experts: nn.Module, name: str) -> Tensor | QuantizedWeight:
    quantized = bitsandbytes.read_4bit_parameter(experts, name)
    return getattr(experts, name) if quantized is None else quantized


def bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """(hidden_states [tokens, H], top_k_index, top_k_weights) of a call, None for any other call."""
    given = dict(zip(ARGUMENTS, args)) | kwargs
    if len(args) + len(kwargs) != len(ARGUMENTS) or given.keys() != set(ARGUMENTS):
        return None
    x, index, weights = (given[name] for name in ARGUMENTS)
    if not all(isinstance(t, Tensor) for t in (x, index, weights)) or x.dim() != 2 or index.dim() != 2:
        return None
    return x, index, weights


def forward(experts: Any, wrappers: dict[str, Any], x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[tokens, H] in x's dtype, for x [tokens, H] and, for each token, k experts with their weights."""
    k = top_k_index.shape[1]
    numbers, order = top_k_index.flatten().sort(stable=True)
    backend = next(iter(wrappers.values())).backend
    groups = ops.group_rows(numbers, experts.num_experts, backend)
    first, last = _projections(experts)
    h = _product(experts, wrappers, first, _Sorted.apply(x, order, k), numbers, groups, backend)
    h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    y = _product(experts, wrappers, last, h, numbers, groups, backend)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    y = y * top_k_weights.flatten()[order, None]
    return _InOrder.apply(y, order).view(-1, k, y.shape[1]).sum(1).to(x.dtype)


def _product(
    experts: Any,
    wrappers: dict[str, Any],
    name: str,
    x: Tensor,
    numbers: Tensor,
    groups: Groups,
    backend: str | None,
) -> Tensor:
    weight, adapters = _weight(experts, name), []
    if name in wrappers:
        wrapper = wrappers[name]
        for adapter in wrapper.adapters_in_effect():
            A, B = (factor.weight for factor in wrapper.factors(adapter))
            B, scale = folded(B, wrapper.scaling[adapter])
            adapters.append(ExpertAdapter(A, B, scale))
    x = autocast(x) if isinstance(weight, QuantizedWeight) else x.to(weight.dtype)
    y = ops.lora_experts(x, weight, groups, adapters, is_transposed=experts.is_transposed, backend=backend)
    return y + getattr(experts, f"{name}_bias")[numbers] if experts.has_bias else y


class _Sorted(torch.autograd.Function):
    """Rows [tokens * k, H] of x [tokens, H] in sorted order. The gradient adds up a token's k rows in fixed order, with
    no atomics and without sorting, which indexing does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        return _InOrder.apply(dy, order).view(-1, ctx.k, dy.shape[1]).sum(1), None, None


class _InOrder(torch.autograd.Function):
    """Sorted rows back in order: out[order] = y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return torch.empty_like(y).index_copy_(0, order, y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        return _Sorted.apply(dy, order, 1), None
