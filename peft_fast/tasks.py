"""PeftModel by task. A class here says what its forward takes: the Trainer reads that from the signature."""

from typing import Any

from torch import Tensor

from .model import PeftModel, refuse_mixed_batch


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters: `forward` is its model's."""

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
        if task_ids is not None:
            raise NotImplementedError("task_ids need multitask prompt tuning, which is not built yet: leave them out")
        refuse_mixed_batch(kwargs)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        # Not every model takes all of these (MPT has no inputs_embeds): what is not given is not passed on.
        return self.base_model(**{name: value for name, value in given.items() if value is not None}, **kwargs)
