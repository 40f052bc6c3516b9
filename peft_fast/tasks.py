"""PeftModel by task. A class here says what its forward takes: the Trainer reads that from the signature.

Not every model takes all of these (MPT has no inputs_embeds): what is not given is not passed on. The three classes for
labels also train and save the task's head, a layer that the base model has made anew and that no adapter can stand for.
"""

import warnings
from typing import Any

from torch import Tensor, nn

from .config import PeftConfig
from .model import PeftModel
from .tuners.modules_to_save import is_named
from .tuners.prompt_learning import generation
from .tuners.prompt_learning.inputs import call_encoder_decoder, call_with_prompt


class _WithLabels(PeftModel):
    """The forward of models that take tokens and labels."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return self._call_base_model(given, task_ids, kwargs)


class _Generating(PeftModel):
    """A model that generates."""

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        return self.base_model.prepare_inputs_for_generation

    def _generator(self) -> Any:
        if self._has_prompt:
            return generation.generating(self._tuner, self.prepare_inputs_for_generation)
        return super()._generator()

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The base model's inputs for a step of generating; those of the first have the prompt.

        transformers looks at the names of the arguments, to see whether embeddings and tasks can be given.
        """
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        if self._has_prompt:
            return self._prepare_with_prompt(*args, task_ids=task_ids, **kwargs)
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)

    def _prepare_with_prompt(self, *args: Any, task_ids: Tensor | None, **kwargs: Any) -> Any:
        raise NotImplementedError  # of the class that has prompts


class _WithHead(PeftModel):
    """A model whose head is trained and saved with each adapter, as if modules_to_save of its config named it.

    `cls_layer_name`: the path of the head in the base model; None, with a warning, where it has none of these names.
    """

    head_names: tuple[str, ...]
    cls_layer_name: str | None

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        head = self._find_head(model)
        given = self._name_head(peft_config, head)
        try:
            super().__init__(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        except BaseException:
            _restore(peft_config, given)
            raise
        self.cls_layer_name = head
        if head is None and isinstance(peft_config, PeftConfig):
            warnings.warn(
                f"{type(model).__name__} has no layer called {' or '.join(self.head_names)}: its head is not trained "
                "and not saved. Name it in modules_to_save",
                stacklevel=3,
            )

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained adapter, with a copy of the head of its own; neither is active until `set_adapter`."""
        given = self._name_head(peft_config, self.cls_layer_name)
        try:
            super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        except BaseException:
            _restore(peft_config, given)
            raise

    def _find_head(self, model: nn.Module) -> str | None:
        """The first layer that is called as a head, or else one whose name ends so (DistilBERT's pre_classifier)."""
        paths = [path for path, _ in model.named_modules()]
        exact = (path for path in paths if path.rpartition(".")[2] in self.head_names)
        return next(exact, None) or next((path for path in paths if is_named(path, self.head_names)), None)

    def _name_head(self, config: Any, head: str | None) -> Any:
        """Put the head into modules_to_save, without those that the model lacks; returns what was there before."""
        if not hasattr(config, "modules_to_save"):
            return None
        given = config.modules_to_save
        names = [name for name in given or () if head or name not in self.head_names]
        config.modules_to_save = list(dict.fromkeys([*names, *(self.head_names if head else ())])) or None
        return given


def _restore(config: Any, modules_to_save: Any) -> None:
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = modules_to_save


class _Classifier(_WithHead, _WithLabels):
    head_names = ("classifier", "score")

    def _call_with_prompt(self, inputs: dict[str, Any], task_ids: Any) -> Any:
        return call_with_prompt(self._tuner, inputs, task_ids, token_types=True)


class PeftModelForSequenceClassification(_Classifier):
    """A sequence classifier with adapters. See PeftModel for the arguments.

    config: the base model's. cls_layer_name: where its classifier is, which is trained and saved with each adapter; one
    that is called neither `classifier` nor `score` has to be named in modules_to_save.
    """


class PeftModelForTokenClassification(_Classifier):
    """A token classifier with adapters: as PeftModelForSequenceClassification, with labels [batch, tokens]."""

    def _call_with_prompt(self, inputs: dict[str, Any], task_ids: Any) -> Any:
        return call_with_prompt(self._tuner, inputs, task_ids, labels=True, token_types=True)


class PeftModelForQuestionAnswering(_WithHead):
    """A model for extractive question answering with adapters. See PeftModel for the arguments.

    config: the base model's. cls_layer_name: where its `qa_outputs` are, which are trained and saved with each adapter.
    `token_type_ids` and `position_ids` do not reach the base model, in peft neither: an adapter that was trained there
    has never seen them. That is warned of; where no prompt is learned, `model.base_model(...)` takes them.
    After a prompt that is no prefix, positions are counted from the prompt's first token, in what the model puts out
    and in what it is trained with, as in peft.
    """

    head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        places = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        if left_out := [name for name, value in places.items() if value is not None]:
            warnings.warn(
                f"{' and '.join(left_out)} are left out, as in peft, so that its adapters give the same answers here"
                + ("" if self._is_prompt_learning else ": call model.base_model(...) with them"),
                stacklevel=2,
            )
        return self._call_base_model(given, task_ids, kwargs)

    def _call_with_prompt(self, inputs: dict[str, Any], task_ids: Any) -> Any:
        return call_with_prompt(self._tuner, inputs, task_ids)


class PeftModelForCausalLM(_Generating, _WithLabels):
    """A causal language model with adapters: `forward` and `generate` are its model's."""

    _finds_invocations = True

    def _call_with_prompt(self, inputs: dict[str, Any], task_ids: Any) -> Any:
        return call_with_prompt(self._tuner, inputs, task_ids, labels=True)

    def _prepare_with_prompt(self, *args: Any, task_ids: Tensor | None, **kwargs: Any) -> Any:
        return generation.prepare_decoder_inputs(self._tuner, *args, task_ids=task_ids, **kwargs)


class PeftModelForSeq2SeqLM(_Generating):
    """An encoder-decoder language model with adapters: `forward` and `generate` are its model's."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return self._call_base_model(given, task_ids, kwargs)

    def _call_with_prompt(self, inputs: dict[str, Any], task_ids: Any) -> Any:
        return call_encoder_decoder(self._tuner, inputs, task_ids)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if self._has_prompt:
            args, kwargs = generation.encoder_inputs(self._tuner, args, kwargs)
        return super().generate(*args, **kwargs)

    def _prepare_with_prompt(self, *args: Any, task_ids: Tensor | None, **kwargs: Any) -> Any:
        return generation.prepare_encoder_decoder_inputs(self._tuner, *args, **kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """A model for hidden states and embeddings with adapters; it has no head. `config` is the base model's."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return self._call_base_model(given, task_ids, kwargs)

    def _call_with_prompt(self, inputs: dict[str, Any], task_ids: Any) -> Any:
        return call_with_prompt(self._tuner, inputs, task_ids)
