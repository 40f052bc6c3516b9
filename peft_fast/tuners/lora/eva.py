"""EVA (arXiv 2410.07170): A starts as the principal components of what the layer gets from sample data, and the ranks
go where they explain most of it. B is zero: the model does what it did.

get_eva_state_dict                 finds the components of all layers, running the model over the data
initialize_lora_eva_weights        writes them into an adapter, whose layers then have other ranks
"""

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_fast.adapter_file import PREFIX
from peft_fast.tuners.base_weight import is_dense_linear, quantized_weight
from peft_fast.tuners.matching import by_pattern, find_targets, resolved_targets
from peft_fast.tuners.targets import LORA_TARGETS

from .calibration import in_mode
from .components import PrincipalComponents
from .config import LoraConfig
from .eva_weights import checked_model, write_components

MOST_RHO = 1000  # beyond it, the model's widest layer bounds the ranks
EPOCHS = 1000  # of the data, after which components that have not settled will not: tau too close to 1

PrepareLayerInputs = Callable[[Any, Any, str], Tensor]


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """Which tokens of a batch count: [tokens, 2], sample and place of those that attention_mask has, and that have a
    label where eva_config says so."""
    if not isinstance(model_input, Mapping):
        raise TypeError(
            f"a batch must be a dict with input_ids, got {type(model_input).__name__}: give a prepare_model_inputs_fn "
            "of your own, or None"
        )
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    options = peft_config.eva_config
    if options.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows of a layer's input [samples, tokens, K] that `model_input`, of the function above, names."""
    return _tensor_of(layer_input, layer_name)[model_input.t().unbind()]


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    x = _tensor_of(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def _tensor_of(layer_input: Any, layer_name: str) -> Tensor:
    found = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{layer_name} gets a {type(found).__name__}, no tensor: give a prepare_layer_inputs_fn for it that makes "
            "rows of that"
        )
    return found


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """One forward over a batch that is a dict."""
    return model(**inputs)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayerInputs
    | Mapping[str, PrepareLayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """{path of a layer: principal components [its rank, K] of its inputs}, for initialize_lora_eva_weights.

    model: a PeftModel, whose adapter `adapter_name` says which linear layers are meant, or a plain model and a
      peft_config. dataloader: batches, read again and again, in order, until every component that is needed changes by
      less than eva_config.tau. It needs at least as many rows a batch as the largest rank is, r * rho.
    forward_fn(model, batch): runs the model, by default model(**batch).
    prepare_model_inputs_fn(batch, peft_config): what is given to prepare_layer_inputs_fn(inputs, that, path), which
      gives the rows [M, K] of a layer's inputs that count. By default the tokens of attention_mask and with labels;
      with None the batch itself, and all rows. prepare_layer_inputs_fn may be a dict by path; others take all rows.
    gather_distributed_inputs: with torch.distributed, take the rows of all processes, which get different data.
    Layers whose inputs are equal in the first batch (q, k and v) share one decomposition. Models run in eval mode and
    without adapters; mode, adapters and torch's generator are as they were afterwards.
    Raises ValueError for data that are too few, and for a config without eva_config.
    """
    adapted: Any = model if hasattr(model, "peft_config") else None
    if peft_config is None:
        if adapted is None:
            raise ValueError("peft_config is needed for a model that is no PeftModel")
        peft_config = checked_model(model, adapter_name)
    if peft_config.eva_config is None:
        raise ValueError("EVA needs a config with eva_config=EvaConfig(...) and init_lora_weights='eva'")
    layers = _linear_layers(model, peft_config) if adapted is None else _adapted_layers(model, adapter_name)
    rows = _Rows(layers, prepare_layer_inputs_fn, gather_distributed_inputs)
    batches = _Batches(dataloader, model, peft_config, prepare_model_inputs_fn)
    if dist.is_initialized() and gather_distributed_inputs:
        warnings.warn(
            "gather_distributed_inputs: EVA takes the rows of all processes, so each of them has to get other data",
            stacklevel=3,
        )
    with in_mode(model, False), nullcontext() if adapted is None else adapted.disable_adapter():
        search = _Search(layers, peft_config, _rho(model, peft_config))
        digests: dict[str, Any] = {}
        inputs, prepared = batches.first()
        with rows.seen(layers, prepared, lambda name, x: digests.update({name: _digest(x)})):
            forward_fn(model, inputs)
        search.share(digests)
        show = show_progress_bar and (not dist.is_initialized() or dist.get_rank() == 0)
        with tqdm(desc="EVA", unit="batch", disable=not show, leave=False) as bar:
            for epoch, inputs, prepared in batches.again():
                wanted = search.wanted()
                bar.set_description(f"EVA: {len(layers) - search.count(wanted)} of {len(layers)} layers are found")
                if not wanted:
                    break
                search.check_progress(epoch)
                with rows.seen(wanted, prepared, search.add):
                    forward_fn(model, inputs)
                search.distribute()
                bar.update()
    found, device = search.result(), batches.device
    return found if device is None else {name: vectors.to(device) for name, vectors in found.items()}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayerInputs
    | Mapping[str, PrepareLayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give an adapter with init_lora_weights="eva" its start: call it before the optimiser is made.

    Either `dataloader`, for get_eva_state_dict with the other arguments, or its result. Layers get the ranks that the
    components have, those of rank 0 lose the adapter, and the config's target_modules, rank_pattern and alpha_pattern
    say so. Layers without components (embeddings, convolutions, ...) start plainly, with a warning.
    Raises ValueError, and leaves the adapter as it was, for a model that is no PeftModel, other initialisations,
    several active adapters, and components that do not fit the layers.
    """
    config = checked_model(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("initialize_lora_eva_weights needs a dataloader, or the eva_state_dict that it leads to")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    write_components(model, eva_state_dict, adapter_name)


def _adapted_layers(model: Any, adapter_name: str) -> dict[str, nn.Module]:
    layers = {
        PREFIX + path: layer
        for path, layer in model.base_model.layers()
        if getattr(layer, "starts_from_weight", False) and layer.has_adapter(adapter_name)
    }
    if not layers:
        raise ValueError(f"adapter {adapter_name!r} is on no linear layer, and EVA is for such")
    return layers


def _linear_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Of a model without adapters: those that the config names, all where it names none."""
    paths = [path for path, _ in model.named_modules()]
    if config.target_modules is not None:
        targets = resolved_targets(model, config.target_modules, LORA_TARGETS, config.task_type)
        paths = find_targets(model, config, targets)
    layers = {path: model.get_submodule(path) for path in paths}
    found = {p: layer for p, layer in layers.items() if is_dense_linear(layer) or quantized_weight(layer) is not None}
    if not found:
        raise ValueError(f"target_modules {config.target_modules} name no linear layer: {sorted(layers)[:3]}")
    return found


def _rho(model: nn.Module, config: LoraConfig) -> float:
    rho = config.eva_config.rho
    if rho <= MOST_RHO:
        return rho
    return min(rho, max(max(p.shape, default=0) for p in model.parameters()) // config.r)


def _device(model: nn.Module) -> torch.device | None:
    """That of the model's parameters, None where they are on several."""
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    if len(devices) > 1:
        where = ", ".join(sorted(map(str, devices)))
        warnings.warn(f"the model is on several devices, {where}: batches stay where they are", stacklevel=4)
        return None
    return devices.pop()


def _digest(x: Tensor) -> tuple[bytes, torch.Size]:
    """Equal for tensors of equal bits."""
    bits: Any = x.contiguous().view(torch.uint8).cpu().numpy()
    return blake2b(bits).digest(), x.shape


class _Batches:
    """Batches on the model's device, each with what is handed to prepare_layer_inputs_fn."""

    def __init__(self, data: Iterable[Any], model: nn.Module, config: LoraConfig, prepare: Any) -> None:
        self.data, self.device, self.config, self.prepare = data, _device(model), config, prepare

    def first(self) -> tuple[Any, Any]:
        for inputs in self.data:
            return self._ready(inputs)
        raise ValueError("the dataloader is empty")

    def again(self) -> Iterator[tuple[int, Any, Any]]:
        """(epoch, batch, prepared), without an end."""
        for epoch in itertools.count():
            there = False
            for inputs in self.data:
                there = True
                yield epoch, *self._ready(inputs)
            if not there:
                raise ValueError("the dataloader must be one that can be read several times, and this one has run out")

    def _ready(self, inputs: Any) -> tuple[Any, Any]:
        inputs = inputs if self.device is None else _moved(inputs, self.device)
        return inputs, copy.deepcopy(inputs) if self.prepare is None else self.prepare(inputs, self.config)


def _moved(inputs: Any, device: torch.device) -> Any:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return type(inputs)({key: _moved(value, device) for key, value in inputs.items()})  # type: ignore[call-arg]
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_moved(value, device) for value in inputs)
    return inputs


class _Rows:
    """The rows of layers' inputs that count, of this process or of all."""

    def __init__(self, layers: Mapping[str, nn.Module], prepare: Any, gather: bool) -> None:
        by_path = dict(prepare) if isinstance(prepare, Mapping) else dict.fromkeys(layers, prepare)
        if unknown := sorted(by_path.keys() - layers.keys()):
            raise ValueError(
                f"prepare_layer_inputs_fn has functions for layers that EVA does not look at: {unknown}. Its keys are "
                f"whole paths, such as {next(iter(layers))}"
            )
        self.layers = layers
        self.prepare = {name: by_path.get(name) or _all_rows for name in layers}
        self.gather = gather and dist.is_initialized()

    @contextmanager
    def seen(self, names: Iterable[str], prepared: Any, see: Callable[[str, Tensor], Any]) -> Iterator[None]:
        """Within, `see` is called with the name and the rows of each of these layers that runs."""
        handles = [
            self.layers[name].register_forward_pre_hook(partial(self._hand_over, name, prepared, see))
            for name in names
        ]  # fmt: skip
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hand_over(self, name: str, prepared: Any, see: Any, layer: nn.Module, inputs: Any) -> None:
        x = self.prepare[name](inputs, prepared, name)
        if not isinstance(x, Tensor) or x.dim() != 2:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"prepare_layer_inputs_fn must give rows [M, K] for {name}, got {got}")
        see(name, _gathered(x) if self.gather else x)


def _gathered(x: Tensor) -> Tensor:
    """The rows of all processes, one behind the other."""
    world = dist.get_world_size()
    lengths = [torch.empty(1, dtype=torch.int64, device=x.device) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(x)], device=x.device))
    most = max(int(length) for length in lengths)
    padded = torch.cat([x, x.new_zeros(most - len(x), x.shape[1])])
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths)])


class _Search:
    """The components of each layer's inputs, and who gets how many of them."""

    def __init__(self, layers: Mapping[str, nn.Module], config: LoraConfig, rho: float) -> None:
        names = {name: name.removeprefix(PREFIX) for name in layers}
        self.config = config
        r = {name: by_pattern(config.rank_pattern, path, config.r) for name, path in names.items()}
        self.budget = sum(r.values())
        self.ranks = {name: round(rank * rho) for name, rank in r.items()}
        self.source: dict[str, str] = {}  # of each layer, the one whose components it takes: itself, or its equal
        self.components: dict[str, PrincipalComponents] = {}

    def share(self, digests: Mapping[str, Any]) -> None:
        """Layers of equal inputs share components, and may have as many ranks as any of them."""
        if idle := [name for name in self.ranks if name not in digests]:
            raise ValueError(f"the forward did not run {len(idle)} of the layers, such as {idle[0]}: exclude them")
        first: dict[Any, str] = {}
        equal = {name: first.setdefault(digests[name], name) for name in self.ranks}
        most = {name: max(self.ranks[n] for n in equal if equal[n] == equal[name]) for name in equal}
        own = {name: source for name, source in equal.items() if name == source}
        groups = {source: [n for n in equal if equal[n] == source and n != source] for source in own}
        self.source = own | {name: source for source, others in groups.items() for name in others}
        self.ranks = {name: most[name] for name in self.ranks}
        self.components = {name: PrincipalComponents(self.ranks[name], self.config.eva_config.tau) for name in own}

    def add(self, name: str, x: Tensor) -> None:
        components = self.components[name]
        if components.count > x.shape[1]:
            raise ValueError(
                f"{name} has {x.shape[1]} features, fewer than the {components.count} ranks (r * rho) that it may get: "
                "give a smaller r, rank_pattern or rho"
            )
        if not bool(x.isfinite().all()):
            raise ValueError(f"the inputs of {name} hold inf or NaN: check the sample data")
        if len(x) >= components.count:
            components.add(x)

    def wanted(self) -> list[str]:
        """Layers whose components are still looked for."""
        return [name for name, one in self.components.items() if not bool(one.alike[: self.ranks[name]].all())]

    def count(self, names: Iterable[str]) -> int:
        missing = set(names)
        return sum(source in missing for source in self.source.values())

    def check_progress(self, epoch: int) -> None:
        idle = [name for name, one in self.components.items() if one.vectors is None]
        if epoch and idle:
            raise ValueError(
                f"no batch has the {self.components[idle[0]].count} rows (r * rho) that {idle[0]} needs: give larger "
                "batches, a smaller r or rho, or use_label_mask=False"
            )
        if epoch >= EPOCHS:
            left = self.wanted()
            raise ValueError(
                f"the components of {left[0]} have not settled after {EPOCHS} readings of the data: give more data, or "
                f"a tau below {self.config.eva_config.tau}"
            )

    def distribute(self) -> None:
        """Give the ranks to the components that explain most, whichever layers they are of."""
        if any(one.vectors is None for one in self.components.values()):
            return
        shares = {name: self.components[source].shares for name, source in self.source.items()}
        owners = [name for name, values in shares.items() for _ in values]
        order = torch.cat([values.double().cpu() for values in shares.values()]).argsort(descending=True, stable=True)
        counts = Counter(owners[i] for i in order[: self.budget].tolist())
        self.ranks = {name: counts[name] for name in self.source}

    def result(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, rank in self.ranks.items():
            components = self.components[self.source[name]]
            assert components.vectors is not None
            vectors = components.vectors[:rank].clone()
            if self.config.eva_config.whiten:
                vectors /= components.values[:rank, None].sqrt()
            found[name] = vectors
        return found
