"""What a PeftModel has where prompts are learned. The work is done in tuners/prompt_learning."""

from typing import Any

from torch import Tensor, nn

from .config import PeftConfig
from .peft_types import PeftType
from .tuners.prompt_learning import PromptTuner


class LearnsPrompts(nn.Module):
    """A part of PeftModel.

    As in peft: `prompt_encoder`, a ModuleDict by adapter; `prompt_tokens`, the indices of the virtual tokens by
    adapter; `word_embeddings`, the model's; `transformer_backbone_name`, the name of what is below its head.
    """

    _is_prompt_learning = False
    _adapters_disabled: bool
    _tuner: Any
    prompt_encoder: Any
    peft_type: Any
    get_base_model: Any

    def _learn_prompts(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str) -> None:
        if type(self)._call_with_prompt is LearnsPrompts._call_with_prompt:
            raise ValueError(
                "a prompt is put into the inputs of a task's model: prompt learning needs task_type in its config, or "
                f"one of the PeftModelFor... classes, got task_type={peft_config.task_type!r}"
            )
        self._is_prompt_learning = True
        PromptTuner.start(self, model)
        self._tuner.put_in(adapter_name, peft_config)

    @property
    def _has_prompt(self) -> bool:
        return self._is_prompt_learning and not self._adapters_disabled

    def _call_with_prompt(self, inputs: dict[str, Any], task_ids: Any) -> Any:
        raise NotImplementedError  # the tasks' classes say where the prompt goes

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The active adapter's prompt for a batch: [batch, tokens, token_dim]; a prefix as a cache of transformers.

        task_ids: [batch], for prompts of several tasks. max_cache_len: for caches of fixed length, which transformers
        once needed here; today's grow. Raises AttributeError for methods that learn no prompts.
        """
        if not self._is_prompt_learning:
            raise AttributeError(self._no_prompts("get_prompt"))
        return self._tuner.prompt(batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The tensor that is saved of a learned prompt, on the CPU: [tokens, token_dim], of a prefix [tokens, layers *
        2 * token_dim]. Raises AttributeError for methods that learn none."""
        if not self._is_prompt_learning:
            raise AttributeError(self._no_prompts("get_prompt_embedding_to_save"))
        self._tuner._check_known([adapter_name])
        return self.prompt_encoder[adapter_name].embedding_to_save()

    def _no_prompts(self, method: str) -> str:
        return (
            f"{method} is for prompt learning: {type(self.get_base_model()).__name__!r} object has no attribute "
            f"'prompt_encoder', its adapters are {PeftType(self.peft_type).value}"
        )
