"""What every LoRA layer has, and LoRA around a linear layer:

    y = x W^T + bias + sum over active adapters of scale * (dropout(x) A^T) B^T

One call of ops.lora_linear does the base layer and the first adapter; further adapters are added onto its result.
A is [r, in_features], B is [out_features, r], as torch.nn.Linear modules by adapter name. The other kinds of layers are
in embedding.py, conv.py and attention.py.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.dispatch import Choice
from peft_fast.quant.weight import QuantizedWeight
from peft_fast.tuners.base_weight import is_conv1d, linear_features, matmul_weight
from peft_fast.tuners.low_rank import call_of

from . import dora, initialisation, multi
from .activated import InvokedLayer
from .called import call, why_called
from .config import LoraConfig
from .scales import folded


class LoraLayer(InvokedLayer):
    """The adapters' weights and numbers, whatever kind of layer they are around."""

    dora_layer: type[dora.DoraLayer] | None = None  # the class of a layer's magnitudes, where it can have such
    out_dim = 0  # of the base weight: along the out features
    ephemeral_gpu_offload = False  # see LoraRuntimeConfig
    starts_from_weight = False  # whether initialisations that read the base weight are for it

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = (
        "r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "invocations",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, Any] = {}  # a number, or a tensor: see scales.py
        self.use_dora: dict[str, bool] = {}
        self.use_rslora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self._squares: tuple[Any, ...] | None = None  # of the base weight's rows, for DoRA: see kept_squares
        self.kept_norms: dict[str, tuple[Any, ...]] = {}  # by adapter, under DoraCaching
        self.starts: dict[str, initialisation.Start] = {}  # by adapter, while it is being put in
        self._merged_factors: dict[str, Tensor] = {}  # of merged adapters with DoRA, by which the weight was multiplied

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig) -> None:
        """Add an adapter, not active yet. The same seed gives the same weights as in peft, bit for bit."""
        self.note_invocation(adapter_name, config)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_dora[adapter_name] = config.use_dora
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = self.initial_scale(adapter_name)
        self.lora_bias[adapter_name] = config.lora_bias
        self.ephemeral_gpu_offload = config.runtime_config.ephemeral_gpu_offload
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.make_factors(adapter_name, r, config)
        start = initialisation.begin(self, adapter_name, config)
        if start is not None:
            self.starts[adapter_name] = start
        self.place_adapter(adapter_name)
        if config.use_dora:
            self.add_magnitude(adapter_name)

    def make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        """Make the adapter's A and B, as their modules draw them."""
        raise NotImplementedError(f"{type(self).__name__} has to say what its A and B are")

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """False leaves both matrices as their modules draw them."""
        A, B = self.factors(adapter_name)
        if init_lora_weights is False:
            return
        if init_lora_weights is True:
            nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(A.weight, std=1 / self.r[adapter_name])
        nn.init.zeros_(B.weight)
        if B.bias is not None:
            nn.init.zeros_(B.bias)

    def factors(self, adapter_name: str) -> tuple[Any, Any]:
        """(A, B), modules with a `weight`."""
        modules: Any = self._modules  # a seventh of the time of self.lora_A[...]: 0.2 us against 1.7
        return modules["lora_A"]._modules[adapter_name], modules["lora_B"]._modules[adapter_name]

    def factor_dtype(self, adapter_name: str) -> torch.dtype:
        """Of A's weights."""
        return self.factors(adapter_name)[0].weight.dtype

    def is_called(self, adapter_name: str) -> bool:
        """Whether the adapter's A and B have to be called, for norms too: see called.py."""
        return False

    def get_delta_bias(self, adapter_name: str) -> Tensor | None:
        if not self.lora_bias[adapter_name]:
            return None
        _, B = self.factors(adapter_name)
        return self.scaling[adapter_name] * B.bias

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.scaling

    def dropout_p(self, adapter_name: str) -> float:
        """With which probability the adapter drops an element of its input now: 0 in eval mode."""
        dropout: Any = self._modules["lora_dropout"]._modules[adapter_name]  # type: ignore[union-attr]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def dropped(self, adapter_name: str, x: Tensor) -> Tensor:
        """x as the adapter's A gets it: in A's dtype, after dropout."""
        A, _ = self.factors(adapter_name)
        return self.lora_dropout[adapter_name](x.to(A.weight.dtype) if self.cast_input_dtype_enabled else x)

    def add_magnitude(self, adapter_name: str) -> None:
        """Give the adapter the magnitudes of DoRA."""
        if self.dora_layer is None:
            raise ValueError(
                f"use_dora is not for a {type(self.get_base_layer()).__name__}: leave these layers out of "
                "target_modules, or use_dora"
            )
        magnitude = dora.initial_magnitude(self, adapter_name)
        shape = [1, -1, *(1 for _ in self.weight.shape[2:])] if self.weight.dim() > 2 else [-1]
        self.lora_magnitude_vector[adapter_name] = self.dora_layer(magnitude.view(shape))

    def dora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """(A [R, K], B [N, R]) as matrices."""
        A, B = self.factors(adapter_name)
        return A.weight.flatten(1), B.weight.flatten(1)

    def rows_of_base(self) -> Tensor | QuantizedWeight:
        """The base weight as a matrix [N, K], a row an out feature, without a copy."""
        weight = self.base_weight()
        if not isinstance(weight, Tensor):
            return weight
        return weight.flatten(1) if self.out_dim == 0 else weight.t()

    def kept_squares(self) -> Tensor:
        """|W|^2 of every row, computed when the base weight has changed: through a merge, or by torch's count of
        in-place changes. What is written through `.data` is not counted: call base_changed() then."""
        rows = self.rows_of_base()
        if torch.compiler.is_compiling():  # a graph cannot ask for torch's count; k-bit weights change by merges alone
            kept = self._squares if isinstance(rows, QuantizedWeight) else None
            return ops.row_squares(rows) if kept is None else kept[-1]
        base: Any = self.get_base_layer()
        weight = getattr(base, self.weight_name)
        own = rows.data if isinstance(rows, QuantizedWeight) else weight
        key = (own.data_ptr(), own._version, own.dtype, rows.shape)
        if self._squares is None or self._squares[0] is not weight or self._squares[1] != key:
            self._squares = (weight, key, ops.row_squares(rows))
        return self._squares[-1]

    def base_changed(self) -> None:
        self._squares = None

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.kept_norms.clear()
        return super().train(mode)

    def shifted_weight(self, weight: Tensor, adapter_names: Sequence[str], sign: int) -> Tensor:
        """DoRA multiplies what is there by m / |W + delta|, W being the weight without any adapter, as in forward."""
        shape = [-1 if dim == self.out_dim else 1 for dim in range(weight.dim())]
        if sign < 0:
            for name in reversed(adapter_names):
                if name in self.lora_magnitude_vector:
                    weight = weight / self._merged_factors[name].view(shape)
                weight = weight - self.get_delta_weight(name)
            return weight
        plain = weight
        if (
            self.merged_adapters
            and self._unmerged is None
            and any(n in self.lora_magnitude_vector for n in adapter_names)
        ):
            plain = self.shifted_weight(weight, self.merged_adapters, -1)
        for name in adapter_names:
            delta = self.get_delta_weight(name)
            weight = weight + delta
            if name in self.lora_magnitude_vector:
                others = [dim for dim in range(weight.dim()) if dim != self.out_dim]
                norms = torch.linalg.vector_norm(plain + delta, dim=others)
                magnitude: Any = self.lora_magnitude_vector[name].weight
                self._merged_factors[name] = magnitude.detach().view(-1).to(norms.dtype) / norms
                weight = weight * self._merged_factors[name].view(shape)
        return weight

    def adapter_state_keys(self, adapter_name: str) -> dict[str, str]:
        """In a file the magnitudes have no ".weight" at the end."""
        keys = super().adapter_state_keys(adapter_name)
        return {
            key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): name for key, name in keys.items()
        }

    def initial_scale(self, adapter: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA."""
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora[adapter] else r)

    def __repr__(self) -> str:
        return f"lora.{super().__repr__()}"


class Linear(multi.InMixedBatch, LoraLayer):
    """LoRA around torch.nn.Linear, transformers' Conv1D, our QuantizedLinear, and as the base class of bnb.py's layers
    bitsandbytes' Linear4bit and Linear8bitLt.

    A k-bit weight is multiplied by in floating point, in training and in eval mode. bitsandbytes does so too, but for
    Linear8bitLt in eval mode (on a GPU always): that rounds activations to 8 bits, row by row, and so differs by about
    a hundredth of an output's size.
    """

    dora_layer: type[dora.DoraLayer] | None = dora.DoraLinearLayer
    starts_from_weight = True
    may_be_invoked = True
    adds_to_weight = True
    group: Any = None  # with its siblings, while their parent's forward runs (groups.py)

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: LoraConfig, r: int, lora_alpha: float):
        super().__init__(base_layer)
        self.in_features, self.out_features = linear_features(self.get_base_layer())
        self.fan_in_fan_out = is_conv1d(self.get_base_layer())
        self.out_dim = int(self.fan_in_fan_out)
        self.update_layer(adapter_name, r, lora_alpha, config)

    def make_factors(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=config.lora_bias)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """[N, K] in fp32; [K, N] for transformers' Conv1D, as it keeps its weight."""
        A, B = self.factors(adapter)
        wide = torch.promote_types(A.weight.dtype, torch.float32)
        delta = self.scaling[adapter] * (B.weight.to(wide) @ A.weight.to(wide))
        return delta.t() if self.fan_in_fan_out else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., in_features] -> [..., out_features] in x's dtype (autocast's where that is on)."""
        if self.is_mixed:
            return multi.forward(self, x, *args, **kwargs)
        group = None if args or kwargs else self.group  # read once: another thread may close it
        if group is not None and (y := group.take(self, x)) is not None:
            return y
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.adapters_in_effect()
        weight = None if args or kwargs else self.product_weight()
        magnitudes: Any = self._modules["lora_magnitude_vector"]
        if magnitudes._modules and any(name in magnitudes for name in adapters):
            return self._with_magnitudes(x, adapters, weight, *args, **kwargs)
        if why_called(self, adapters) is not None:
            dtype = self.own_dtype(x) if isinstance(weight, QuantizedWeight) else None
            return call(self, x, adapters, weight, dtype, *args, **kwargs)
        if weight is None or (isinstance(weight, Tensor) and not adapters):
            return self.plus(self.base_layer(x, *args, **kwargs), x, adapters)
        if isinstance(weight, Tensor):
            return self.plus(self._base_and(adapters[0], x, weight, None), x, adapters[1:])
        # A k-bit layer may say in which dtype to compute; an autocast region says so for every layer.
        dtype = self.own_dtype(x)
        if len(adapters) == 1:
            y = self._base_and(adapters[0], x, weight, dtype)  # keeps x as it is, not a cast of it
            return y if dtype is None else y.to(x.dtype)
        z = x if dtype is None else x.to(dtype)
        if adapters:
            y = self.plus(self._base_and(adapters[0], z, weight, None), z, adapters[1:])
        else:
            y = ops.quant_matmul(z, weight, self.bias, backend=self.backend)
        return y if dtype is None else y.to(x.dtype)

    def is_called(self, adapter_name: str) -> bool:
        return why_called(self, [adapter_name]) is not None

    def product_weight(self) -> Tensor | QuantizedWeight | None:
        """The base weight [N, K] where multiplying by it may replace calling the base layer, else None."""
        return matmul_weight(self._modules["base_layer"])  # type: ignore[arg-type]

    def own_dtype(self, x: Tensor) -> torch.dtype | None:
        """In which dtype the base layer says to compute; None where it says none, or an autocast region does."""
        return None if torch.is_autocast_enabled(x.device.type) else getattr(self.base_layer, "compute_dtype", None)

    def _with_magnitudes(
        self, x: Tensor, adapters: list[str], weight: Tensor | QuantizedWeight | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        dtype = self.own_dtype(x) if isinstance(weight, QuantizedWeight) else None
        y = dora.forward(self, x if dtype is None else x.to(dtype), adapters, weight, *args, **kwargs)
        return y if dtype is None else y.to(x.dtype)

    def base(self, x: Tensor, weight: Tensor | QuantizedWeight | None, *args: Any, **kwargs: Any) -> Tensor:
        """W x + bias; `weight` as matmul_weight gives it."""
        if isinstance(weight, QuantizedWeight):
            return ops.quant_matmul(x, weight, self.bias, backend=self.backend)
        return self.base_layer(x, *args, **kwargs)

    def product(
        self, name: str, x: Tensor, weight: Tensor | QuantizedWeight | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """W x + scale * B A x, without a bias or dropout."""
        A, B = self.factors(name)
        up, scale = folded(B.weight, self.scaling[name])
        if weight is not None:
            return ops.lora_linear(x, weight, A.weight, up, scale, backend=self.backend)
        y = self.base_layer(x, *args, **kwargs)
        y = y if self.bias is None else y - self.bias
        return ops.lora_up_add(y, ops.lora_down(x, A.weight, backend=self.backend), up, scale, backend=self.backend)

    def route(self, tokens: int) -> Choice:
        weight, adapters = self.product_weight(), self.adapters_in_effect()
        if self.invocations and (activated := self.why_activated()):
            return Choice("lora_linear_multi", "multi", activated)
        reason = self.why_idle()
        with_magnitudes = any(name in self.lora_magnitude_vector for name in adapters)
        if called := why_called(self, adapters):
            return Choice("lora_linear", "added", f"{called}: its modules are called")
        if weight is None and adapters:
            return Choice("lora_up_add", "added", "the base layer has hooks or a forward of its own: it is called")
        if weight is None or (isinstance(weight, Tensor) and not adapters):
            return Choice("base_layer", "base", f"the adapters are {reason}")
        R, p, trained = 0, 0.0, False
        if adapters:
            p = self.dropout_p(adapters[0])
            R, trained = self.r[adapters[0]], any(factor.weight.requires_grad for factor in self.factors(adapters[0]))
        call = call_of(self.base_layer, weight, tokens, R, p, trained)
        if adapters:
            choice = ops.choose(call, self.backend)
            if with_magnitudes:
                choice = replace(
                    choice, because=f"{choice.because}; DoRA: and one product more, of {R} rows, for norms"
                )
            return choice
        base = ops.choose_product(call, self.backend)
        return Choice("base_layer", "base", f"the adapters are {reason}; {base.route} by {base.backend}", base.backend)

    def projection(self, name: str, weight: Tensor | QuantizedWeight, key: Tensor | None) -> ops.Projection:
        """The base layer and one adapter as ops take them for one forward; `key`: a new one, where it drops out."""
        of_A, of_B = [factor._parameters for factor in self.factors(name)]  # a quarter of the time of factor.weight
        bias, extra = self.bias, None if of_B["bias"] is None else self.get_delta_bias(name)
        if extra is not None:
            bias = extra if bias is None else bias + extra
        up, scale = folded(of_B["weight"], self.scaling[name])
        return ops.Projection(weight, bias, of_A["weight"], up, scale, self.dropout_p(name), key)

    def _base_and(self, name: str, x: Tensor, weight: Tensor | QuantizedWeight, dtype: torch.dtype | None) -> Tensor:
        """The base layer and one adapter in one op, computed in `dtype` (default: autocast's or x's)."""
        key = self.new_key(x.device) if self.dropout_p(name) else None
        layer = self.projection(name, weight, key)
        assert layer.A is not None
        assert layer.B is not None
        return ops.lora_linear(
            x, weight, layer.A, layer.B, layer.scale, layer.bias, dtype=dtype, backend=self.backend,
            dropout_p=layer.dropout_p, dropout_key=key,
        )  # fmt: skip

    def plus(self, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """y plus what these adapters make of x."""
        for name in names:
            A, B = self.factors(name)
            s = ops.lora_down(x, A.weight, backend=self.backend, **self._dropout(name, x))
            s = s.to(y.dtype)  # bitsandbytes' layers give x's dtype under autocast too
            up, scale = folded(B.weight, self.scaling[name])
            y = ops.lora_up_add(y, s, up, scale, self.get_delta_bias(name), backend=self.backend)
        return y

    def _dropout(self, name: str, x: Tensor) -> dict[str, Any]:
        p = self.dropout_p(name)
        return {"dropout_p": p, "dropout_key": self.new_key(x.device)} if p else {}


def __getattr__(name: str) -> Any:
    from .names_of_peft import found_elsewhere  # modules that import this one

    return found_elsewhere(__name__, name)
