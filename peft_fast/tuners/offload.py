"""Layers that accelerate has offloaded (device_map with "cpu" or "disk", cpu_offload, disk_offload): outside of their
own forward, which a hook of theirs surrounds, their weights are on the meta device.

Adapters are small. They stay on the device that such a layer computes on, and its hook does not know of them.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def offloading_hook(module: nn.Module) -> Any:
    """accelerate's hook that brings the module's weights and takes them away, or None."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "offload", False) and any(p.is_meta for p in module.parameters(recurse=False)):
            return one
    return None


def home(layer: nn.Module) -> torch.device | None:
    """The device that an offloaded layer computes on; None for one whose weights are where they are."""
    hook = offloading_hook(layer)
    return None if hook is None or hook.execution_device is None else torch.device(hook.execution_device)


@contextmanager
def onloaded(layer: nn.Module, changed: bool = False) -> Iterator[None]:
    """Within the block an offloaded layer has its weights. `changed`: what is in them at its end is kept, in the
    memory of the host; the files of a layer that was on disk stay as they are."""
    hook = offloading_hook(layer)
    if hook is None:
        yield
        return
    with torch.device("cpu"):  # where adapters are made on the meta device, what is read from disk is not
        hook.pre_forward(layer)
    try:
        yield
        if changed:
            tensors: dict[str, torch.Tensor] = {**dict(layer.named_parameters(recurse=False))}
            tensors |= dict(layer.named_buffers(recurse=False)) if hook.offload_buffers else {}
            hook.weights_map = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}
    finally:
        hook.post_forward(layer, torch.tensor([]))


def in_hook(module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """run(*args, **kwargs), as accelerate's hook on `module` surrounds that one's forward: its weights are there, and
    inputs where it computes. Calls of the module by `run` go past the hook."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        return run(*args, **kwargs)
    inside: Any = sys.modules["accelerate.hooks"]
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    module._hf_hook = inside.ModelHook()  # does nothing
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not hook.no_grad):
            output = run(*args, **kwargs)
    except BaseException:
        hook.post_forward(module, torch.tensor([]))
        raise
    finally:
        module._hf_hook = hook
    return hook.post_forward(module, output)


def only_brings(module: nn.Module) -> bool:
    """Whether calling the module does what its class says, within a hook of accelerate's: see in_hook."""
    own: Any = vars(module)
    if "_hf_hook" not in own or "_old_forward" not in own:
        return False
    wrapped = getattr(own.get("forward"), "__wrapped__", None)
    if wrapped is not own["_old_forward"] or getattr(wrapped, "__func__", None) is not type(module).forward:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)


def trainable_copy(module: nn.Module) -> nn.Module:
    """A copy of the module with weights of its own that stay where it computes; inputs are brought there as before."""
    hooks = {inner: inner._hf_hook for inner in module.modules() if hasattr(inner, "_hf_hook")}
    with ExitStack() as stack:
        for inner in module.modules():
            stack.enter_context(onloaded(inner))
        # A hook may hold the weights of the whole model: it is not copied, but left out.
        twin = copy.deepcopy(module, {id(hook): None for hook in hooks.values()})
    for inner, of_twin in zip(module.modules(), twin.modules()):
        if inner in hooks:
            _unhook(of_twin)
            _bring_inputs(of_twin, hooks[inner])
    return twin


def _unhook(module: Any) -> None:
    """Undo what accelerate did to the module's forward."""
    old = module._old_forward
    del module._hf_hook, module._old_forward
    if getattr(old, "__func__", None) is type(module).forward:
        del module.forward
    else:
        module.forward = old


def _bring_inputs(module: nn.Module, hook: Any) -> None:
    hooks: Any = sys.modules["accelerate.hooks"]  # which has made the old one
    for one in getattr(hook, "hooks", [hook]):
        if isinstance(one, hooks.AlignDevicesHook) and one.execution_device is not None:
            new = hooks.AlignDevicesHook(
                execution_device=one.execution_device, io_same_device=one.io_same_device, skip_keys=one.skip_keys
            )
            hooks.add_hook_to_module(module, new, append=True)
