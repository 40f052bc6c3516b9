"""Batches whose samples go through different adapters: model(..., adapter_names=["a", "b", "__base__"]).

A MixedBatch is handed to every layer for one forward of the model. What a layer makes of it depends on the layer:
lora/multi.py computes all adapters of a linear layer at once; every other kind runs its forward once for each adapter,
on the samples that are its own (`one_by_one`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.kernels.segments import Segments

BASE = "__base__"  # the name, as in peft, for samples without an adapter


class MixedBatch:
    """Which adapter each sample of a batch, or each of its tokens, goes through.

    names: one for each sample; or for each sample a list of as many names as it has tokens, for several sequences in
    one. `repeats`: how often generating may repeat each sample (beams, several sequences from one prompt).
    `keys`: int32 [layers, adapters, 2] for dropout in training, `layer_of`: the place of each layer in it.
    """

    def __init__(
        self,
        names: Sequence[str | Sequence[str]],
        repeats: int = 1,
        keys: Tensor | None = None,
        layer_of: dict[nn.Module, int] | None = None,
    ) -> None:
        self.names = [name if isinstance(name, str) else list(name) for name in names]
        self.repeats = repeats
        self.adapters = adapters_of(self.names)
        self._keys, self._layer_of = keys, layer_of or {}
        self._segments: dict[tuple, Segments] = {}
        self.kept: dict[nn.Module, Any] = {}  # what layers have looked up for this batch, while nothing is trained

    def of_rows(self, x: Tensor) -> list[int]:
        """The adapter of each row of x [samples, ...]: its place in `adapters`, -1 for none; of each of its tokens
        [samples, tokens, ...] where tokens have names of their own. ValueError where x has another number of them."""
        number = {name: i for i, name in enumerate(self.adapters)} | {BASE: -1}
        times = self._times(x)
        if not self.by_token:
            return [number[name] for name in self.names for _ in range(times)]  # type: ignore[index]
        rows = [[number[n] for n in ([name] * x.shape[1] if isinstance(name, str) else name)] for name in self.names]
        lengths = {len(row) for row in rows}
        if x.dim() < 2 or lengths != {x.shape[1]}:
            raise ValueError(
                "adapter_names by token need a name for each token that a layer gets, "
                f"got {sorted(lengths)} names a sample for an input {tuple(x.shape)}"
            )
        return [one for row in rows for _ in range(times) for one in row]

    @property
    def by_token(self) -> bool:
        return any(not isinstance(name, str) for name in self.names)

    def segments(self, x: Tensor) -> Segments:
        """Of x [samples, ..., K], seen as rows of K: made when the first layer asks, and kept for the others."""
        key = x.shape[:-1], x.device
        if key not in self._segments:
            rows, adapter = x.shape[:-1].numel(), self.of_rows(x)
            per = rows // len(adapter) if adapter else 0
            self._segments[key] = ops.segments_of_samples(adapter, per, len(self.adapters), x.device)
        return self._segments[key]

    def keys(self, layer: nn.Module) -> Tensor | None:
        """int32 [adapters, 2]: what this layer's masks of this forward are functions of."""
        return None if self._keys is None else self._keys[self._layer_of[layer]]

    def _times(self, x: Tensor) -> int:
        samples = len(self.names)
        if x.dim() and len(x) == samples:
            return 1
        if x.dim() and len(x) == samples * self.repeats:
            return self.repeats
        raise ValueError(
            f"adapter_names must have one name a sample: got {samples} for an input of {len(x) if x.dim() else 1}, "
            f"{tuple(x.shape)}. A model that flattens samples and tokens into one dimension cannot have mixed batches"
        )


def adapters_of(names: Iterable[str | Sequence[str]]) -> list[str]:
    """The adapters among the names, in the order of their first samples."""
    flat = (one for name in names for one in ([name] if isinstance(name, str) else name))
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
    numbers = torch.tensor(batch.of_rows(x), device=x.device)
    flat = x.flatten(0, 1) if batch.by_token else x
    active, parts, places = layer._active_adapter, [], []
    with assigned([layer], None):
        try:
            for number, names in enumerate([[], *([name] for name in batch.adapters)], start=-1):
                rows = torch.nonzero(numbers == number)[:, 0]
                if rows.numel() or not (numbers.numel() or names):  # an empty batch is run once
                    layer._active_adapter = names
                    parts.append(layer.forward(flat[rows], *args, **kwargs))
                    places.append(rows)
        finally:
            layer._active_adapter = active
    y = torch.cat(parts)[torch.argsort(torch.cat(places))]
    return y.unflatten(0, x.shape[:2]) if batch.by_token else y
