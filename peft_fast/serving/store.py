"""AdapterStore: many LoRA adapters over one base model, for serving.

    store = AdapterStore(model, max_bytes=2 << 30)
    store.load("french", "adapters/french")
    store.generate(**inputs, adapter_names=["french", "__base__", "german"], max_new_tokens=50)

Samples of one batch go through different adapters, in two or three launches a layer however many they are. Adapters are
loaded, exchanged and unloaded while others are in use: a batch that runs goes on with what it has begun with. When
memory is full the adapter goes that was not used for the longest time; it is read again when it is asked for.
"""

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft_fast.tuners.layer import BaseTunerLayer, holders_in
from peft_fast.tuners.mixed_batch import BASE, TokenAdapters, adapters_of, assigned, repeats_of

from .adapter import ReadAdapter, StoredAdapter, read
from .layer import ServedLinear, StoreBatch

BATCHES = 4  # that are kept, with what was made of their adapters: the next step of each finds everything made


class AdapterStore:
    """Adapters for `model`, a model without adapters, dense or k-bit; its linear layers that adapters are for are
    wrapped until `close()`.

    max_bytes: of all adapters together; max_adapters: how many; max_rank: of each; None for no limit. dtype: in which
    adapters are kept; default: the model's own. On the CPU the adapters of the last BATCHES batches are also kept side
    by side, beyond max_bytes. Raises TypeError or ValueError for a model that has adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        max_bytes: int | None = None,
        max_adapters: int | None = None,
        max_rank: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if any(True for _ in holders_in(model)):
            raise ValueError("the store's model must have no adapters: merge_and_unload() or unload() them first")
        for name, limit in (("max_bytes", max_bytes), ("max_adapters", max_adapters), ("max_rank", max_rank)):
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit <= 0):
                raise ValueError(f"{name} must be positive, a number, or None for no limit, got {limit!r}")
        self.model, self.max_bytes, self.max_adapters, self.max_rank = model, max_bytes, max_adapters, max_rank
        self.dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self._adapters: OrderedDict[str, StoredAdapter] = OrderedDict()  # the one used last comes last
        self._sources: dict[str, tuple[str, dict[str, Any]]] = {}  # of those that were loaded, evicted ones too
        self._layers: dict[str, ServedLinear] = {}
        self._batches: OrderedDict[Any, StoreBatch] = OrderedDict()
        self._in_use: Counter[str] = Counter()
        self._changing, self._running = threading.RLock(), threading.RLock()

    def load(self, name: str, source: str | os.PathLike[str], **hub_arguments: Any) -> None:
        """Read an adapter's folder, peft's or ours, or one of the Hub (hub_arguments: revision, token, subfolder, ...).

        An adapter of this name is exchanged; batches that run keep the old one. Raises ValueError, with the store as it
        was, for broken files, for an adapter that is of another base model, no plain LoRA, or too large, and where
        those in use leave no room for it.
        """
        if name == BASE:
            raise ValueError(f"an adapter cannot be called {name!r}: that stands for the base model")
        if not isinstance(name, str) or not name:
            raise ValueError(f"an adapter's name must be a string that is not empty, got {name!r}")
        if os.path.isdir(source):
            source = os.path.abspath(source)  # it may be read again, whatever the working directory is then
        found = read(self.model, source, self.dtype, **hub_arguments)
        self._check_size(name, found)
        with self._changing:
            self._check_nobody_elses(found)
            self._make_room(name, found.nbytes)
            self._put(name, found.stored())
            self._sources[name] = str(source), hub_arguments

    def unload(self, name: str) -> None:
        """Forget an adapter. ValueError for one that is unknown."""
        with self._changing:
            self._check_known([name])
            self._forget(name)
            del self._sources[name]

    def generate(self, *args: Any, adapter_names: Sequence[Any], **kwargs: Any) -> Any:
        """The model's `generate`, each sample by its own adapter, "__base__" for none."""
        model: Any = self.model
        with self.batch(adapter_names, repeats_of(kwargs, getattr(model, "generation_config", None))):
            return model.generate(*args, **kwargs)

    @torch.no_grad()
    def __call__(self, *args: Any, adapter_names: Sequence[Any], **kwargs: Any) -> Any:
        """The model's forward, each sample by its own adapter."""
        with self.batch(adapter_names):
            return self.model(*args, **kwargs)

    @contextmanager
    def batch(self, adapter_names: Sequence[Any], repeats: int = 1) -> Iterator[None]:
        """Within, the model's batches are of these adapters, one a sample, or for each sample a list of one a token;
        or TokenAdapters.

        One thread at a time: others wait. Reads adapters again that had to make room. ValueError for unknown names.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list with a name for each sample, got {adapter_names!r}")
        wanted = adapters_of(adapter_names)
        with self._running:
            batch = self._batch(adapter_names, wanted, repeats)
            try:
                with assigned(list(self._layers.values()), batch):
                    yield
            finally:
                self._release(wanted)

    def _batch(self, names: Sequence[Any], wanted: list[str], repeats: int) -> StoreBatch:
        with self._changing:
            self._check_known(wanted)
            self._in_use.update(wanted)  # before one makes room for another
            try:
                for name in wanted:
                    if name not in self._adapters:
                        source, hub_arguments = self._sources[name]
                        self.load(name, source, **hub_arguments)
                    self._adapters.move_to_end(name)
            except BaseException:
                self._release(wanted)
                raise
            if isinstance(names, TokenAdapters):
                return StoreBatch(names, {name: self._adapters[name] for name in wanted}, repeats)
            key = tuple(one if isinstance(one, str) else tuple(one) for one in names), repeats
            batch = self._batches.get(key)
            if batch is None:
                batch = self._batches[key] = StoreBatch(names, {name: self._adapters[name] for name in wanted}, repeats)
                if len(self._batches) > BATCHES:
                    self._batches.popitem(last=False)
            self._batches.move_to_end(key)
            return batch

    def close(self) -> nn.Module:
        """Forget all adapters; returns the model, which is as it was before."""
        with self._running, self._changing:
            for path, layer in self._layers.items():
                self._replace(path, layer.base_layer)
            for kept in (self._adapters, self._sources, self._layers, self._batches):
                kept.clear()
        return self.model

    @property
    def names(self) -> list[str]:
        """Of the adapters in memory, the one used last at the end."""
        return list(self._adapters)

    @property
    def nbytes(self) -> int:
        """Of the adapters in memory."""
        return sum(adapter.nbytes for adapter in list(self._adapters.values()))  # a copy: other threads load and unload

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        limit = "" if self.max_bytes is None else f" of {self.max_bytes / 2**20:.1f}"
        gone = len(self._sources) - len(self._adapters)
        waiting = f", {gone} to be read again when asked for" if gone else ""
        return f"AdapterStore({len(self)} adapters, {self.nbytes / 2**20:.1f}{limit} MiB{waiting})"

    def _release(self, names: Sequence[str]) -> None:
        with self._changing:
            self._in_use -= Counter(names)  # names that nobody uses any more are left out

    def _check_nobody_elses(self, found: ReadAdapter) -> None:
        for path in found.pieces:
            if path not in self._layers and isinstance(self.model.get_submodule(path), BaseTunerLayer):
                raise ValueError(
                    f"{path} has adapters of another store or of a PeftModel, whichever was made since this store: "
                    "serve all from one"
                )

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._sources]
        if unknown:
            known = ", ".join(map(repr, sorted(self._sources))) or "none"
            raise ValueError(f"the store has no adapter {unknown[0]!r}: load it first; there are {known}")

    def _check_size(self, name: str, found: ReadAdapter) -> None:
        if self.max_rank is not None and found.rank > self.max_rank:
            raise ValueError(f"adapter {name!r} is too large: rank {found.rank}, the store takes up to {self.max_rank}")
        if self.max_bytes is not None and found.nbytes > self.max_bytes:
            raise ValueError(
                f"adapter {name!r} is too large: {found.nbytes / 2**20:.1f} MiB, the store has "
                f"{self.max_bytes / 2**20:.1f} MiB in all"
            )

    def _make_room(self, name: str, nbytes: int) -> None:
        """Forget adapters, the one that was not used for the longest time first, until one more of this size fits."""
        rest = OrderedDict((other, adapter) for other, adapter in self._adapters.items() if other != name)
        going: list[str] = []
        total = sum(adapter.nbytes for adapter in rest.values())
        for other in [o for o in rest if not self._in_use[o]]:
            if self._fits(total + nbytes, len(rest) - len(going) + 1):
                break
            going.append(other)
            total -= rest[other].nbytes
        if not self._fits(total + nbytes, len(rest) - len(going) + 1):
            raise ValueError(
                f"no room for adapter {name!r}, {nbytes / 2**20:.1f} MiB: {len(rest) - len(going)} adapters with "
                f"{total / 2**20:.1f} MiB are in use in this batch. Make batches smaller, or the store larger"
            )
        for other in going:
            self._forget(other)

    def _fits(self, nbytes: int, count: int) -> bool:
        return (self.max_bytes is None or nbytes <= self.max_bytes) and (
            self.max_adapters is None or count <= self.max_adapters
        )

    def _put(self, name: str, adapter: StoredAdapter) -> None:
        self._forget(name)
        for path in adapter.pieces:
            if path not in self._layers:
                self._layers[path] = ServedLinear(self.model.get_submodule(path), path)
                self._replace(path, self._layers[path])
        self._adapters[name] = adapter

    def _forget(self, name: str) -> None:
        self._adapters.pop(name, None)
        for key in [key for key, batch in self._batches.items() if name in batch.stored]:
            del self._batches[key]

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)
