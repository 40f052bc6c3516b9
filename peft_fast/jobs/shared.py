"""The batches of several jobs as one: one forward, one backward, and each job's own loss.

A job's loss is that of transformers for its batch alone: the mean over its tokens with labels. The sum over the jobs
is what is differentiated, and since an adapter's output depends on its own job's tokens only, its gradient is that of
its own loss. Padding belongs to no adapter: dropout counts an adapter's rows, and how many of them are padding would
depend on how long the other jobs' samples are.

The losses are taken job by job, and only of tokens with labels: beside the model's logits and their gradient, both in
the logits' dtype, there is a softmax in fp32 of one job at a time.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast.tuners.mixed_batch import TokenAdapters

from .data import IGNORED, Sample


class Part(NamedTuple):
    """One job's in a shared batch: where its tokens with labels are, seen as [samples * tokens], and what follows."""

    places: Tensor  # int64 [labels]
    targets: Tensor  # int64 [labels]


class SharedBatch(NamedTuple):
    ids: Tensor  # int64 [samples, tokens]
    mask: Tensor  # int64 [samples, tokens], 0 on padding
    adapters: TokenAdapters
    parts: list[Part]

    @property
    def labels(self) -> list[int]:
        """How many tokens with labels each job has."""
        return [len(part.targets) for part in self.parts]


def check_model(base: Any) -> None:
    """Raise ValueError for a model whose own loss is not the one that is taken here."""
    from transformers import PreTrainedModel  # takes seconds to import
    from transformers.loss.loss_utils import ForCausalLMLoss

    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder:
        raise ValueError(f"jobs train causal language models of transformers, got a {type(base).__name__}")
    if base.get_output_embeddings() is None or base.loss_function is not ForCausalLMLoss:
        raise ValueError(f"jobs train models with a causal language model's head and loss, got {type(base).__name__}")


def join(batches: Sequence[tuple[str, Sequence[Sample]]], padding: int) -> SharedBatch:
    """The samples of (adapter, samples) below each other, padded on the right to the longest; `padding`: any id."""
    samples = [sample for _, own in batches for sample in own]
    shape = len(samples), max(len(sample.ids) for sample in samples)
    ids, mask = torch.full(shape, padding), torch.zeros(shape, dtype=torch.int64)
    targets, numbers = torch.full(shape, IGNORED), torch.full(shape, -1)
    owners = [number for number, (_, own) in enumerate(batches) for _ in own]
    for row, (number, sample) in enumerate(zip(owners, samples)):
        length = len(sample.ids)
        ids[row, :length], mask[row, :length] = sample.ids, sample.seen.long()
        targets[row, :length] = sample.targets
        numbers[row, :length] = torch.where(sample.seen, number, -1)
    parts, first = [], 0
    for _, own in batches:
        flat = targets[first : first + len(own)].flatten()
        places = torch.nonzero(flat != IGNORED)[:, 0]
        parts.append(Part(places + first * shape[1], flat[places]))
        first += len(own)
    return SharedBatch(ids, mask, TokenAdapters([name for name, _ in batches], numbers), parts)


def forward(model: Any, batch: SharedBatch, autocast: torch.dtype | None) -> Tensor:
    """Logits [samples, tokens, vocabulary]."""
    device = model.device
    # Without a dtype of its own an autocast region of the caller's stays in force.
    with torch.autocast(device.type, autocast) if autocast is not None else nullcontext():
        return model(
            input_ids=batch.ids.to(device, non_blocking=True),
            attention_mask=batch.mask.to(device, non_blocking=True),
            use_cache=False,
            adapter_names=batch.adapters,
        ).logits


def backward(logits: Tensor, batch: SharedBatch, factors: Sequence[float]) -> Tensor:
    """Adds the gradients of factor * loss of each job to its adapter's; returns the losses, float [jobs].

    A job whose loss is not finite gets zeros instead: what it would send back through the model is nobody's business.
    """
    flat = logits.detach().flatten(0, 1)
    gradient = torch.zeros_like(flat)
    losses = []
    for part, factor in zip(batch.parts, factors):
        places = part.places.to(flat.device, non_blocking=True)
        own = flat.index_select(0, places).requires_grad_()
        with torch.enable_grad():
            loss = _mean_loss(own, part)
            (of_own,) = torch.autograd.grad(loss * factor, own)
        losses.append(loss.detach())
        gradient.index_copy_(0, places, torch.where(loss.isfinite(), of_own, 0))
        del own, of_own, loss
    logits.backward(gradient.view_as(logits))
    return torch.stack(losses)


def losses(logits: Tensor, batch: SharedBatch) -> Tensor:
    """float [jobs], without gradients."""
    flat = logits.flatten(0, 1)
    return torch.stack([_mean_loss(flat[part.places.to(flat.device)], part) for part in batch.parts])


def _mean_loss(logits: Tensor, part: Part) -> Tensor:
    return F.cross_entropy(logits.float(), part.targets.to(logits.device, non_blocking=True))
