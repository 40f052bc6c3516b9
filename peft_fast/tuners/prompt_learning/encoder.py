"""BasePromptEncoder: the trained part of a prompt. The methods' encoders are its subclasses."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.config import PromptLearningConfig
from peft_fast.peft_types import TaskType


class BasePromptEncoder(nn.Module):
    """Turns the indices of virtual tokens into what stands for them in the model.

    A method's encoder makes `embedding` (one row for each virtual token) and whatever computes on it. Files have what
    comes out of that; so where a file is to be loaded (`config.inference_mode`), the embedding is all: `is_plain`.
    """

    embedding: nn.Embedding
    is_prefix = False  # whether the prompt is keys and values of the attention layers, and not inputs
    tied_to_tasks = False  # whether there is a prompt for each of several tasks (task_ids)
    is_plain = True  # whether the embedding's rows are the prompt

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()

    def forward(self, indices: Tensor) -> Tensor:
        """indices [batch, tokens] -> [batch, tokens, size]"""
        return self.embedding(indices)

    def indices(self) -> Tensor:
        """All of them, [1, tokens]."""
        return torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)[None]

    def prompt(self, batch_size: int, task_ids: Tensor | None) -> Tensor:
        """[batch, tokens, size]: computed for one sample, and repeated."""
        return self(self.indices()).repeat(batch_size, 1, 1)

    def call(self, base_model: nn.Module, inputs: dict[str, Any], config: Any) -> Any:
        """The base model's answer to inputs that the prompt is in."""
        return base_model(**inputs)

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        return self.parameters()

    @torch.no_grad()
    def embedding_to_save(self) -> Tensor:
        """[tokens, size] on the CPU, without dropout."""
        training = self.training
        try:
            return self.eval()._embedding_to_save().cpu()
        finally:
            self.train(training)

    def _embedding_to_save(self) -> Tensor:
        return self(self.indices())[0]

    def tensors_to_save(self) -> dict[str, Tensor]:
        """By their keys in a file."""
        return {"prompt_embeddings": self.embedding_to_save()}

    def keys_to_load(self) -> dict[str, str]:
        """{key in a file: name in this module}. Raises ValueError for an encoder that a file's prompt came out of."""
        if not self.is_plain:
            raise ValueError(
                "a file has the prompt that an encoder put out, and not the encoder, so that training cannot go on "
                "from it: load it into an adapter whose config has inference_mode=True, as from_pretrained does"
            )
        return {"prompt_embeddings": "embedding.weight"}

    def as_today(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        return state_dict  # a file's tensors by the keys of `keys_to_load`

    @staticmethod
    def check_prompt(prompt: Any, weight: Tensor) -> None:
        """Raise ValueError for what cannot be copied into `weight`."""
        if not isinstance(prompt, Tensor) or prompt.shape != weight.shape:
            got = tuple(prompt.shape) if isinstance(prompt, Tensor) else prompt
            raise ValueError(f"prompt_embeddings must be a tensor {tuple(weight.shape)}, got {got!r}")

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        """Raise ValueError where prompts as `config` wants them cannot be those of a file with these tensors."""
        config.check()
        prompts = tensors.get("prompt_embeddings")
        if not isinstance(prompts, Tensor) or prompts.ndim != 2:
            raise ValueError(
                "the file is no learned prompt: it must have a matrix prompt_embeddings, got "
                f"{tuple(prompts.shape) if isinstance(prompts, Tensor) else prompts!r} among {sorted(tensors)[:3]}"
            )
        rows, columns = cls.embedding_shape(config)
        if rows != prompts.shape[0] or columns not in (None, prompts.shape[1]):
            raise ValueError(
                f"the file's prompt_embeddings are {tuple(prompts.shape)}, and its config wants {(rows, columns)}: "
                "num_virtual_tokens, token_dim and num_layers are not those that it was trained with"
            )

    @classmethod
    def embedding_shape(cls, config: Any) -> tuple[int, int | None]:
        """Rows and columns of what is saved; None for columns that the config leaves to the base model."""
        return total_virtual_tokens(config), config.token_dim


def submodules(config: PromptLearningConfig) -> int:
    given = config.num_transformer_submodules
    return given if given is not None else 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1


def total_virtual_tokens(config: Any) -> int:
    return config.num_virtual_tokens * submodules(config)
