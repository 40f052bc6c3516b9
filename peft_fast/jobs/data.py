"""A job's samples: what they must be, in which order they come, and where in them the job is."""

from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

IGNORED = -100  # the label, as in transformers, of a token that is not learned
KEYS = {"input_ids", "labels", "attention_mask"}


class Sample(NamedTuple):
    """Tensors int64 [tokens] on the CPU; seen: bool [tokens], False where attention_mask is 0."""

    ids: Tensor
    targets: Tensor  # what each token has to predict: the next one's label, or IGNORED
    seen: Tensor


def sample_of(row: Any, vocabulary: int) -> Sample:
    """The sample in a dict. Raises ValueError for what cannot be trained on."""
    if not hasattr(row, "keys") or "input_ids" not in row:
        raise ValueError(f"samples must be dicts with input_ids, got {_described(row)}")
    unknown = sorted(str(key) for key in row if key not in KEYS)
    if unknown:
        raise ValueError(f"samples have input_ids, labels and attention_mask, got {unknown} too: remove these columns")
    ids = _vector("input_ids", row["input_ids"])
    mask = row.get("attention_mask")
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else _vector("attention_mask", mask).bool()
    labels = row.get("labels")
    labels = torch.where(seen, ids, IGNORED) if labels is None else _vector("labels", labels)
    for name, values in (("labels", labels), ("attention_mask", seen)):
        if len(values) != len(ids):
            raise ValueError(f"{name} must be as many as input_ids, got {len(values)} and {len(ids)}")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"input_ids must be from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}")
    targets = torch.full_like(labels, IGNORED)
    targets[:-1] = labels[1:]
    wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= vocabulary))]
    if wrong.numel():
        raise ValueError(f"labels must be {IGNORED} or from 0 to {vocabulary - 1}, got {int(wrong[0])}")
    return Sample(ids, targets, seen)


def batch_of(rows: list[Any], vocabulary: int) -> list[Sample]:
    """Samples of one batch. Raises ValueError where one is wrong, and where nothing in them has a label."""
    samples = [sample_of(row, vocabulary) for row in rows]
    if not any((sample.targets != IGNORED).any() for sample in samples):
        raise ValueError(
            f"a batch of {len(samples)} samples has no label to learn: all are {IGNORED}, or of a first token, which "
            "nothing predicts"
        )
    return samples


def _vector(name: str, values: Any) -> Tensor:
    try:
        vector = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers [tokens], got {_described(values)}: {error}") from error
    if vector.dim() != 1 or (vector.numel() and (vector.is_floating_point() or vector.is_complex())):
        raise ValueError(f"{name} must be integers [tokens], got {_described(values)}")
    return vector.long()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Batches:
    """The batches of a job's data, epoch after epoch; `epoch` and `position` (batches taken of it) say where it is.

    The order of an epoch is a function of the seed and the epoch's number, so that a job that is resumed goes on where
    it was: an iterable without a length is read again up to there. `epochs`: None for without end.
    """

    def __init__(self, data: Any, batch_size: int, seed: int, shuffle: bool, epochs: int | None) -> None:
        self.data, self.batch_size, self.seed, self.shuffle, self.epochs = data, batch_size, seed, shuffle, epochs
        self.epoch = self.position = 0
        self._rest: Iterator[list[Any]] | None = None

    @property
    def of_an_epoch(self) -> int | None:
        """How many, None where the data have no length."""
        return -(-len(self.data) // self.batch_size) if is_indexed(self.data) else None

    def go_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position, self._rest = epoch, position, None

    def next(self) -> list[Any] | None:
        """The next batch, None at the end. Raises ValueError where there are no data, and what the data raise."""
        if self.epochs is not None and self.epoch >= self.epochs:
            return None
        if self._rest is None:
            self._rest = self._of_epoch()
        batch = next(self._rest, None)
        if batch is not None:
            self.position += 1
            return batch
        if not self.position:
            if self.epoch:  # an iterator, which gives its values once
                return None
            raise ValueError("the data are empty")
        self.go_to(self.epoch + 1, 0)
        return self.next()

    def _of_epoch(self) -> Iterator[list[Any]]:
        """The rest of this epoch, from `position` on."""
        if not is_indexed(self.data):
            rows = iter(self.data)
            for _ in islice(rows, self.position * self.batch_size):
                pass
            return iter(lambda: list(islice(rows, self.batch_size)), [])
        data: Any = self.data
        if not len(data):
            return iter([])
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = RandomSampler(data, generator=generator) if self.shuffle else SequentialSampler(data)
        batches = list(BatchSampler(order, self.batch_size, drop_last=False))
        return ([self.data[i] for i in batch] for batch in batches[self.position :])


def is_indexed(data: Any) -> bool:
    return isinstance(data, Sized) and hasattr(data, "__getitem__")
