"""CartridgeEncoder."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners.prompt_learning.encoder import BasePromptEncoder

KEY = "prompt_embeddings"  # in a file: both parts as one
PARTS = ("frozen_embedding", "trainable_embedding")


class CartridgeEncoder(BasePromptEncoder):
    """Keys and values of all layers, [tokens, layers * 2 * token_dim]: the first num_frozen_tokens as
    `frozen_embedding`, None where there are none, and the others as `trainable_embedding`."""

    is_prefix = True

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config)
        self.num_frozen_tokens = config.num_frozen_tokens
        self.num_trainable_tokens = config.num_virtual_tokens - config.num_frozen_tokens
        size = config.num_layers * 2 * config.token_dim
        frozen = torch.empty(self.num_frozen_tokens, size).normal_() if self.num_frozen_tokens else None
        self.frozen_embedding = None if frozen is None else nn.Parameter(frozen, requires_grad=False)
        trained = torch.empty(self.num_trainable_tokens, size).normal_()
        self.trainable_embedding = nn.Parameter(trained, requires_grad=not config.inference_mode)

    @property
    def weight(self) -> Tensor:
        """All of them, under autograd."""
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    @property
    def embedding(self) -> "CartridgeEncoder":  # type: ignore[override]
        return self  # whose `weight` stands where that of other encoders' embedding does

    def indices(self) -> Tensor:
        tokens = self.num_frozen_tokens + self.num_trainable_tokens
        return torch.arange(tokens, device=self.trainable_embedding.device)[None]

    def forward(self, indices: Tensor) -> Tensor:
        """indices [batch, tokens]: all of them, whatever they are -> [batch, tokens, layers * 2 * token_dim]"""
        return self.weight.expand(len(indices), -1, -1)

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        return [self.trainable_embedding]

    def keys_to_load(self) -> dict[str, str]:
        return {f"{KEY}.{name}": name for name in PARTS if getattr(self, name) is not None}

    def as_today(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the two parts apart."""
        value = state_dict.get(KEY)
        if not isinstance(value, Tensor) or value.ndim != 2:
            return state_dict
        parts = dict(zip(PARTS, (value[: self.num_frozen_tokens], value[self.num_frozen_tokens :])))
        kept = {key: other for key, other in state_dict.items() if key != KEY}
        return kept | {f"{KEY}.{name}": part for name, part in parts.items() if getattr(self, name) is not None}

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Set both parts, frozen and trained. Raises ValueError for another shape, with nothing changed."""
        self.check_prompt(prompt_embeddings, self.weight)
        if self.frozen_embedding is not None:
            self.frozen_embedding.copy_(prompt_embeddings[: self.num_frozen_tokens])
        self.trainable_embedding.copy_(prompt_embeddings[self.num_frozen_tokens :])

    @classmethod
    def embedding_shape(cls, config: Any) -> tuple[int, int | None]:
        sizes = (config.num_layers, config.token_dim)
        return config.num_virtual_tokens, None if None in sizes else 2 * sizes[0] * sizes[1]
