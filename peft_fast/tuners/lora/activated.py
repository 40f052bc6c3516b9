"""Activated LoRA (arXiv 2504.12397): an adapter that is there for the tokens from its invocation on, the last
occurrence of alora_invocation_tokens in a sample. The tokens before get the base model's output, so that its cache can
be shared.

An ActivatedBatch hands every linear layer the rows that are whose; lora/multi.py computes them in one op.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast import ops
from peft_fast.kernels.segments import Segments
from peft_fast.tuners.mixed_batch import BASE, MixedBatch
from peft_fast.tuners.scaling import ScaledLayer

WHOLE = 1 << 62  # an offset that is as long as any sample


def invocation_of(config: Any) -> list[int] | None:
    """The tokens that invoke an adapter with this config, None where it is always there."""
    return getattr(config, "alora_invocation_tokens", None) or None


def offsets_of(input_ids: Tensor, tokens: Sequence[int]) -> list[int | None]:
    """Of each sample of input_ids [samples, T]: how many tokens from the end its last invocation begins, None without
    one."""
    T, n = input_ids.shape[1], len(tokens)
    if n > T:
        return [None] * len(input_ids)
    wanted = torch.tensor(tokens, dtype=input_ids.dtype, device=input_ids.device)
    found = (input_ids.unfold(1, n, 1) == wanted).all(-1)
    start = torch.where(found, torch.arange(T - n + 1, device=found.device), -1).amax(1)
    return [None if at < 0 else T - at for at in start.tolist()]


def offsets_for(
    configs: Mapping[str, Any], names: Sequence[str], input_ids: Tensor, given: Sequence[int | None] | None
) -> list[int | None]:
    """An offset for each sample, by the adapter that is named for it; `given` instead of searching.

    Samples of the base model get None, those of adapters that are always there WHOLE. Raises ValueError for offsets
    that are no counts of tokens.
    """
    found: list[int | None] = list(given) if given is not None else [None] * len(names)
    by_name = {name: [i for i, one in enumerate(names) if one == name] for name in dict.fromkeys(names)}
    for name, samples in by_name.items():
        tokens = None if name == BASE else invocation_of(configs[name])
        if tokens is None:
            found = [(None if name == BASE else WHOLE) if i in samples else one for i, one in enumerate(found)]
        elif given is None:
            for i, offset in zip(samples, offsets_of(input_ids[samples], tokens)):
                found[i] = offset
    return found


def checked_offsets(offsets: Any, samples: int | None) -> list[int | None]:
    """alora_offsets as a list. Raises TypeError and ValueError for what is none of `samples` counts of tokens."""
    if isinstance(offsets, Tensor):
        offsets = offsets.tolist()
    if isinstance(offsets, str) or not isinstance(offsets, Sequence):
        raise TypeError(f"alora_offsets must be a list with a number of tokens, or None, for each sample: {offsets!r}")
    wrong = [o for o in offsets if o is not None and (isinstance(o, bool) or not isinstance(o, int) or o < 0)]
    if wrong:
        raise ValueError(f"alora_offsets must be numbers of tokens from 0 on, or None, got {wrong[0]!r}")
    if samples is not None and len(offsets) != samples:
        raise ValueError(f"alora_offsets must have one entry a sample: got {len(offsets)} for {samples}")
    return list(offsets)


class ActivatedBatch(MixedBatch):
    """Adapters that are there for the last tokens of their samples.

    names: the adapter of each sample; offsets: of each sample, for how many tokens from the end it is there, None for
    none; None instead of the list: nowhere. `length`: of the prompt, when generating: where all tokens are computed
    again in each step, an offset counts from the prompt's end.
    """

    def __init__(
        self,
        adapters: Sequence[str],
        names: Sequence[str],
        offsets: Sequence[int | None] | None,
        length: int | None = None,
        repeats: int = 1,
        keys: Tensor | None = None,
        layer_of: dict[nn.Module, int] | None = None,
    ) -> None:
        super().__init__(names, repeats, keys, layer_of)
        self.adapters = list(adapters)
        self.offsets, self.length = offsets, length

    @property
    def by_token(self) -> bool:
        return True

    def of_rows(self, x: Tensor) -> list[int]:
        return self._of_tokens(x).tolist()

    def _of_tokens(self, x: Tensor) -> Tensor:
        T = x.shape[1] if x.dim() > 2 else 1
        if self.offsets is None:
            return torch.full((x.shape[:-1].numel(),), -1)
        number = {name: i for i, name in enumerate(self.adapters)} | {BASE: -1}
        more = max(0, T - self.length) if self.length is not None else 0
        active = torch.tensor([0 if offset is None else min(offset + more, T) for offset in self.offsets])
        adapter = torch.tensor([number[name] for name in self.names])  # type: ignore[index]
        numbers = torch.where(torch.arange(T) >= T - active[:, None], adapter[:, None], -1)
        times = self._times(x)
        return (numbers if times == 1 else numbers.repeat_interleave(times, 0)).flatten()

    def _new_segments(self, x: Tensor) -> Segments:
        segments = ops.segments_of_rows(self._of_tokens(x), len(self.adapters))
        if segments.order is None:
            return segments
        return segments._replace(order=segments.order.to(x.device, non_blocking=True))


class BesideBatch(ActivatedBatch):
    """For a model whose active adapters are meant: those that are there for all tokens are so in its layers, too."""

    def beside(self, layer: Any) -> list[str]:
        return [name for name in layer.adapters_in_effect() if name not in layer.invocations]


class InvokedLayer(ScaledLayer):
    """What a LoRA layer has to know of activated adapters: which they are, and that they cannot be merged."""

    may_be_invoked = False  # whether activated LoRA is for it
    is_invoked = False  # by a call with an adapter's own tokens alone

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.invocations: dict[str, list[int]] = {}  # by adapter

    def note_invocation(self, adapter_name: str, config: Any) -> None:
        tokens = invocation_of(config)
        if tokens is None:
            self.invocations.pop(adapter_name, None)
            return
        if not self.may_be_invoked:
            raise ValueError(
                "alora_invocation_tokens are for linear layers, and this is LoRA around a "
                f"{type(self.get_base_layer()).__name__}: leave it out of the targets"
            )
        self.invocations[adapter_name] = tokens

    def adapters_in_effect(self) -> list[str]:
        """Without activated ones, which a model hands its layers by their mixed_batch: a layer that is called itself
        knows of no invocation."""
        names = super().adapters_in_effect()
        if self.invocations and not self.is_invoked:
            return [name for name in names if name not in self.invocations]
        return names

    def why_activated(self) -> str | None:
        """What is said where an activated adapter is active."""
        names = [name for name in super().adapters_in_effect() if name in self.invocations]
        return f"{names[0]!r} is there from its invocation on" if names else None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name not in self.invocations and super().supports_lora_conversion(adapter_name)

    def adapters_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = super().adapters_to_merge(adapter_names)
        self._refuse_to_merge_invoked(names)
        return names

    def shifted_base(self, adapter_names: Sequence[str], sign: int = 1) -> Any:
        self._refuse_to_merge_invoked(adapter_names)
        return super().shifted_base(adapter_names, sign)

    def _refuse_to_merge_invoked(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.invocations:
                raise NotImplementedError(
                    f"adapter {name!r} has alora_invocation_tokens and cannot be merged: a weight is there for all "
                    "tokens. Keep it unmerged"
                )


@contextmanager
def invoked(layer: Any) -> Iterator[None]:
    """Within, the layer's adapters are there for all that it gets."""
    before = layer.is_invoked
    layer.is_invoked = True
    try:
        yield
    finally:
        layer.is_invoked = before
