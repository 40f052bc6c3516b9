"""PromptTuner: the life of prompts, under the names that BaseTuner has for the life of adapter layers.

Nothing is put into the base model: a PeftModel has the user's model as its `base_model`, and `prompt_encoder`, a
ModuleDict by adapter, beside it. What a task's head has (modules_to_save) is in the base model, as with every method.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.transaction import unchanged_on_error
from peft_fast.tuners.layer import AdapterHolder, BaseTunerLayer
from peft_fast.tuners.matching import embedding_of
from peft_fast.tuners.modules_to_save import find_modules_to_save, wrap_to_save
from peft_fast.tuners.names import check_adapter_name
from peft_fast.tuners.offload import home

from .cache import prefix_cache
from .encoder import BasePromptEncoder, submodules, total_virtual_tokens
from .inputs import refuse_checkpointing, takes_cache
from .sizes import fill_sizes, text_config


class PromptTuner:
    """A view of a PeftModel that learns prompts: what it knows is all in `owner`, and it is made when it is needed."""

    prefix = "prompt_encoder"

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    @classmethod
    def start(cls, owner: Any, model: nn.Module) -> None:
        """Give a PeftModel what it has before its first adapter."""
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "prompt learning cannot be mixed with adapters in the model's layers: call unload() on the model that "
                "has these, or take a new base model"
            )
        owner.base_model = model
        owner.prompt_encoder = nn.ModuleDict()
        owner.prompt_tokens = {}
        owner.transformer_backbone_name = backbone_name(model)
        owner.word_embeddings = word_embeddings(model)
        owner._prompt_configs = {}
        owner._active_prompts = []
        owner._adapters_disabled = False

    @property
    def model(self) -> nn.Module:
        return self.owner.base_model

    @property
    def peft_config(self) -> dict[str, Any]:
        return self.owner._prompt_configs

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.owner._prompt_configs = value

    @property
    def active_adapters(self) -> list[str]:
        return self.owner._active_prompts

    def activate(self, names: list[str]) -> None:
        """Take these prompts from now on, without a change of what is trainable."""
        self.owner._active_prompts = names

    def put_in(
        self, adapter_name: str, config: Any, autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False
    ) -> None:
        """Add a prompt; it is active and trainable if it is the first, and else neither.

        Prompts are fp32 and small: neither of the two options makes a difference, as in peft.
        Raises ValueError for what cannot be done, with model and config unchanged.
        """
        check_adapter_name(adapter_name, self.peft_config)
        config.check()
        first = not self.peft_config
        with unchanged_on_error(self.owner, config):
            encoder = self._new_encoder(config)
            names = config.modules_to_save
            paths = find_modules_to_save(self.model, names) if names else []
            for path in paths:
                wrap_to_save(self.model, path, adapter_name)
            if first:
                for parameter in self.model.parameters():
                    parameter.requires_grad_(False)
            self.owner.prompt_encoder[adapter_name] = encoder
            self.owner.prompt_tokens[adapter_name] = torch.arange(total_virtual_tokens(config))
            self.peft_config[adapter_name] = config
            for _, holder in self.holders():
                holder.enable_adapters(not self.owner._adapters_disabled)
            if first:
                self._set_active([adapter_name], config.inference_mode)
            else:
                self.set_requires_grad(adapter_name, False)

    def _new_encoder(self, config: Any) -> BasePromptEncoder:
        cls = encoder_class(config)
        if cls.is_prefix:
            refuse_checkpointing(self.model, now=False)
            _check_prefix(self.model, getattr(self.model, self.owner.transformer_backbone_name or "", self.model))
        embeddings = self.word_embeddings
        fill_sizes(config, self.model, embeddings, cls.is_prefix)
        config.num_transformer_submodules = submodules(config)
        config.check()
        return cls(config, embeddings).to(home(embeddings) or embeddings.weight.device)

    def stop_encoding(self, adapter_name: str) -> None:
        """Make room for a file's prompt, which an encoder has put out already: as Trainer loads the best one after
        training. What the encoder has learned is gone then, and the prompt cannot be trained any further."""
        if self.owner.prompt_encoder[adapter_name].is_plain:
            return
        config = self.peft_config[adapter_name]
        config.inference_mode = True
        self.owner.prompt_encoder[adapter_name] = self._new_encoder(config).requires_grad_(False)
        warnings.warn(
            f"the encoder of adapter {adapter_name!r} makes room for the prompt that the file has: it can be used, and "
            "not trained any further",
            stacklevel=3,
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a prompt. Was it the active one, the first that is left takes its place, with a warning."""
        self._check_known([adapter_name])
        for _, holder in self.holders():
            holder.delete_adapter(adapter_name)
        for by_name in (self.peft_config, self.owner.prompt_encoder, self.owner.prompt_tokens):
            del by_name[adapter_name]
        if adapter_name not in self.active_adapters:
            return
        left = list(self.peft_config)[:1]
        if left:
            warnings.warn(f"the active adapter {adapter_name!r} was deleted: {left[0]!r} is active now", stacklevel=3)
        self._set_active(left, inference_mode=bool(left) and self.peft_config[left[0]].inference_mode)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make a prompt the active one, trainable unless `inference_mode`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        if len(names) != 1:
            raise ValueError(f"one prompt can be active at a time, got {names}")
        self._set_active(names, inference_mode)

    def _set_active(self, names: list[str], inference_mode: bool) -> None:
        self.owner._active_prompts = names
        for _, holder in self.holders():
            holder.set_adapter(names, inference_mode)
        for name, encoder in self.owner.prompt_encoder.items():
            _train(encoder, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_known(names)
        for name in names:
            _train(self.owner.prompt_encoder[name], requires_grad)
            for _, holder in self.holders():
                holder.set_requires_grad(name, requires_grad)

    @contextmanager
    def disabled_adapters(self) -> Iterator[None]:
        before = self.owner._adapters_disabled
        self._switch(off=True)
        try:
            yield
        finally:
            self._switch(off=before)

    def _switch(self, off: bool) -> None:
        self.owner._adapters_disabled = off
        for _, holder in self.holders():
            holder.enable_adapters(not off)

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"adapter {unknown[0]!r} does not exist: there are {sorted(self.peft_config)}")

    @property
    def active(self) -> str:
        if not self.active_adapters:
            raise ValueError("no adapter is active: every one was deleted")
        return self.active_adapters[0]

    @property
    def config(self) -> Any:
        return self.peft_config[self.active]

    @property
    def encoder(self) -> Any:
        return self.owner.prompt_encoder[self.active]

    @property
    def word_embeddings(self) -> Any:
        """Those in use: the model's may have been resized since, or have a trained copy (modules_to_save)."""
        return embedding_of(self.model, "get_input_embeddings") or self.owner.word_embeddings

    def prompt(self, batch_size: int, task_ids: Tensor | None, cache: Any = None) -> Any:
        """The active prompt, [batch, tokens, token_dim]; a prefix as a cache of keys and values in the base model's
        dtype: a new one, or `cache`, which is empty."""
        prompts = self.encoder.prompt(batch_size, task_ids)
        if not self.encoder.is_prefix:
            return prompts
        return prefix_cache(self.model, self.config, prompts.to(getattr(self.model, "dtype", prompts.dtype)), cache)

    def _cast_to_float32(self, adapter_name: str) -> None:
        """Prompts are fp32 already."""

    def state_keys(self, adapter_name: str) -> dict[str, str]:
        """{key in the adapter's file: key in self.model.state_dict()} of modules that are trained whole."""
        self._check_known([adapter_name])
        return {
            f"{path}.{in_file}": f"{path}.{in_model}"
            for path, holder in self.holders()
            for in_file, in_model in holder.adapter_state_keys(adapter_name).items()
        }

    def prompt_keys(self, adapter_name: str) -> dict[str, str]:
        """{key in the adapter's file: name in the PeftModel} of the prompt, which is not in self.model."""
        own = self.owner.prompt_encoder[adapter_name].keys_to_load()
        return {key: f"prompt_encoder.{adapter_name}.{name}" for key, name in own.items()}

    def prompt_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """By their keys in the adapter's file."""
        return self.owner.prompt_encoder[adapter_name].tensors_to_save()

    def config_for_file(self, adapter_name: str) -> Any:
        return self.peft_config[adapter_name]

    def as_today(self, state_dict: Mapping[str, Any], prefix: str, adapter_name: str) -> Mapping[str, Any]:
        return self.owner.prompt_encoder[adapter_name].as_today(state_dict)

    def holders(self) -> Iterator[tuple[str, AdapterHolder]]:
        for path, module in self.model.named_modules():
            if isinstance(module, AdapterHolder):
                yield path, module

    def layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        """No layer of the model is adapted."""
        return iter(())


def encoder_class(config: Any) -> type[BasePromptEncoder]:
    from peft_fast.tuners import prompt_encoder_class  # the table has the methods, which import this package

    return prompt_encoder_class(config.peft_type)


def backbone_name(model: nn.Module) -> str | None:
    """The first child that is a whole transformers model: of a classifier, what is below its head."""
    for name, child in model.named_children():
        if any(cls.__name__ == "PreTrainedModel" for cls in type(child).__mro__):
            return name
    return None


def word_embeddings(model: nn.Module) -> nn.Module:
    """Raises ValueError for a model that does not say which module embeds its tokens."""
    found = embedding_of(model, "get_input_embeddings")
    if found is None:
        size = getattr(text_config(model), "vocab_size", None)
        tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == size)
        found = next(tables, None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no get_input_embeddings, and no embedding of config.vocab_size rows: prompts "
            "are for models of tokens"
        )
    return found


def _check_prefix(model: Any, backbone: Any) -> None:
    if not takes_cache(model, backbone):
        raise ValueError(
            f"{type(model).__name__} does not support past_key_values, which are what prefixes are: learn another kind "
            "of prompt"
        )


def _train(encoder: BasePromptEncoder, trainable: bool) -> None:
    for parameter in encoder.trained_parameters():
        parameter.requires_grad_(trainable)
