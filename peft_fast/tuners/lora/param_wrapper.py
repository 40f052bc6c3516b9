"""LoRA on a parameter of a module that is no layer: the config option target_parameters.

The experts of transformers' mixtures are such, [experts, out, in] ([experts, in, out] where the module says that it
`is_transposed`). Where the module is one of transformers' experts, experts.py runs all of them and their adapters at
once; elsewhere the sum of parameter and adapters takes the parameter's place for the time of a forward, under autograd.
A of all experts is one linear layer, [rank * experts, in], and B [out, rank * experts]: peft's names.
Several parameters of one module have wrappers around one another.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.dispatch import Choice
from peft_fast.ops import plain
from peft_fast.tuners.offload import home, in_hook, onloaded

from . import experts
from .config import LoraConfig
from .layer import LoraLayer
from .scales import folded


class ParamWrapper(LoraLayer):
    """Around the module that has the parameter `parameter_name`, or around another wrapper of its.

    Raises ValueError for parameters of other shapes, and for options that need the layer's input.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        parameter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
    ) -> None:
        super().__init__(base_layer)
        self.parameter_name = self.weight_name = parameter_name
        shape = tuple(self.weight.shape)
        if len(shape) not in (2, 3) or not self.weight.is_floating_point():
            raise ValueError(
                f"LoRA adapts parameters [out, in] and [experts, out, in], and {parameter_name} is {shape} of "
                f"{self.weight.dtype}: leave it out of target_parameters"
            )
        self.is_matrix = len(shape) == 2
        self.num_experts = 1 if self.is_matrix else shape[0]
        self.is_transposed = not self.is_matrix and bool(getattr(self.get_base_layer(), "is_transposed", False))
        self.in_features, self.out_features = shape[-2:] if self.is_transposed else shape[:-3:-1]
        self.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig) -> None:
        for option in ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora"):
            if getattr(config, option):
                raise ValueError(
                    f"{option} is not for target_parameters, whose adapters see no input: leave out one of the two"
                )
        super().update_layer(adapter_name, r, lora_alpha, config)

    def make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r * self.num_experts, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * self.num_experts, self.out_features, bias=False)

    why_not_mixed = "the adapter is on a parameter, which all samples share"

    @property
    def weight(self) -> Tensor:
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def bias(self) -> Tensor | None:
        return None

    def _products(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """(left, right), whose product is the change before scaling, in the parameter's layout."""
        A, B = (factor.weight for factor in self.factors(adapter_name))
        if self.is_matrix:
            return B, A
        A = A.unflatten(0, (self.num_experts, -1))  # [experts, r, in]
        B = B.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)  # [experts, out, r]
        return (A.mT, B.mT) if self.is_transposed else (B, A)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        left, right = self._products(adapter)
        wide = torch.promote_types(left.dtype, torch.float32)
        return self.scaling[adapter] * (left.to(wide) @ right.to(wide))

    def weight_in_effect(self, weight: Tensor) -> Tensor:
        """`weight` and the adapters."""
        with torch.autocast(weight.device.type, enabled=False):
            for name in self.adapters_in_effect():
                left, right = (part.to(weight.dtype) for part in self._products(name))
                multiply_add = torch.addmm if self.is_matrix else torch.baddbmm
                right, scale = folded(right, self.scaling[name])
                weight = multiply_add(weight, left, right.to(weight.dtype), alpha=scale)
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not self.adapters_in_effect():
            return self.base_layer(*args, **kwargs)
        with ExitStack() as stack:
            for name in self.adapters_in_effect():
                for factor in self.factors(name):
                    stack.enter_context(onloaded(factor))
            return in_hook(self.get_base_layer(), self._with_adapters, args, kwargs)

    def _with_adapters(self, *args: Any, **kwargs: Any) -> Any:
        if self.why_not_grouped() is None and (call := experts.bound(args, kwargs)) is not None:
            return experts.forward(self.get_base_layer(), self._in_effect(), *call)
        if nn.utils.parametrize.is_parametrized(self.get_base_layer(), self.parameter_name):
            return self._computed(*args, **kwargs)
        path, layer = self.parameter_name, self.base_layer
        while isinstance(layer, ParamWrapper):
            path, layer = f"base_layer.{path}", layer.base_layer
        weight = self.weight_in_effect(self.weight)
        return torch.func.functional_call(self.base_layer, {path: weight}, args, kwargs)

    def _computed(self, *args: Any, **kwargs: Any) -> Any:
        """Of a parameter that is computed from others, 4-bit ones among them: adding is the last step of that."""
        chain: Any = self.get_base_layer().parametrizations[self.parameter_name]  # type: ignore[index, union-attr]
        chain.append(_Added(self.weight_in_effect))
        try:
            with nn.utils.parametrize.cached():
                return self.base_layer(*args, **kwargs)
        finally:
            del chain[-1]

    def _in_effect(self) -> dict[str, "ParamWrapper"]:
        return {name: wrapper for name, wrapper in wrappers_of(self).items() if wrapper.adapters_in_effect()}

    def why_not_grouped(self) -> str | None:
        """Why the adapters are added to the parameter in each forward, None where experts.forward runs them."""
        if plain.is_transformed():
            return "a transform of torch.func is at work"
        return experts.why_not(self.get_base_layer(), self._in_effect())

    def route(self, tokens: int) -> Choice:
        if self.adapters_in_effect():
            why = self.why_not_grouped()
            if why is None:
                factors = {factor.weight.dtype for name in self.adapters_in_effect() for factor in self.factors(name)}
                weight, device = self.weight, home(self.get_base_layer())
                return ops.choose_experts(device or weight.device, weight.dtype, factors, self.backend)
            because = f"the adapters are added to the parameter {self.parameter_name} for each forward: {why}"
            return Choice("parameter", "added", because)
        return Choice("base_layer", "base", f"the adapters are {self.why_idle()}")

    def __getattr__(self, name: str) -> Any:
        """What a model asks of its experts: num_experts, config, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self._modules:  # being unpickled or copied
                raise
            return getattr(self.get_base_layer(), name)

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r},"


class _Added(nn.Module):
    def __init__(self, weight_in_effect: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = weight_in_effect


def parameter_names(module: nn.Module) -> list[str]:
    """Of a module's own parameters, those that are computed from others (torch.nn.utils.parametrize) too: in the order
    in which peft wraps them."""
    computed = getattr(module, "parametrizations", None)
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return names if computed is None else sorted([*names, *computed])


def wrappers_of(module: nn.Module) -> dict[str, ParamWrapper]:
    """The wrappers around a module, by the names of their parameters."""
    found: dict[str, ParamWrapper] = {}
    while isinstance(module, ParamWrapper):
        found[module.parameter_name] = module
        module = module.base_layer
    return found


def path_for_patterns(layer: LoraLayer, path: str) -> str:
    """What rank_pattern and alpha_pattern are looked up with, of a layer at this path in the model: a parameter's."""
    if not isinstance(layer, ParamWrapper):
        return path
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return f"{path}.{layer.parameter_name}"
