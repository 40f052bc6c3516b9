"""The gated MLP of a transformer block as one op: y = down(act(gate(x)) * up(x)), its layers with LoRA adapters.

The MLP keeps its identity, its children, its state-dict keys, and everything else that hangs on it. What changes is
the class of this one instance: to a subclass of its own class, LoraMLP in front, as torch.nn.utils.parametrize does it.
No class is patched; `restore_mlps` gives every instance its class back.

Which modules: those with children gate_proj, up_proj and down_proj, whose class's forward is one of FORWARDS, compared
by bytecode. That is proof where a name is a guess and a trial run has side effects: the same instructions on the same
names compute the same, be the class transformers', a subclass that inherits its forward, or somebody's own. A
look-alike that scales, clamps or drops out has other bytecode.

When: each call asks `plan`, and where one op cannot stand for the calls of the children, they are called as before.
"""

import functools
from types import FunctionType
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.dispatch import Choice
from peft_fast.tuners.base_weight import is_touched

from .members import Member, common_backend, common_dtype, is_lora, member, projections

Mode = Literal["fused", "recompute", "off"]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LOOKUPS = ("__call__", "__getattr__", "__getattribute__")  # a class with its own may mean anything by self.gate_proj(x)


def _llama(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504 (the bytecode of transformers' LlamaMLP.forward is what is wanted)


def _qwen2_vl(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _recurrent_gemma(self, x):
    gate = self.act_fn(self.gate_proj(x))
    return self.down_proj(gate * self.up_proj(x))


def _llama4(self, x):
    down_proj = self.activation_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(down_proj)


def _instructions(function: Any) -> tuple | None:
    """What decides what a function does: none of FORWARDS loads a constant or a global, so this is all of it."""
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    return (
        code.co_code,
        code.co_names,
        code.co_argcount,
        code.co_kwonlyargcount,
        code.co_flags & 0x0C,
    )  # *args, **kwargs


FORWARDS: dict[Any, str] = {  # instructions: the name of the activation
    _instructions(_llama): "act_fn",
    _instructions(_qwen2_vl): "act_fn",
    _instructions(_recurrent_gemma): "act_fn",
    _instructions(_llama4): "activation_fn",
}


def _activation_classes() -> dict[Any, str]:
    """{class: ops.lora_mlp's name}: transformers' own, by the names that a model's config gives them, and torch's."""
    from transformers.activations import ACT2CLS  # here: it takes a second to import

    ours = {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
    }
    found: dict[Any, str] = {nn.SiLU: "silu"}
    for theirs, name in ours.items():
        entry = ACT2CLS.get(theirs)
        if entry is not None:
            found[entry[0] if isinstance(entry, tuple) else entry] = name
    return found


ACTIVATION_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.gelu: "gelu"}


class OneOp(NamedTuple):
    """A call of the MLP as one op."""

    layers: tuple[Member, ...]  # gate, up, down
    activation: str
    dtype: torch.dtype  # of the products
    backend: str | None


class LoraMLP:
    """What the subclass of an MLP's class adds to it."""

    lora_mlp_mode: Mode = "fused"  # set_lora_mlp sets it on the instance
    original_class: type[nn.Module]
    known_forward: FunctionType
    activation_attribute: str
    activation_classes: dict[Any, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = plan(self, args[0]) if len(args) == 1 and not kwargs else "it is not called with one tensor"
        if isinstance(found, str):
            activation = gate_of_layers(self) if len(args) == 1 and not kwargs else None
            if activation is None:
                return super().forward(*args, **kwargs)  # type: ignore[misc]
            return layer_by_layer(self, args[0], activation)
        (x,) = args
        gate, up, down = projections(found.layers, x)
        recompute = self.lora_mlp_mode == "recompute"
        y = ops.lora_mlp(
            x, gate, up, down, found.activation, dtype=found.dtype, recompute=recompute, backend=found.backend
        )
        return y if y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: made again from the class that can be imported."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))  # (function, its arguments, the state, ...)
        return _new, (self.original_class,), *reduced[2:]


def _new(original: Any) -> nn.Module:
    cls = lora_mlp_class(original) or original
    return cls.__new__(cls)


@functools.cache
def lora_mlp_class(original: Any) -> Any:
    """The subclass of an MLP's class that runs as one op, or None where its forward is not known to be this MLP's."""
    if _instructions(original.forward) not in FORWARDS or any(hasattr(original, name) for name in PROJECTIONS):
        return None
    if any(getattr(original, name) is not getattr(nn.Module, name) for name in LOOKUPS):
        return None
    attributes = {
        "original_class": original,
        "known_forward": staticmethod(original.forward),
        "activation_attribute": FORWARDS[_instructions(original.forward)],
        "activation_classes": _activation_classes(),
        "__module__": __name__,
    }
    return type(f"Lora{original.__name__}", (LoraMLP, original), attributes)


def is_candidate(module: nn.Module) -> bool:
    """Whether a module looks like a gated MLP with at least one LoRA layer: `explain` has a row for it."""
    children = [module._modules.get(name) for name in PROJECTIONS]
    return all(child is not None for child in children) and any(is_lora(child) for child in children)


def fuse_mlps(model: nn.Module) -> None:
    """Have the MLPs of a model with LoRA layers run as one op wherever that is the same function."""
    for module in model.modules():
        if is_candidate(module) and not isinstance(module, LoraMLP):
            original: Any = type(module)
            _become(module, lora_mlp_class(original) or original)


def restore_mlps(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LoraMLP):
            vars(module).pop("lora_mlp_mode", None)
            _become(module, module.original_class)


def _become(module: Any, cls: type) -> None:
    module.__class__ = cls


def set_lora_mlp(model: nn.Module, mode: str) -> None:
    """How the gated MLPs of `model` run: all those that get_peft_model recognised (`explain` lists them).

    "fused"      as one op, the default: keeps its input and gate's and up's outputs (or those of their base layers)
    "recompute"  as one op that keeps the input alone and computes gate and up again in the backward
    "off"        layer by layer, as without peft_fast

    Raises ValueError for another mode, and where the model has no such MLP.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    found = [module for module in model.modules() if isinstance(module, LoraMLP)]
    if not found:
        raise ValueError("the model has no gated MLP with LoRA that can run as one op; explain(model) says why")
    for module in found:
        module.lora_mlp_mode = cast(Mode, mode)


def layer_by_layer(mlp: Any, x: Tensor, activation: str) -> Tensor:
    """The MLP where its layers must be called, with ops.glu between them: act(g) is not kept for the backward."""
    gate, up, down = (mlp._modules[name] for name in PROJECTIONS)
    g, u = gate(x), up(x)
    if type(g) is Tensor and type(u) is Tensor and g.shape == u.shape and g.dtype == u.dtype:
        return down(ops.glu(g, u, activation))
    return down(getattr(mlp, mlp.activation_attribute)(g) * u)


def gate_of_layers(mlp: Any) -> str | None:
    """The activation of an MLP whose layers are called one by one, where ops.glu is to stand between them: where there
    are adapters. Without, the model's own forward runs, to the bit."""
    layers: list[Any] = [mlp._modules[name] for name in PROJECTIONS]
    adapted = [layer for layer in layers if is_lora(layer)]
    if not any(layer.mixed_batch is not None or layer.adapters_in_effect() for layer in adapted):
        return None
    return None if _why_not_mlp(mlp) else _activation(mlp)


def plan(mlp: Any, x: Tensor | None) -> OneOp | str:
    """How to run x through the MLP as one op, or why not. Without x, in the dtype and on the device of the weights."""
    if reason := _why_not_mlp(mlp):
        return reason
    activation = _activation(mlp)
    if activation is None:
        return "its activation is none of silu, gelu (by erf) and gelu (by tanh), or has hooks or a forward of its own"
    layers = []
    for name in PROJECTIONS:
        layer = member(mlp._modules[name])
        if isinstance(layer, str):
            return f"{name} {layer}"
        layers.append(layer)
    if all(adapter is None for _, adapter, _ in layers):
        return "no adapter is in effect"
    backend, dtype = common_backend(layers), common_dtype(layers, x)
    if isinstance(backend, str):
        return backend
    return dtype if isinstance(dtype, str) else OneOp(tuple(layers), activation, dtype, *backend)


def _why_not_mlp(mlp: Any) -> str | None:
    if mlp.lora_mlp_mode == "off":
        return "switched off by set_lora_mlp"
    if "forward" in vars(mlp):
        return "its forward was replaced (by Liger, kernels, accelerate's offloading, ...)"
    if mlp.original_class.forward is not mlp.known_forward:
        return "its class's forward was replaced"
    if nn.modules.module._has_any_global_hook():
        return "there are hooks for all modules"
    return None


def _activation(mlp: Any) -> str | None:
    act = getattr(mlp, mlp.activation_attribute, None)
    if not isinstance(act, nn.Module):
        return ACTIVATION_FUNCTIONS.get(act)
    if is_touched(act):
        return None
    if type(act) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    return mlp.activation_classes.get(type(act))


def choice(module: nn.Module) -> Choice | None:
    """A row of `explain`: what the next forward of this MLP does, and why; None for other modules."""
    if not isinstance(module, LoraMLP):
        if not is_candidate(module):
            return None
        because = f"{type(module).__name__}.forward is not known to be down(act(gate(x)) * up(x))"
        return Choice("lora_mlp", "layers", because)
    found = plan(module, None)
    if isinstance(found, str):
        activation = gate_of_layers(module)
        return Choice(
            "lora_mlp", "layers", found if activation is None else f"{found}; {activation} and the product are one op"
        )
    kept = "x is kept" if module.lora_mlp_mode == "recompute" else "x, gate's and up's outputs are kept"
    return Choice("lora_mlp", "mlp", f"one op of its three layers and {found.activation}; {kept}")
