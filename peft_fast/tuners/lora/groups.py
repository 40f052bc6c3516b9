"""Layers that share their input, such as q, k and v of an attention, as one op (ops.lora_group): x is read once by all
their adapters, forward and backward, and dx is one buffer.

Which layers: the source of the parent's forward says so. Children that it calls once each with one and the same
variable, which nothing assigns to in between, in the same branch, share their input. What the source cannot promise is
checked at every call.

How: the parent stays as it is and calls its children. A pre-hook on it opens an `_Open` on each of these layers, a hook
that is always called closes it again. The first layer that is called computes for all and leaves the others' outputs
there; each takes its own, once, if nothing has changed since: x the same object and not written to, the same grad mode
and autocast, the same adapters, weights and dropout (a cache keyed on x's address gave wrong answers in 193 of 200
trials, where x was freed and its memory used again). Otherwise it computes alone, and the group is off from then on.

Under torch.inference_mode tensors do not say whether they were written to. There the source has to: between the calls
nothing may look like a write, and x may go nowhere else (`unwritten`); else the layers are called one by one.

The group stands down, layers running one by one, while torch.compile traces (what a hook keeps would be a side effect
of the graph), in replicas of DataParallel, and for layers that must be called (members.py).
"""

import ast
import functools
import inspect
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.dispatch import Choice, current_backend, current_route

from .layer import Linear, LoraLayer
from .members import JOINING, Member, common_backend, common_dtype, member, projections
from .mlp import LoraMLP

Names = tuple[str, ...]
MOST = 3  # layers that an op takes


class _Calls(ast.NodeVisitor):
    """In a method's source: which children it calls with which value of which variable, in which branch."""

    def __init__(self, method: ast.FunctionDef) -> None:
        self.calls: dict[tuple, list[str]] = defaultdict(list)  # {(variable, its assignment, branch): children}
        self.assigned: dict[str, int] = defaultdict(int)  # how often so far
        self.events: list[tuple] = []  # in order: calls of children, as keys of `calls` and names, and None for doubts
        self.branch: tuple = ()
        self.own_name = method.args.args[0].arg
        for statement in method.body:
            self.visit(statement)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        match node:
            case ast.Call(ast.Attribute(ast.Name(own), child), [ast.Name(variable)], []) if own == self.own_name:
                key = variable, self.assigned[variable], self.branch
                self.calls[key].append(child)
                self.events.append((key, child))
            case _ if _may_write(node.func) or any(keyword.arg in ("out", "inplace") for keyword in node.keywords):
                self.events.append((None, None))
            case _:
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                self.events += [(None, value.id) for value in given if isinstance(value, ast.Name)]

    def visit_Name(self, node: ast.Name) -> None:
        self.assigned[node.id] += not isinstance(node.ctx, ast.Load)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            self.events.append((None, None))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit_Assign(node)
        self.events.append((None, None))

    def visit_Assign(self, node: Any) -> None:
        if node.value is not None:
            self.visit(node.value)  # before what it is assigned to
        for target in getattr(node, "targets", None) or [node.target]:
            self.visit(target)

    def visit_If(self, node: Any) -> None:
        outside = self.branch
        for name, value in ast.iter_fields(node):
            self.branch = (*outside, node, name)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)
        self.branch = outside

    def visit_Lambda(self, node: ast.AST) -> None:
        """What is called in a function of its own is called at another time."""

    visit_AnnAssign = visit_NamedExpr = visit_Assign
    visit_IfExp = visit_For = visit_While = visit_Try = visit_If
    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_Lambda


def _may_write(function: ast.expr) -> bool:
    """By the name: mul_, F.relu_"""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name.endswith("_") and not name.endswith("__")


@functools.lru_cache(maxsize=1024)
def _calls(forward: Callable) -> _Calls | None:
    """None where the source of a forward cannot be had."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # no file; not a Python function; part of a line, as a lambda is
        return None
    method = tree.body[0]
    return _Calls(method) if isinstance(method, ast.FunctionDef) and method.args.args else None


def shared_inputs(forward: Callable) -> tuple[Names, ...]:
    """The groups of children that a forward calls with the same input; none where its source cannot be had."""
    found = _calls(forward)
    calls = [] if found is None else list(found.calls.values())
    every = [child for group in calls for child in group]
    once = [tuple(child for child in group if every.count(child) == 1) for group in calls]
    return tuple(group for group in once if len(group) > 1)


def unwritten(forward: Callable, names: Names, harmless: Callable[[str], bool]) -> bool:
    """Whether the source shows nothing between the calls of these children that may write to their input: no in-place
    operation on anything, which might share its memory, and nobody else who gets it but children that are `harmless`.
    """
    found = _calls(forward)
    if found is None:
        return False
    places = [i for i, (key, child) in enumerate(found.events) if key is not None and child in names]
    key = found.events[places[0]][0]
    between = found.events[places[0] : places[-1] + 1]
    strangers = [who for other, who in between if other is None]
    others = [child for other, child in between if other is not None and other[0] == key[0] and child not in names]
    return not any(who in (None, key[0]) for who in strangers) and all(map(harmless, others))


class Siblings:
    """The groups of one parent, kept in its `lora_siblings`: their layers by name."""

    def __init__(self, parent: nn.Module, groups: tuple[Names, ...], unwritten: tuple[bool, ...]) -> None:
        self.groups, self.unwritten = groups, unwritten  # the latter: of each group, see the function
        self.off: str | None = None  # why
        self.hooks = (
            parent.register_forward_pre_hook(_open),
            parent.register_forward_hook(_close, always_call=True),
        )

    def layers(self, parent: nn.Module) -> list[list[Any]]:
        """Of each group, those children that are LoRA layers now."""
        return [
            [layer for name in names if type(layer := parent._modules.get(name)) in JOINING] for names in self.groups
        ]


def _open(parent: Any, args: Any) -> None:
    siblings = parent.lora_siblings
    if torch.compiler.is_compiling() or siblings.off is not None or getattr(parent, "_is_replica", False):
        return
    for layers, is_unwritten in zip(siblings.layers(parent), siblings.unwritten):
        opened = _Open(siblings, layers, is_unwritten)
        for layer in layers:
            vars(layer)["group"] = opened


def _close(parent: Any, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for layers in parent.lora_siblings.layers(parent):
        opened = [vars(layer).pop("group", None) for layer in layers]
        # An exception may come between the calls, as when non-reentrant checkpointing has what it wanted.
        if opened and opened[0] is not None and opened[0].outputs and sys.exc_info()[0] is None:
            parent.lora_siblings.off = "one of its layers was not called with the others' input"


class _Open:
    """A group during its parent's forward."""

    def __init__(self, siblings: Siblings, layers: list[Linear], is_unwritten: bool) -> None:
        self.siblings, self.layers, self.is_unwritten = siblings, layers, is_unwritten
        self.stands_down = len(layers) < 2
        self.outputs: dict[Linear, tuple[Tensor, Any]] = {}  # not yet taken: y, and what it was computed from

    def take(self, layer: Linear, x: Tensor) -> Tensor | None:
        """y of this layer, or None where it has to compute alone."""
        if self.stands_down:
            return None
        if not self.outputs:
            return self._compute(layer, x)
        taken = self.outputs.pop(layer, None)
        if taken is None:  # it cannot take part, or is called again
            return None
        y, (tensors, values) = taken
        tensors_now, values_now = _state(layer, x)
        if values_now == values and len(tensors_now) == len(tensors) and all(map(is_, tensors_now, tensors)):
            return y
        self.outputs.clear()
        self.stands_down = True
        self.siblings.off = "its layers were called with different inputs, or with changes in between"
        return None

    def _compute(self, layer: Linear, x: Tensor) -> Tensor | None:
        """y of this layer, and `outputs` for the others."""
        found = plan(self.layers, x) if self.is_unwritten or not x.is_inference() else "x may be written to, unseen"
        if isinstance(found, str):
            self.stands_down = True
            return None
        members, dtype, backend = found
        if all(layer is not one.layer for one in members):
            return None
        states = [None if one.layer is layer else _state(one.layer, x) for one in members]
        outputs = ops.lora_group(x, projections(members, x), dtype=dtype, backend=backend)
        if dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            outputs = [y.to(x.dtype) for y in outputs]
        self.outputs = {one.layer: (y, state) for one, y, state in zip(members, outputs, states) if state is not None}
        return next(y for one, y in zip(members, outputs) if one.layer is layer)


def _state(layer: Linear, x: Tensor) -> tuple[list[Tensor], tuple]:
    """All that an output, and whether it has gradients, depends on: the very tensors, and plain values."""
    adapters, base, kind = layer.adapters_in_effect(), layer._modules["base_layer"], x.device.type
    assert base is not None
    given = [x, *base._parameters.values(), *base._buffers.values()]
    for name in adapters:
        A, B = layer.factors(name)
        given += [*A._parameters.values(), *B._parameters.values()]
        if isinstance(layer.scaling[name], Tensor):  # scales.py
            given.append(layer.scaling[name])
    tensors = [tensor for tensor in given if tensor is not None]
    values = (
        adapters,
        [(layer.scaling[name], layer.dropout_p(name)) for name in adapters],
        [(tensor.requires_grad, None if tensor.is_inference() else tensor._version) for tensor in tensors],
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        (layer.backend, current_backend(), current_route()),
    )
    return tensors, values


def plan(layers: Sequence[Linear], x: Tensor | None) -> tuple[list[Member], torch.dtype, str | None] | str:
    """(those that run as one op, the dtype of their products, their backend), or why they are called one by one."""
    found = [member(layer) for layer in layers]
    members = [one for one in found if isinstance(one, Member) and one.adapter is not None]
    if len(members) < 2:
        reasons = [one for one in found if isinstance(one, str)]
        return f"one of them {reasons[0]}" if reasons else "no adapters in effect"
    backend, dtype = common_backend(members), common_dtype(members, x)
    if isinstance(backend, str):
        return backend
    return dtype if isinstance(dtype, str) else (members, dtype, *backend)


def group_siblings(model: nn.Module) -> None:
    """Have LoRA layers that share their input run as one op, wherever a parent's forward shows that they do."""
    for parent in model.modules():
        names = {name for name, child in parent._modules.items() if type(child) in JOINING}
        if len(names) < 2 or isinstance(parent, LoraMLP):
            continue
        forward = _forward_of(parent)
        shared = [tuple(n for n in group if n in names) for group in shared_inputs(forward)]
        groups = tuple(group[i : i + MOST] for group in shared for i in range(0, len(group) - 1, MOST))
        linear = {n for n, child in parent._modules.items() if isinstance(child, (LoraLayer, nn.Linear))}
        of_each = tuple(unwritten(forward, group, linear.__contains__) for group in groups)
        before = vars(parent).get("lora_siblings")
        if before is None and groups:
            parent.lora_siblings = Siblings(parent, groups, of_each)  # type: ignore[assignment]
        elif before is not None:
            before.groups, before.unwritten = groups, of_each


def _forward_of(parent: nn.Module) -> Any:
    return inspect.unwrap(getattr(parent.forward, "__func__", parent.forward))


def ungroup_siblings(model: nn.Module) -> None:
    for parent in model.modules():
        siblings = vars(parent).pop("lora_siblings", None)
        for hook in siblings.hooks if siblings is not None else ():
            hook.remove()


def set_lora_groups(model: nn.Module, enabled: bool) -> None:
    """Whether layers of `model` that share their input (q, k and v) run as one op: those that `explain` lists.

    True, the default, also gives a group that went off another try. Raises ValueError where the model has none.
    """
    found = [vars(module)["lora_siblings"] for module in model.modules() if "lora_siblings" in vars(module)]
    if not found:
        raise ValueError("the model has no LoRA layers that are known to share their input")
    for siblings in found:
        siblings.off = None if enabled else "switched off by set_lora_groups"


def choice(parent: nn.Module) -> Choice | None:
    """A row of `explain`: whether layers of this module that share their input run as one op; None where none do."""
    siblings = vars(parent).get("lora_siblings")
    if siblings is None:
        return None
    routes, reasons = [], []
    for names, layers in zip(siblings.groups, siblings.layers(parent)):
        found = siblings.off or plan(layers, None)
        children = {name: parent._modules.get(name) for name in names}
        strange = [
            f"{name} is a {type(child).__name__}" for name, child in children.items() if type(child) not in JOINING
        ]
        if isinstance(found, str):
            routes.append("layers")
            because = found if siblings.off or len(layers) > 1 or not strange else ", ".join(strange)
        else:
            routes.append("group")
            members = [member.layer for member in found[0]]
            called = [name for name, child in children.items() if all(child is not layer for layer in members)]
            because = f"one op, without {', '.join(called)}" if called else "one op"
        reasons.append(f"{', '.join(names)} share their input: {because}")
    return Choice("lora_group", max(routes, default="layers"), "; ".join(reasons))
