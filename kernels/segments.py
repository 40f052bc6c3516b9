"""Which rows of a batch belong to which adapter: what the kernels for many adapters walk through.

A segment is all rows of one adapter, wherever they lie in the batch. The rows of all segments, one segment after the
other and each in the order of the batch, are `order`; how many each has is known to the host, so that grids and tables
need no waiting for the device. Rows of no adapter are in no segment. It imports torch only.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def kept_tables(maxsize: int) -> Callable[[Callable], Callable]:
    """functools.lru_cache for functions that make tensors, without those that have no data: a FakeTensor of a run on
    shapes alone (peft_fast/memory.py) would be there for the steps that follow. Nor are they inference tensors, which
    autograd refuses to save."""

    def decorate(make: Callable) -> Callable:
        kept: dict[Hashable, Any] = {}  # the oldest first

        @functools.wraps(make)
        def found(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return make(*args)
            table = kept.get(args)
            if table is None:
                with torch.inference_mode(False):
                    table = make(*args)
                if not any(isinstance(t, FakeTensor) for t in (table if isinstance(table, tuple) else (table,))):
                    if len(kept) >= maxsize:
                        kept.pop(next(iter(kept)), None)
                    kept[args] = table
            return table

        return found

    return decorate


class Segments(NamedTuple):
    """Made once for a batch, by `of_rows` or `of_samples`, and used by every layer."""

    order: Tensor | None  # int32 [rows of adapters]; None: all rows of the batch as they come
    lengths: tuple[int, ...]  # rows of each adapter, T of them; 0 is allowed
    M: int  # rows of the batch

    @property
    def starts(self) -> list[int]:
        """Where each segment begins in `order`, and where the last one ends: T + 1 numbers."""
        return starts_of(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def cut(self, size: int, device: torch.device) -> Tensor:
        return blocks(self.lengths, size, device)

    def starts_on(self, device: torch.device) -> Tensor:
        """int32 [T + 1]"""
        return _starts_on(self.lengths, device)


class Groups(NamedTuple):
    """Segments whose lengths the device alone knows, of rows that are sorted: those of experts, which a router picks.
    Made once for a layer by `of_sorted`; nothing waits for the device.
    """

    starts: Tensor  # int32 [T + 1]: where each segment begins, and where the last one ends
    pieces: Tensor | None  # int32 [M // size + T, 4], as of `blocks`, for kernels; those left over have no rows
    size: int  # of a piece
    M: int

    @property
    def order(self) -> None:
        """Rows as they come."""

    @property
    def longest(self) -> int:
        """What the launch is made for: nobody knows how long they are."""
        return self.size

    def cut(self, size: int, device: torch.device) -> Tensor:
        if self.pieces is None or size != self.size:
            raise ValueError(f"a kernel wants pieces of {size} rows: these groups were made for torch, or another size")
        return self.pieces

    def starts_on(self, device: torch.device) -> Tensor:
        return self.starts


KEPT = 64  # things made of constant tensors: batches of one store may have prompts of any length, each with tables


class Constant(tuple):
    """Tensors that do not change while this object lives. What has been made of them is kept in it: stacks, tables."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.kept: dict[Hashable, Any] = {}

    def keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self.kept:
            if len(self.kept) >= KEPT:
                self.kept.clear()
            self.kept[key] = make()
        return self.kept[key]


class Drop(NamedTuple):
    """The adapters' dropout: probabilities, and keys int32 [T, 2] where one is above 0."""

    p: Sequence[float]
    keys: Tensor | None = None


def starts_of(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def of_rows(adapter: Tensor, count: int) -> Segments:
    """Segments from the adapter of each row, integers [M] from -1 (none) to count - 1, on any device.

    Waits for the device once, for the lengths. Raises ValueError for other numbers, TypeError for no integers.
    """
    if adapter.dim() != 1 or adapter.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter must be int32 or int64 [M], got {adapter.dtype} {tuple(adapter.shape)}")
    found, counts = (t.tolist() for t in adapter.unique(return_counts=True))
    if found and not -1 <= found[0] <= found[-1] < count:
        raise ValueError(f"adapters must be numbered from 0 to {count - 1}, or -1 for none, got {found}")
    lengths = [0] * (count + 1)
    for number, rows in zip(found, counts):
        lengths[number] = rows  # those of none, -1, are the last
    numbers = torch.where(adapter == -1, count, adapter)
    order = torch.argsort(numbers, stable=True)[: adapter.shape[0] - lengths[count]]
    return Segments(order.to(torch.int32), tuple(lengths[:count]), adapter.shape[0])


def of_samples(adapter: Sequence[int], rows: int, count: int, device: torch.device | str) -> Segments:
    """Segments of a batch whose samples have `rows` rows each, from the adapter of each sample; nothing waits.

    adapter: from -1 (none) to count - 1.
    """
    lengths = [0] * count
    for number in adapter:
        if number >= 0:
            lengths[number] += rows
    sorted_already = all(a <= b for a, b in itertools.pairwise(adapter)) and -1 not in adapter
    if sorted_already or not rows:
        return Segments(None, tuple(lengths), len(adapter) * rows)
    samples = sorted((sample for sample, number in enumerate(adapter) if number >= 0), key=adapter.__getitem__)
    first = torch.tensor(samples, dtype=torch.int32).to(device, non_blocking=True)
    order = first[:, None] * rows + torch.arange(rows, dtype=torch.int32, device=device)
    return Segments(order.flatten(), tuple(lengths), len(adapter) * rows)


def of_sorted(numbers: Tensor, count: int, cut: Callable[[Tensor, int, int], Tensor] | None = None) -> Groups:
    """Groups of rows that are sorted by their segment: `numbers`, integers [M] from 0 to count - 1, ascending. `cut`:
    what makes the pieces."""
    M = numbers.shape[0]
    starts = torch.searchsorted(numbers, _counting(count + 1, numbers.dtype, numbers.device), out_int32=True)
    size = 32 if 16 * count < M else 16
    return Groups(starts, cut(starts, M, size) if cut else None, size, M)


@kept_tables(maxsize=64)
def _counting(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=dtype, device=device)


def pieces_of(starts: Tensor, M: int, size: int) -> Tensor:
    """int32 [M // size + T, 4]: what `blocks` gives, of lengths that are on the device; pieces left over have no rows.

    As many pieces as there can be: each segment fills all of its own but one.
    """
    T = starts.shape[0] - 1
    first, lengths = starts[:-1], starts.diff()
    ends = ((lengths + size - 1) // size).cumsum(0)
    piece = torch.arange(M // size + T, device=starts.device)
    adapter = torch.searchsorted(ends, piece, right=True).clamp_(max=T - 1)
    before = torch.cat([ends.new_zeros(1), ends])[adapter]
    row = (piece - before) * size
    count = (lengths[adapter] - row).clamp(0, size)
    return torch.stack([adapter, first[adapter] + row, count, row], 1).to(torch.int32)


# The tables below are functions of plain numbers, the same for all layers of a model and for the steps of generating.


@kept_tables(maxsize=256)
def blocks(lengths: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """int32 [blocks, 4]: segments cut into pieces of up to `size` rows: (adapter, where in `order` the piece begins,
    its rows, the first one's place in the segment)."""
    starts = starts_of(lengths)
    table = [
        (adapter, starts[adapter] + row, min(size, length - row), row)
        for adapter, length in enumerate(lengths)
        for row in range(0, length, size)
    ]
    return torch.tensor(table, dtype=torch.int32).view(-1, 4).to(device, non_blocking=True)


@kept_tables(maxsize=256)
def _starts_on(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(starts_of(lengths), dtype=torch.int32).to(device, non_blocking=True)


class Bucket(NamedTuple):
    """Segments of one length whose adapters have one rank, one scale and one dropout: one product computes them all."""

    members: tuple[int, ...]
    length: int
    first: tuple[int, ...]  # where in `order` each begins
    is_consecutive: bool  # one behind the other


@functools.lru_cache(maxsize=1024)
def buckets(lengths: tuple[int, ...], kinds: tuple) -> list[Bucket]:
    """Segments that are not empty, by length and kind; `kinds`: what the adapters of a bucket have in common, or None
    for an adapter that adds nothing here."""
    found = defaultdict(list)
    for adapter, (length, kind) in enumerate(zip(lengths, kinds)):
        if length and kind is not None:
            found[length, kind].append(adapter)
    starts = starts_of(lengths)
    made = []
    for (length, _), members in found.items():
        first = tuple(starts[t] for t in members)
        made.append(Bucket(tuple(members), length, first, all(b - a == length for a, b in itertools.pairwise(first))))
    return made


@kept_tables(maxsize=1024)
def places(bucket: Bucket, device: torch.device) -> Tensor:
    """int64 [adapters * length]: where in `order` the rows of a bucket are."""
    first = torch.tensor(bucket.first, dtype=torch.int64)[:, None]
    return (first + torch.arange(bucket.length)).flatten().to(device, non_blocking=True)
