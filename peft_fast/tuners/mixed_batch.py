"""Batches whose samples go through different adapters: model(..., adapter_names=["a", "b", "__base__"]).

A MixedBatch is handed to every layer for one forward of the model. What a layer makes of it depends on the layer:
lora/multi.py computes all adapters of a linear layer at once; every other kind runs its forward once for each adapter,
on the samples that are its own (`one_by_one`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.kernels.segments import Segments

BASE = "__base__"  # the name, as in peft, for samples without an adapter
SHAPES = 8  # for which a batch keeps segments: a store's batch meets prompts of any length


@dataclass(frozen=True, eq=False)
class TokenAdapters:
    """The adapter of each token, as `adapter_names`: numbers in a tensor, which cost the host less than names in lists
    (8 x 256 tokens, one thread of an EPYC: 78 us until the segments are there, against 436 us).

    adapters: names. numbers: int32 or int64 [samples, tokens], the place in `adapters` of each token's, -1 for none.
    On the CPU they cost a GPU nothing; on a GPU each forward waits for them. Raises ValueError or TypeError for
    anything else.
    """

    adapters: Sequence[str]
    numbers: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.adapters, str) or BASE in self.adapters or len(set(self.adapters)) != len(self.adapters):
            raise ValueError(f"adapters must be a list of different names of adapters, got {self.adapters!r}")
        numbers = self.numbers
        if not isinstance(numbers, Tensor) or numbers.dim() != 2 or numbers.dtype not in (torch.int32, torch.int64):
            shape = f"{numbers.dtype} {tuple(numbers.shape)}" if isinstance(numbers, Tensor) else repr(numbers)
            raise TypeError(f"numbers must be int32 or int64 [samples, tokens], got {shape}")
        least, most = (int(t) for t in numbers.aminmax()) if numbers.numel() else (-1, -1)
        if least < -1 or most >= len(self.adapters):
            raise ValueError(f"numbers must be from -1 to {len(self.adapters) - 1}, got {least} to {most}")

    def __len__(self) -> int:
        return len(self.numbers)


Names = Sequence[str | Sequence[str]] | TokenAdapters


class Places(NamedTuple):
    """Of the rows of a batch, sorted by adapter: int64, on the device."""

    of: Sequence[Tensor]  # the rows of none, of the first adapter, of the second, ...
    back: Tensor  # where each row of the batch is among the sorted ones


class MixedBatch:
    """Which adapter each sample of a batch, or each of its tokens, goes through.

    names: one for each sample; or for each sample a list of as many names as it has tokens, for several sequences in
    one; or TokenAdapters. `repeats`: how often generating may repeat each sample (beams, several sequences from one
    prompt).
    `keys`: int32 [layers, adapters, 2] for dropout in training, `layer_of`: the place of each layer in it.
    """

    def __init__(
        self,
        names: Names,
        repeats: int = 1,
        keys: Tensor | None = None,
        layer_of: dict[nn.Module, int] | None = None,
    ) -> None:
        self.tokens = names if isinstance(names, TokenAdapters) else None
        by_name = () if isinstance(names, TokenAdapters) else names
        self.names = [name if isinstance(name, str) else list(name) for name in by_name]
        self.samples = len(names)
        self.repeats = repeats
        self.adapters = adapters_of(names)
        self._keys, self._layer_of = keys, layer_of or {}
        self._segments: dict[tuple, Segments] = {}
        self._rows: dict[tuple, Tensor] = {}
        self._places: dict[tuple, Places] = {}
        self.kept: dict[nn.Module, Any] = {}  # what layers have looked up for this batch, while nothing is trained

    alone: str | None = None  # the one adapter of all rows, where linear layers may do what they do for an active one

    def note_alone(self, ids: Tensor | None) -> None:
        """Of a model's batch of `ids` [samples, tokens]: whether all rows go through one adapter. Linear layers run
        then with their siblings as one op (lora/groups.py, lora/mlp.py), with the same masks. Where ids and names do
        not fit together nothing is noted, and the first layer says so."""
        if len(self.adapters) != 1 or ids is None or ids.dim() != 2 or len(ids) != self.samples:
            return
        if self.tokens is not None:
            numbers = self.tokens.numbers
            is_all = numbers.shape == ids.shape and not bool((numbers < 0).any())
        else:
            is_all = all(name == self.adapters[0] for name in self.names)
        self.alone = self.adapters[0] if is_all else None

    def beside(self, layer: Any) -> list[str]:
        """Adapters of the layer that are there in all samples, whatever these are named."""
        return []

    def of_rows(self, x: Tensor) -> list[int]:
        """The adapter of each row of x [samples, ...]: its place in `adapters`, -1 for none; of each of its tokens
        [samples, tokens, ...] where tokens have names of their own. ValueError where x has another number of them."""
        if self.tokens is not None:
            return self._of_tokens(x).tolist()
        number = {name: i for i, name in enumerate(self.adapters)} | {BASE: -1}
        times = self._times(x)
        if not self.by_token:
            return [number[name] for name in self.names for _ in range(times)]  # type: ignore[index]
        rows = [[number[n] for n in ([name] * x.shape[1] if isinstance(name, str) else name)] for name in self.names]
        self._check_tokens(x, {len(row) for row in rows})
        return [one for row in rows for _ in range(times) for one in row]

    def _of_tokens(self, x: Tensor) -> Tensor:
        """[rows]"""
        assert self.tokens is not None
        numbers, times = self.tokens.numbers, self._times(x)
        self._check_tokens(x, {numbers.shape[1]})
        return (numbers if times == 1 else numbers.repeat_interleave(times, 0)).flatten()

    def _check_tokens(self, x: Tensor, lengths: set[int]) -> None:
        if x.dim() < 2 or lengths != {x.shape[1]}:
            raise ValueError(
                "adapter_names by token need a name for each token that a layer gets, "
                f"got {sorted(lengths)} names a sample for an input {tuple(x.shape)}"
            )

    @property
    def randomness(self) -> tuple[Tensor | None, dict[nn.Module, int]]:
        """(keys, layer_of)"""
        return self._keys, self._layer_of

    @property
    def by_token(self) -> bool:
        return self.tokens is not None or any(not isinstance(name, str) for name in self.names)

    def segments(self, x: Tensor) -> Segments:
        """Of x [samples, ..., K], seen as rows of K: made when the first layer asks, and kept for the others."""
        return self._for_shape(self._segments, x, self._new_segments)

    def rows(self, x: Tensor) -> Tensor:
        """of_rows, int64 on x's device, kept as the segments are."""
        return self._for_shape(self._rows, x, self._new_rows)

    def places(self, x: Tensor) -> "Places":
        """Where each adapter's rows are, kept as the segments are."""
        return self._for_shape(self._places, x, self._new_places)

    def _new_places(self, x: Tensor) -> "Places":
        numbers = torch.tensor(self.of_rows(x), dtype=torch.int64)  # on the host, which would have to wait for a GPU
        order = torch.argsort(numbers, stable=True)
        lengths = torch.bincount(numbers + 1, minlength=len(self.adapters) + 1).tolist()
        return Places(order.to(x.device).split(lengths), torch.argsort(order).to(x.device))

    def _new_rows(self, x: Tensor) -> Tensor:
        return torch.tensor(self.of_rows(x), dtype=torch.int64).to(x.device, non_blocking=True)

    def _for_shape(self, kept: dict[tuple, Any], x: Tensor, make: Callable[[Tensor], Any]) -> Any:
        key = x.shape[:-1], x.device
        if key not in kept:
            if len(kept) >= SHAPES:
                del kept[next(iter(kept))]
            kept[key] = make(x)
        return kept[key]

    def _new_segments(self, x: Tensor) -> Segments:
        if self.tokens is not None and x.dim() == 3:
            numbers = self._of_tokens(x)
            segments = ops.segments_of_rows(numbers, len(self.adapters))
            sorted_already = sum(segments.lengths) == segments.M and bool((numbers[1:] >= numbers[:-1]).all())
            if sorted_already or segments.order is None:
                return segments._replace(order=None)
            return segments._replace(order=segments.order.to(x.device, non_blocking=True))
        rows, adapter = x.shape[:-1].numel(), self.of_rows(x)
        per = rows // len(adapter) if adapter else 0
        return ops.segments_of_samples(adapter, per, len(self.adapters), x.device)

    def keys(self, layer: nn.Module) -> Tensor | None:
        """int32 [adapters, 2]: what this layer's masks of this forward are functions of."""
        return None if self._keys is None or layer not in self._layer_of else self._keys[self._layer_of[layer]]

    def of_one(self, number: int, samples: int, layer: nn.Module) -> "MixedBatch | None":
        """A batch of this adapter's samples alone, for a layer that goes through adapters one by one: in training what
        one draws may not depend on who else is in the batch. None where nothing is drawn, or it is the only one."""
        keys = self.keys(layer)
        if keys is None or number < 0 or len(self.adapters) == 1:
            return None
        own = keys[number][None, None].clone()  # where Triton wants it: a table's rows lie 8 bytes apart
        return MixedBatch([self.adapters[number]] * samples, keys=own, layer_of={layer: 0})

    def _times(self, x: Tensor) -> int:
        samples = self.samples
        if x.dim() and len(x) == samples:
            return 1
        if x.dim() and len(x) == samples * self.repeats:
            return self.repeats
        raise ValueError(
            f"adapter_names must have one name a sample: got {samples} for an input of {len(x) if x.dim() else 1}, "
            f"{tuple(x.shape)}. A model that flattens samples and tokens into one dimension cannot have mixed batches"
        )


def adapters_of(names: Names) -> list[str]:
    """The adapters among the names, in the order of their first samples; all that TokenAdapters have.

    Raises TypeError for what is neither a name nor a sample's list of names.
    """
    if isinstance(names, TokenAdapters):
        return list(names.adapters)
    flat: list[str] = []
    for name in names:
        of_sample: Sequence[Any] = name if isinstance(name, list | tuple) else [name]
        wrong = [one for one in of_sample if not isinstance(one, str)]
        if wrong:
            raise TypeError(
                "adapter_names must have a name for each sample, or a list of one a token, "
                f"got {wrong[0]!r}; for the base model alone it is {BASE!r}"
            )
        flat += of_sample
    return [name for name in dict.fromkeys(flat) if name != BASE]


def repeats_of(arguments: Mapping[str, Any], config: Any) -> int:
    """How often `generate`, called with these arguments, repeats each sample; `config`: the model's own settings."""

    def setting(name: str) -> int:
        for source in (arguments, arguments.get("generation_config"), config):
            found = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            if isinstance(found, int):
                return found
        return 1

    return max(setting("num_beams"), setting("num_return_sequences"))


@contextmanager
def assigned(layers: Sequence[Any], batch: MixedBatch | None) -> Iterator[None]:
    """Within, these layers work on this batch."""
    before = [layer.mixed_batch for layer in layers]
    for layer in layers:
        layer.mixed_batch = batch
    try:
        yield
    finally:
        for layer, own in zip(layers, before):
            layer.mixed_batch = own


@contextmanager
def within(model: nn.Module, layers: Sequence[Any], batch: MixedBatch) -> Iterator[None]:
    """Within, the model's layers work on this batch; and again in the backward, where checkpointed ones run twice.

    transformers' models call what they checkpoint through a function of each module's: for this forward it is one that
    hands over the batch too. Checkpoints of other kinds run the layers a second time without it, which torch notices.
    """
    modules = model.modules() if model.training else ()
    checkpoints = [m for m in modules if "_gradient_checkpointing_func" in vars(m) and m.training]
    originals = [vars(module)["_gradient_checkpointing_func"] for module in checkpoints]
    for module, original in zip(checkpoints, originals):
        own = set(module.modules())
        inside = [layer for layer in layers if layer in own]
        vars(module)["_gradient_checkpointing_func"] = _with_batch(original, inside, batch)
    try:
        with assigned(layers, batch):
            yield
    finally:
        for module, original in zip(checkpoints, originals):
            vars(module)["_gradient_checkpointing_func"] = original


def _with_batch(checkpoint: Callable, layers: Sequence[Any], batch: MixedBatch) -> Callable:
    def run(function: Callable, *args: Any, **kwargs: Any) -> Any:
        def again(*inputs: Any, **named: Any) -> Any:
            with assigned(layers, batch):
                return function(*inputs, **named)

        return checkpoint(again, *args, **kwargs)

    return run


def one_by_one(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer's forward for each adapter, with the samples (or tokens) of x that are its own.

    For layers whose output has a sample for each sample of x, and one tensor; with tokens of their own, x [samples,
    tokens, ...] is given to the layer as [tokens, ...].
    """
    batch: MixedBatch = layer.mixed_batch
    places = batch.places(x)
    flat = x.flatten(0, 1) if batch.by_token else x
    active, parts = layer._active_adapter, []
    beside = batch.beside(layer)
    try:
        for number, names in enumerate([beside, *([*beside, name] for name in batch.adapters)], start=-1):
            rows = places.of[number + 1]
            if rows.numel() or not (places.back.numel() or names):  # an empty batch is run once
                layer._active_adapter = names
                own = batch.of_one(number, len(rows), layer)
                with assigned([layer], own), _own_randomness(layer, batch, number, x.device):
                    parts.append(layer.forward(flat[rows], *args, **kwargs))
    finally:
        layer._active_adapter = active
    y = torch.cat(parts)[places.back]
    return y.unflatten(0, x.shape[:2]) if batch.by_token else y


@contextmanager
def _own_randomness(layer: Any, batch: MixedBatch, number: int, device: torch.device) -> Iterator[None]:
    """Within, dropout that the layer draws from torch's generator is a function of this adapter's key. Only for a batch
    of one adapter, in mixed training: a GPU is waited for."""
    keys = batch.keys(layer) if number == 0 and len(batch.adapters) == 1 and hasattr(layer, "dropout_p") else None
    if keys is None or not (layer.has_adapter(batch.adapters[0]) and layer.dropout_p(batch.adapters[0])):
        yield
        return
    high, low = keys[0].tolist()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((high << 32) ^ (low & 0xFFFFFFFF))
        yield
