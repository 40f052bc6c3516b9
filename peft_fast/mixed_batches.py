"""PeftModel's part of batches of several adapters: who may be named, and training them together.

model(..., adapter_names=["a", "b", "__base__"])       outputs, as in peft
model.enable_mixed_batch_training()                    and gradients: in peft an error
"""

import functools
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .peft_types import PeftType
from .tuners.layer import BaseTunerLayer
from .tuners.lora.activated import ActivatedBatch, BesideBatch, checked_offsets, invocation_of, offsets_for
from .tuners.mixed_batch import MixedBatch, TokenAdapters, adapters_of, repeats_of, within


class MixedBatchTraining:
    """What training several adapters in one batch keeps: of each a random generator of its own, a seed and a count, so
    that its dropout does not depend on which others are in the batch."""

    def __init__(self, adapters: Sequence[str], seeds: Mapping[str, int]) -> None:
        self.adapters = list(adapters)
        self.seeds = dict(seeds)
        self.counts = dict.fromkeys(adapters, 0)

    def join(self, adapter: str, seed: int, count: int = 0) -> None:
        """Have another adapter trained too; `count`: the forwards that it has been trained for already."""
        self.adapters.append(adapter)
        self.seeds[adapter], self.counts[adapter] = seed, count

    def leave(self, adapter: str) -> None:
        self.adapters.remove(adapter)
        del self.seeds[adapter], self.counts[adapter]

    def keys(self, adapters: Sequence[str], paths: Sequence[str], device: torch.device) -> Tensor:
        """int32 [layers, adapters, 2] for one forward: of the adapters' next numbers, and the layers' paths."""
        step = []
        for name in adapters:
            step.append(_two_words(f"{self.seeds[name]}/{self.counts[name]}"))
            self.counts[name] += 1
        step += [(0, 0)] * (len(step) % 2)  # each layer's keys begin at a multiple of 16 bytes: see dropout.new_keys
        of_step = torch.tensor(step, dtype=torch.int32).view(-1, 2).to(device, non_blocking=True)
        return (of_step ^ _of_layers(tuple(paths), device))[:, : len(adapters)]


@functools.lru_cache(maxsize=16)
def _of_layers(paths: tuple[str, ...], device: torch.device) -> Tensor:
    """int32 [layers, 1, 2]"""
    return torch.tensor([_two_words(path) for path in paths], dtype=torch.int32).view(-1, 1, 2).to(device)


def _two_words(text: str) -> tuple[int, int]:
    """Two int32, as random as the text is particular."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))  # type: ignore[return-value]


class MixedBatches:
    """The methods of PeftModel."""

    base_model: Any
    peft_type: Any
    training: bool
    _mixed_training: MixedBatchTraining | None = None
    _finds_invocations = False  # of activated adapters, in input_ids: where the task is CAUSAL_LM

    def enable_mixed_batch_training(
        self, adapter_names: Sequence[str] | None = None, seeds: Mapping[str, int] | None = None
    ) -> None:
        """Let `adapter_names=[...]` be given in training mode, and train these adapters (all, unless named).

        Each sample trains the adapter that is named for it, as if this had a batch for itself: outputs and gradients
        are those of separate batches, up to rounding, dropout included. For a loss of each adapter's own, take the mean
        over its own samples and add these up. `seeds`: of each adapter's dropout; by default made from torch's seed and
        the adapter's name. Raises ValueError for adapters that do not exist or are no LoRA.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list of the adapters to train, got {adapter_names!r}")
        holders = self._holders()
        names = list(self.base_model.peft_config if adapter_names is None else dict.fromkeys(adapter_names))
        self._check_mixed(names, holders)
        seeds = dict(seeds or {})
        unknown = [name for name in [*seeds] if name not in names]
        if unknown:
            raise ValueError(f"seeds are for the adapters {names}, got one for {unknown[0]!r}")
        own = {name: seeds.get(name, _two_words(f"{torch.initial_seed()}/{name}")[0]) for name in names}
        self._mixed_training = MixedBatchTraining(names, own)
        self.base_model.set_requires_grad(names, True)

    def disable_mixed_batch_training(self) -> None:
        """Train the active adapters only, and refuse adapter_names in training mode, as peft does."""
        self._mixed_training = None
        active = self.base_model.active_adapters
        for name, config in self.base_model.peft_config.items():
            self.base_model.set_requires_grad([name], name in active and not config.inference_mode)

    def _keep_mixed_training(self, deleted: str | None = None) -> None:
        """After another adapter was made active or one was deleted: those that are trained together stay trainable,
        and what is deleted is not among them any more."""
        training = self._mixed_training
        if training is None:
            return
        if deleted in training.adapters:
            training.leave(deleted)  # type: ignore[arg-type]
        self.base_model.set_requires_grad(training.adapters, True)

    @contextmanager
    def _mixed_batch(self, kwargs: dict[str, Any], inputs: Tensor | None = None, generating: bool = False) -> Iterator:
        """Take adapter_names and alora_offsets out of a call's arguments; within, the model's layers go by them.

        `inputs`: the ids of the tokens, in which activated adapters' invocations are looked for.
        """
        names, offsets = kwargs.pop("adapter_names", None), kwargs.pop("alora_offsets", None)
        if names is None:
            with self._activated(kwargs, offsets, inputs, generating):
                yield
            return
        with self._counts_kept_on_error(), self._named(names, offsets, kwargs, inputs, generating):
            yield

    @contextmanager
    def _named(
        self, names: Any, offsets: Any, kwargs: Mapping[str, Any], inputs: Tensor | None, generating: bool
    ) -> Iterator[None]:
        """Within, the model's layers go by these adapter_names."""
        if isinstance(names, str) or not isinstance(names, Sequence | TokenAdapters):
            raise TypeError(f"adapter_names must be a list with a name for each sample, got {names!r}")
        holders = self._holders()
        adapters = adapters_of(names)
        self._check_mixed(adapters, holders)
        batch = self._new_batch(names, holders, self._repeats(kwargs))
        invoked = [name for name in adapters if invocation_of(self.base_model.peft_config[name])]
        if offsets is not None and (batch.by_token or not invoked):
            why = "are by token already" if batch.by_token else f"name none with alora_invocation_tokens: {adapters}"
            raise ValueError(f"alora_offsets are for activated adapters, and adapter_names {why}")
        if not invoked:
            batch.note_alone(inputs)
        with within(self.base_model, list(holders.values()), batch):
            if batch.by_token or not invoked:
                yield
                return
            offsets = self._offsets(list(names), offsets, inputs)  # type: ignore[arg-type]
            linear = [layer for layer in holders.values() if getattr(layer, "may_be_invoked", False)]
            length = inputs.shape[-1] if generating and inputs is not None else None
            by_token = ActivatedBatch(adapters, names, offsets, length, batch.repeats, *batch.randomness)  # type: ignore[arg-type]
            with within(self.base_model, linear, by_token):
                yield

    @contextmanager
    def _counts_kept_on_error(self) -> Iterator[None]:
        """A forward that raises draws no dropout: the next one has the masks that it would have had."""
        training = self._mixed_training
        counts = {} if training is None else dict(training.counts)
        try:
            yield
        except BaseException:
            if training is not None:
                training.counts.update(counts)
            raise

    @contextmanager
    def _activated(
        self, kwargs: Mapping[str, Any], offsets: Any, inputs: Tensor | None, generating: bool
    ) -> Iterator[None]:
        """Within, the active adapter is there from its invocation on, if it is one that is invoked."""
        is_lora = self.peft_type == PeftType.LORA  # of learned prompts base_model is the model itself
        active = self.base_model.active_adapters if is_lora else ()
        names = [name for name in active if invocation_of(self.base_model.peft_config[name])]
        if not names:
            if offsets is not None:
                raise ValueError("alora_offsets are for adapters with alora_invocation_tokens, and none such is active")
            yield
            return
        if len(names) > 1:
            raise ValueError(
                f"of adapters with alora_invocation_tokens one can be active at a time, got {names}: see adapter_names"
            )
        if inputs is not None:
            samples = len(torch.atleast_2d(inputs))
        else:
            samples = 0 if offsets is None else len(checked_offsets(offsets, None))
        of_samples = names * samples
        found = self._offsets(of_samples, offsets, inputs)
        layers = [
            layer
            for _, layer in self.base_model.layers()
            if names[0] in getattr(layer, "invocations", ()) and not layer.merged and not layer.disable_adapters
        ]
        length = inputs.shape[-1] if generating and inputs is not None else None
        with within(self.base_model, layers, BesideBatch(names, of_samples, found, length, self._repeats(kwargs))):
            yield

    def _offsets(self, names: Sequence[str], given: Any, inputs: Tensor | None) -> list[int | None] | None:
        """Of each sample: how many tokens from the end its adapter is there; None where that is not known."""
        if given is not None:
            given = checked_offsets(given, len(names))
        elif not self._finds_invocations:
            return None
        elif inputs is None:
            warnings.warn(
                "the invocations of activated adapters are looked for in input_ids, and there are none: the adapters "
                "are not there. Give alora_offsets",
                stacklevel=5,
            )
            return None
        ids = torch.empty(0) if inputs is None else torch.atleast_2d(inputs)
        return offsets_for(self.base_model.peft_config, names, ids, given)

    def _repeats(self, kwargs: Mapping[str, Any]) -> int:
        return repeats_of(kwargs, getattr(self.base_model.model, "generation_config", None))

    def _new_batch(self, names: Any, holders: Mapping[str, Any], repeats: int) -> MixedBatch:
        training = self._mixed_training
        if not self.training:
            return MixedBatch(names, repeats)
        if training is None:
            raise ValueError(
                "adapter_names cannot be given in training mode: call model.eval(), or, to train several adapters in "
                "one batch, model.enable_mixed_batch_training()"
            )
        adapters = adapters_of(names)
        left_out = [name for name in adapters if name not in training.adapters]
        if left_out:
            raise ValueError(
                f"adapter {left_out[0]!r} is not among those that are trained together, {training.adapters}: name it "
                "in enable_mixed_batch_training, or call model.eval()"
            )
        tuned = {path: layer for path, layer in holders.items() if isinstance(layer, BaseTunerLayer)}
        device = next(iter(layer.weight.device for layer in tuned.values()), torch.device("cpu"))
        keys = training.keys(adapters, list(tuned), device)
        return MixedBatch(names, repeats, keys, {layer: i for i, layer in enumerate(tuned.values())})

    def _holders(self) -> dict[str, Any]:
        """Everything that has adapters, by its path."""
        if self.peft_type != "LORA":
            raise ValueError(f"only LoRA adapters can be mixed in one batch, got {PeftType(self.peft_type).value}")
        return dict(self.base_model.holders())

    def _check_mixed(self, adapters: Sequence[str], holders: Mapping[str, Any]) -> None:
        """Raise ValueError or TypeError where these adapters cannot be in one batch."""
        unknown = sorted(name for name in adapters if name not in self.base_model.peft_config)
        if unknown:
            known = ", ".join(map(repr, [*self.base_model.peft_config, "__base__"]))
            raise ValueError(f"adapter_names has adapters that do not exist: {', '.join(unknown)}; there are {known}")
        for path, layer in holders.items():
            if not isinstance(layer, BaseTunerLayer):
                continue
            if layer.merged:
                raise ValueError(
                    f"adapter_names cannot be given while adapters are merged, as {layer.merged_adapters} into {path}: "
                    "call unmerge_adapter first"
                )
            if layer.why_not_mixed is not None and any(layer.has_adapter(name) for name in adapters):
                raise TypeError(f"{path} cannot have a batch of several adapters: {layer.why_not_mixed}")
