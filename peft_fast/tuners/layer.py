"""What a layer with adapters is: the part that every method shares.

`AdapterHolder` keeps weights by adapter name, knows which adapters are active and which key of a file each weight has.
`BaseTunerLayer` stands in the place of a layer of the base model, has it as `base_layer`, and merges into it.

A method's layer declares `adapter_layer_names` (its containers of weights), `other_param_names` (its dicts of numbers)
and `get_delta_weight`, and writes `forward`. Names and state-dict keys are peft's: libraries reach into them.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.dispatch import Choice
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.sharded import refuse_sharded

from ._buffer_dict import BufferDict
from .base_weight import base_weight, can_hold, check_writable, clone, set_base_weight, set_quantized_weight
from .offload import home, onloaded


class AdapterHolder(nn.Module):
    """Weights by adapter name; some of the adapters are active, all can be switched off together."""

    adapter_layer_names: tuple[str, ...] = ()  # attributes that are ModuleDicts or ParameterDicts {adapter: weights}
    other_param_names: tuple[str, ...] = ()  # attributes that are dicts {adapter: anything else}

    mixed_batch: Any = None  # a MixedBatch, during a forward whose samples go through different adapters

    def __init__(self) -> None:
        super().__init__()
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self._paused: list[str] = []  # adapters that were trainable when all were switched off

    @property
    def active_adapter(self) -> list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self._active_adapter

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    def available_adapters(self) -> list[str]:
        names = {name for attribute in self.adapter_layer_names for name in getattr(self, attribute)}
        return sorted(names)

    def _get_available_adapters(self) -> set[str]:  # peft's names for it, which tests of other libraries use
        return set(self.available_adapters())

    def _all_available_adapter_names(self) -> list[str]:
        return self.available_adapters()

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        found: list[nn.Parameter] = []
        for attribute in self.adapter_layer_names:
            container = getattr(self, attribute)
            if adapter_name in container:
                entry = container[adapter_name]
                # Within torch.func.functional_call a plain tensor stands in a parameter's place.
                found += list(entry.parameters()) if isinstance(entry, nn.Module) else [entry]
        return found

    def adapter_state_keys(self, adapter_name: str) -> dict[str, str]:
        """{key in an adapter's file: key in this module's state_dict}; a file does not name its adapter."""
        keys: dict[str, str] = {}
        for attribute in self.adapter_layer_names:
            container = getattr(self, attribute)
            if adapter_name not in container:
                continue
            entry = container[adapter_name]
            if isinstance(entry, nn.Module):
                keys |= {f"{attribute}.{key}": f"{attribute}.{adapter_name}.{key}" for key in entry.state_dict()}
            else:
                keys[attribute] = f"{attribute}.{adapter_name}"
        return keys

    def check_set_adapter(self, adapter_names: Sequence[str]) -> None:
        """Raise ValueError where these adapters cannot be active together here."""

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these the active adapters, trainable unless `inference_mode`; freeze the others."""
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._paused = []
        for name in self.available_adapters():
            self.set_requires_grad(name, name in self._active_adapter and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; those that were trainable are so again afterwards, and no others."""
        if enabled == (not self._disable_adapters):
            return
        if enabled:
            self.set_requires_grad(self._paused)
            self._paused = []
        else:
            names = self.available_adapters()
            self._paused = [name for name in names if any(p.requires_grad for p in self.adapter_parameters(name))]
            self.set_requires_grad(self._paused, False)
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Was it active, it is so no longer; which one takes its place is the model's choice."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, attribute)
            if adapter_name in container:
                del container[adapter_name]
        self._active_adapter = [name for name in self._active_adapter if name != adapter_name]


def holders_in(model: nn.Module) -> Iterator[tuple[str, AdapterHolder]]:
    """(path, module) of everything that holds adapters, in the order of named_modules.

    Does not look into the adapters themselves: with 64 of them in a small Llama that took 7 ms of a 5 ms forward.
    """
    seen: set[nn.Module] = set()
    todo = [("", model)]
    while todo:
        path, module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        children: Any = module._modules
        if isinstance(module, AdapterHolder):
            yield path, module
            own = {*module.adapter_layer_names, *module.other_param_names}
            children = {name: child for name, child in children.items() if name not in own}
        prefix = f"{path}." if path else ""
        todo += [(prefix + name, child) for name, child in reversed(children.items()) if child is not None]


class BaseTunerLayer(AdapterHolder):
    """A layer of the base model (`base_layer`) with adapters around it."""

    base_layer: nn.Module
    weight_name = "weight"  # the parameter of the base layer that adapters are added to
    why_not_mixed: str | None = None  # why its samples cannot go through different adapters, where they cannot
    cast_input_dtype_enabled = True  # see helpers.disable_input_dtype_casting
    adds_to_weight = False  # whether its adapters can be converted to LoRA: see supports_lora_conversion
    backend: str | None = None  # "triton" or "torch": for this layer, whatever the process-wide choice is

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        # A base and its bias while something is merged that cannot be taken out of it again: see must_keep_base.
        self._unmerged: tuple[QuantizedWeight | Tensor, Tensor | None] | None = None

    def get_base_layer(self) -> nn.Module:
        """The layer of the base model itself, through any tuner layers in between."""
        layer: Any = self._modules["base_layer"]  # a third of the time of self.base_layer
        while isinstance(layer, BaseTunerLayer):
            layer = layer._modules["base_layer"]
        return layer

    def base_weight(self) -> Tensor | QuantizedWeight:
        """The base layer's weight as it is stored: the dense tensor, or the k-bit one without a copy."""
        return base_weight(self.get_base_layer(), self.weight_name)

    @property
    def weight(self) -> Tensor:  # some models read linear.weight.dtype or .device
        return self.get_base_layer().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.get_base_layer(), "bias", None)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def adapters_in_effect(self) -> list[str]:
        """The active adapters that this layer has; none while it is merged or all are switched off."""
        if self._disable_adapters or self.merged_adapters:
            return []
        return [name for name in self._active_adapter if self.has_adapter(name)]

    def has_adapter(self, adapter_name: str) -> bool:
        return any(adapter_name in getattr(self, attribute) for attribute in self.adapter_layer_names)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether convert_to_lora can make LoRA of the adapter: where it adds a matrix to the weight."""
        return self.adds_to_weight and getattr(self.get_base_layer(), "groups", 1) == 1

    def why_idle(self) -> str:
        """What is said of the adapters where none is in effect."""
        return "merged" if self.merged else "switched off" if self.disable_adapters else "not active here"

    def route(self, tokens: int) -> Choice:
        """What a forward of so many tokens, in the layer's own dtype, runs now, and why: a row of `explain`."""
        return Choice(type(self).__name__, "reference", "this method has no kernels of its own")

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in its layout: float32, unrounded so that merging rounds once."""
        raise NotImplementedError(f"{type(self).__name__} does not merge")

    def get_delta_bias(self, adapter_name: str) -> Tensor | None:
        """What the adapter adds to the base layer's bias: [N], or None for nothing."""
        return None

    def place_adapter(self, adapter_name: str, keep_dtype: bool = False) -> None:
        """Move an adapter to the base weight's device and, unless `keep_dtype`, to its dtype.

        A k-bit base counts as its compute dtype, an offloaded one as where it computes. Weights on the meta device stay
        there.
        """
        weight = self.base_weight()
        dtype = getattr(self.get_base_layer(), "compute_dtype", None)
        if isinstance(weight, Tensor):
            dtype = weight.dtype
        on_meta = any(parameter.is_meta for parameter in self.adapter_parameters(adapter_name))
        device = torch.device("meta") if on_meta else home(self.get_base_layer()) or weight.device
        for attribute in self.adapter_layer_names:
            container = getattr(self, attribute)
            if adapter_name not in container:
                continue
            if isinstance(container, nn.ParameterDict):
                weights = container[adapter_name]
                moved = weights.data.to(device, None if keep_dtype else dtype)
                if moved.is_meta == weights.is_meta:
                    weights.data = moved
                else:  # which torch does not let `data` be
                    container[adapter_name] = nn.Parameter(moved, requires_grad=weights.requires_grad)
            else:
                container[adapter_name] = container[adapter_name].to(device, None if keep_dtype else dtype)
        self._place_buffers(adapter_name, device, None if keep_dtype or self.is_kbit else dtype)

    def _place_buffers(self, adapter_name: str, device: torch.device, dtype: torch.dtype | None) -> None:
        if device.type == "meta":
            return
        for attribute in self.other_param_names:
            container = getattr(self, attribute)
            if isinstance(container, BufferDict) and adapter_name in container:
                tensor = container[adapter_name]
                if not tensor.is_meta:
                    container[adapter_name] = tensor.to(device, dtype if tensor.is_floating_point() else None)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add adapters (the active ones unless named) to the base weight; forward is the base layer's from then on.

        With `safe_merge`, and always for a k-bit weight, which cannot hold them, raises ValueError where that would
        give inf or NaN, and changes nothing.
        """
        names = self.adapters_to_merge(adapter_names)
        if (safe_merge or self.is_kbit) and (problem := self.merge_problem(names)):
            raise ValueError(problem)
        self.add_to_base(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again: up to its dtype's rounding, a k-bit weight exactly."""
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to undo", stacklevel=2)
            return
        if self._unmerged is None:
            with onloaded(self.get_base_layer(), changed=True):
                self._write_base(*self.shifted_base(self.merged_adapters, -1))
        else:
            base: Any = self.get_base_layer()
            weight, bias = self._unmerged
            if isinstance(weight, QuantizedWeight):
                set_quantized_weight(base, weight.to(self.base_weight().device))
                if bias is not None:
                    base.bias.copy_(bias)
                self.base_changed()
            else:
                with onloaded(base, changed=True):
                    self._write_base(weight, bias)
        self._unmerged = None
        self.merged_adapters.clear()

    @property
    def is_kbit(self) -> bool:
        return isinstance(self.base_weight(), QuantizedWeight)

    def adapters_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list of names, got the string {adapter_names!r}")
        wanted = self.active_adapters if adapter_names is None else list(adapter_names)
        here = [name for name in wanted if name in self.available_adapters()]
        names = [name for name in here if name not in self.merged_adapters]
        if names and self.is_kbit:
            refuse_sharded(self.get_base_layer(), "merging into a k-bit weight")
        if names:
            check_writable(self.get_base_layer(), self.weight_name)
        for name in names:
            if self.bias is None and self.get_delta_bias(name) is not None:
                raise ValueError(
                    f"adapter {name!r} has a bias and the base layer has none to merge it into: keep it unmerged"
                )
        if self.merged and here:
            more = f"merging {names} too" if names else "nothing to merge"
            warnings.warn(f"{self.merged_adapters} are merged already: {more}", stacklevel=3)
        return names

    def merge_problem(self, adapter_names: Sequence[str]) -> str | None:
        """Why these adapters should not be merged, or None: a trial that writes nothing."""
        if not adapter_names:
            return None
        with onloaded(self.get_base_layer()):
            weight, bias = self.shifted_base(adapter_names)
        if can_hold(self.get_base_layer(), weight, self.weight_name) and (bias is None or bool(bias.isfinite().all())):
            return None
        return (
            f"merging {list(adapter_names)} gives inf or NaN in the weight: the adapter is broken; nothing was merged"
        )

    @torch.no_grad()
    def add_to_base(self, adapter_names: Sequence[str], undoable: bool = True) -> None:
        """The second half of `merge`: for names that `adapters_to_merge` let through.

        Rounding to a few values cannot be undone by subtracting, so a k-bit weight is kept (half a byte or one per
        weight, for as long as it is merged), unless nobody will ask for it: not `undoable`. Further adapters are merged
        into the kept weight, together with those before, and the sum is rounded once.
        """
        adapter_names = [name for name in adapter_names if name not in self.merged_adapters]
        if not adapter_names:
            return
        if undoable and self._unmerged is None and self.must_keep_base(adapter_names):
            self._unmerged = self._exact_base()
        if self.is_kbit:
            warnings.warn("merging into a k-bit weight rounds the sum to its few values: outputs change", stacklevel=3)
        with onloaded(self.get_base_layer(), changed=True):
            self._write_base(*self.shifted_base(adapter_names))
        self.merged_adapters += adapter_names

    def follows(self, adapter_name: str) -> bool:
        """Whether another layer, with which this one shares its weight, merges the adapter for both."""
        return False

    def must_keep_base(self, adapter_names: Sequence[str]) -> bool:
        """Whether merging these adapters loses what the base weight was."""
        return self.is_kbit

    def _exact_base(self) -> tuple[QuantizedWeight | Tensor, Tensor | None]:
        """Copies of the base weight and its bias as they are without any adapter."""
        weight, bias = self.base_weight(), self.bias
        if not isinstance(weight, QuantizedWeight):
            with onloaded(self.get_base_layer()):
                weight, new = self.shifted_base(self.merged_adapters, -1)
                bias = self.bias if new is None else new
                weight = weight.to(self.weight.dtype, copy=True)
        copied = clone(weight) if isinstance(weight, QuantizedWeight) else weight
        return copied, None if bias is None else bias.detach().clone()

    @torch.no_grad()
    def shifted_base(self, adapter_names: Sequence[str], sign: int = 1) -> tuple[Tensor, Tensor | None]:
        """The base weight, in its layout, plus or minus what these adapters change, unrounded: in fp32, or fp64 for
        fp64.

        A k-bit weight that adapters are merged into counts as the exact one that was kept, plus these adapters. The
        bias [N] likewise, or None where the adapters leave it alone. Nothing is written.
        """
        weight, bias, names = self.base_weight(), self.bias, list(adapter_names)
        if self._unmerged is not None:
            exact, bias = self._unmerged
            weight, names = exact.to(weight.device), [*self.merged_adapters, *names]
        dense = ops.dequantize(weight, torch.float32) if isinstance(weight, QuantizedWeight) else weight
        total = dense.to(torch.promote_types(dense.dtype, torch.float32))
        total = self.shifted_weight(total, names, sign)
        return total, self.shifted_bias(bias, names, sign)

    def shifted_bias(self, bias: Tensor | None, adapter_names: Sequence[str], sign: int) -> Tensor | None:
        """The bias likewise, or None where the adapters leave it alone."""
        changes = [change for name in adapter_names if (change := self.get_delta_bias(name)) is not None]
        for change in changes:
            bias = bias + sign * change  # type: ignore[operator]
        return bias if changes else None

    def shifted_weight(self, weight: Tensor, adapter_names: Sequence[str], sign: int) -> Tensor:
        """The unrounded `weight` with these adapters merged into it, or with sign -1 without them again."""
        for name in adapter_names:
            weight = weight + sign * self.get_delta_weight(name)
        return weight

    @torch.no_grad()
    def _write_base(self, weight: Tensor, bias: Tensor | None) -> None:
        base = self.get_base_layer()
        set_base_weight(base, weight, self.weight_name)
        if bias is not None:
            base.bias.copy_(bias)  # type: ignore[operator, union-attr]
        self.base_changed()

    def base_changed(self) -> None:
        """Called after the base weight was written to, for what a layer keeps of it."""
