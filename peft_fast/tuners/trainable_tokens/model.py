"""TrainableTokensModel: rows of tokens as a method of its own."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.matching import resolved_targets
from peft_fast.tuners.options import check_rank_fits
from peft_fast.tuners.tied import embedding_path, is_tied, tied_paths

from .layer import TrainableTokensLayer


class TrainableTokensModel(BaseTuner):
    """`model` whose embedding has rows that are trained. Where other layers share its weight, they share the rows."""

    prefix = "trainable_tokens_"
    target_module_mapping: Mapping[str, list[str] | str] = {}
    minds_ties = False

    def _resolved_targets(self, config: Any) -> set[str] | str:
        if config.target_modules is None:
            return embedding_path(self.model) or "embed_tokens"
        return resolved_targets(self.model, config.target_modules, {})

    def before_layers(self, adapter_name: str, config: Any, paths: list[str]) -> None:
        if not config.token_indices:
            raise ValueError("token_indices must be one or more ids of tokens, got []: their rows are what is trained")

    def steps(self, paths: list[str], config: Any) -> Iterable[str]:
        """The layers that share the embedding's weight come last: their rows are the embedding's."""
        tied = self._tied(paths)
        return [*(path for path in paths if path not in tied), *tied]

    def _tied(self, paths: Iterable[str]) -> list[str]:
        return tied_paths(self.model) if is_tied(self.model) and str(embedding_path(self.model)) in paths else []

    def adapt(self, target: nn.Module, path: str, adapter_name: str, config: Any) -> nn.Module:
        at = embedding_path(self.model)
        source = None if at is None else self.model.get_submodule(at)
        # Once the embedding itself is adapted, so is what shares its weight.
        follows = is_tied(self.model) and isinstance(source, TrainableTokensLayer) and path in tied_paths(self.model)
        if not isinstance(target, TrainableTokensLayer):
            options = {"token_indices": config.token_indices, "init_weights": config.init_weights}
            return TrainableTokensLayer(target, adapter_name, tied_adapter=source if follows else None, **options)
        if follows and target.tied_adapter is None:
            raise ValueError(
                f"{path} shares the weight of the input embedding and has adapters with rows of their own, and the new "
                "one's would be the embedding's: delete them first, or name the same target_modules"
            )
        target.update_layer(adapter_name, config.token_indices, config.init_weights)
        return target

    def state_keys(self, adapter_name: str) -> dict[str, str]:
        """Under every name of the layers, those that share their rows too: as in peft's files."""
        self._check_known([adapter_name])
        return {
            f"{path}.{in_file}": f"{path}.{in_model}"
            for path, layer in self.model.named_modules(remove_duplicate=False)
            if isinstance(layer, TrainableTokensLayer)
            for in_file, in_model in layer.own_state_keys(adapter_name).items()
        }

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        """With the rows under every name. Raises ValueError where layers that share them have others."""
        found, by_rows = dict(state_dict), dict[int, list[str]]()
        for key, name in self.state_keys(adapter_name).items():
            path = name.rpartition(".trainable_tokens_delta.")[0]
            layer: Any = self.model.get_submodule(path)
            by_rows.setdefault(id(layer.trainable_tokens_delta[adapter_name]), []).append(prefix + key)
        for keys in by_rows.values():
            values = [found[key] for key in keys if isinstance(found.get(key), Tensor)]
            if any(value.shape != values[0].shape or not torch.equal(value, values[0]) for value in values[1:]):
                raise ValueError(f"{' and '.join(keys)} are the same rows, and the file has several values for them")
            found |= dict.fromkeys(keys, values[0]) if values else {}
        return found

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        check_rank_fits([len(config.token_indices)], tensors)
