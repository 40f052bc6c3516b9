"""Merging adapters into the base weights and taking them out again, for all layers of a model together: the part of
BaseTuner that is about it."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .layer import AdapterHolder, BaseTunerLayer
from .merge_16bit import merge_to_16bit
from .modules_to_save import ModulesToSaveWrapper
from .names import list_of_names
from .tied import note_untied, warn_of_merging
from .trainable_tokens.wrapper import TrainableTokensWrapper


class Merging(nn.Module):
    """What it takes of BaseTuner, which inherits from it, is declared here."""

    model: Any
    active_adapters: list[str]
    _check_known: Any
    _replace: Any
    _allow_repacking: Any
    minds_ties: bool

    def holders(self) -> Iterator[tuple[str, AdapterHolder]]:
        raise NotImplementedError

    def layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        raise NotImplementedError

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, progressbar: bool = False
    ) -> None:
        """Merge adapters (the active ones unless named) into the base weights, keeping them for `unmerge_adapter`.

        With `safe_merge` every layer is tried before any is changed: a ValueError leaves all weights as they were.
        k-bit layers, which cannot hold inf and NaN, are tried always.
        """
        self._merge(adapter_names, safe_merge, progressbar, undoable=True)

    def _merge(self, adapter_names: Sequence[str] | None, safe_merge: bool, progressbar: bool, undoable: bool) -> None:
        self._check_known(list_of_names("adapter_names", adapter_names or []))
        if self.minds_ties:
            warn_of_merging(self.model)
        plans = [(path, layer, layer.adapters_to_merge(adapter_names)) for path, layer in self.layers()]
        for path, layer, names in plans:
            if (safe_merge or layer.is_kbit) and (problem := layer.merge_problem(names)):
                raise ValueError(f"{path}: {problem}")
        # Inner layers first (a mixed model): a rotation around other adapters turns these too.
        for _, layer, names in tqdm(reversed(plans), desc="merging", total=len(plans), disable=not progressbar):
            layer.add_to_base(names, undoable)

    def unmerge_adapter(self) -> None:
        """Take what is merged out of the base weights again. Warns where nothing is."""
        if not any(layer.merged for _, layer in self.layers()):
            warnings.warn("no adapter is merged: there is nothing to unmerge", stacklevel=2)
        self._unmerge()

    def _unmerge(self) -> None:
        for _, layer in self.layers():
            if layer.merged:
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with the adapters (the active ones unless named) merged in, and none of our layers left.

        Of a module in modules_to_save the copy of these adapters stays. Raises ValueError where two of them have one.
        """
        names = self._names_to_merge(adapter_names)
        self._merge(adapter_names, safe_merge, progressbar, undoable=False)
        model = self._unload(names)
        note_untied(model)
        return model

    def merge_to_16bit(
        self, dtype: torch.dtype = torch.bfloat16, adapter_names: Sequence[str] | None = None, progressbar: bool = True
    ) -> nn.Module:
        """The base model as a plain one of `dtype`, bf16 or fp16, with the adapters (the active ones unless named)
        merged in; for k-bit models: nothing is quantised again.

        Every weight is the fp32 sum of the exact base weight and the adapters, rounded once. k-bit layers become
        nn.Linear, or transformers' Conv1D where they came from one; norms and embeddings are cast. `save_pretrained`
        writes the result without a quantization_config, and `from_pretrained` loads it. Takes 2 bytes a weight beside
        the k-bit model, which is kept until the end: a ValueError (a dtype or a model that this is not for, a broken
        adapter) or running out of memory leaves everything as it was.
        """
        merge_to_16bit(self.model, self._names_to_merge(adapter_names), dtype, progressbar)
        self._allow_repacking()
        return self.model

    def _names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        """These adapters (None: the active ones) and those merged already; ValueError where they exclude each other."""
        wanted = self.active_adapters if adapter_names is None else list_of_names("adapter_names", adapter_names)
        self._check_known(wanted)
        names = list(dict.fromkeys([*wanted, *(n for _, layer in self.layers() for n in layer.merged_adapters)]))
        for _, holder in self.holders():
            holder.check_set_adapter(names)
        return names

    def unload(self) -> nn.Module:
        """The base model as it was before, without any of our layers; merged adapters are unmerged first, with a
        warning."""
        if any(layer.merged for _, layer in self.layers()):
            warnings.warn(
                "unload() gives the base model as it was: merged adapters are unmerged. merge_and_unload() keeps them",
                stacklevel=2,
            )
        self._unmerge()
        return self._unload([])

    def _unload(self, with_copies_of: Sequence[str]) -> nn.Module:
        # From the inside out: the path of what lies in a layer is gone with the layer.
        for path, holder in reversed(list(self.model.named_modules(remove_duplicate=False))):
            if isinstance(holder, BaseTunerLayer):
                self._replace(path, holder.base_layer)
            elif isinstance(holder, ModulesToSaveWrapper):
                self._replace(path, holder.module_of(with_copies_of))
            elif isinstance(holder, TrainableTokensWrapper):
                self._replace(path, holder.token_adapter)  # which is the layer itself by now
        self._allow_repacking()
        return self.model
