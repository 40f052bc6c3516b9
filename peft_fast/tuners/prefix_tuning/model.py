"""PrefixEncoder."""

from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners.prompt_learning.encoder import BasePromptEncoder


class PrefixEncoder(BasePromptEncoder):
    """Indices [batch, tokens] -> keys and values of all layers [batch, tokens, layers * 2 * token_dim].

    embedding: they themselves, or, with prefix_projection in training, what `transform`, an MLP, makes them from.
    """

    is_prefix = True

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config)
        self.prefix_projection = config.prefix_projection
        self.is_plain = config.inference_mode or not config.prefix_projection
        size = config.num_layers * 2 * config.token_dim
        if self.is_plain:
            self.embedding = nn.Embedding(config.num_virtual_tokens, size)
            last: nn.Module = self.embedding
        else:
            self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
            self.transform = nn.Sequential(
                nn.Linear(config.token_dim, config.encoder_hidden_size),
                nn.Tanh(),
                nn.Linear(config.encoder_hidden_size, size),
            )
            last = self.transform[-1]
        if config.init_weights == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, indices: Tensor) -> Tensor:
        embedded = self.embedding(indices)
        return embedded if self.is_plain else self.transform(embedded)

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Set the keys and values, [tokens, layers * 2 * token_dim]. Raises ValueError for another shape, and where an
        MLP makes them."""
        if not self.is_plain:
            raise ValueError(
                "with prefix_projection=True an MLP makes the keys and values, and they cannot be set: use "
                "prefix_projection=False"
            )
        self.check_prompt(prompt_embeddings, self.embedding.weight)
        self.embedding.weight.copy_(prompt_embeddings)

    @classmethod
    def embedding_shape(cls, config: Any) -> tuple[int, int | None]:
        sizes = (config.num_layers, config.token_dim)
        return config.num_virtual_tokens, None if None in sizes else 2 * sizes[0] * sizes[1]
