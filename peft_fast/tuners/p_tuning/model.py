"""PromptEncoder."""

import warnings
from typing import Any

from torch import Tensor, nn

from peft_fast.tuners.prompt_learning.encoder import BasePromptEncoder, total_virtual_tokens

from .config import PromptEncoderConfig


class PromptEncoder(BasePromptEncoder):
    """Indices [batch, tokens] -> embeddings [batch, tokens, token_dim].

    In training `embedding` goes through `mlp_head`, and before that, for the type LSTM, through `lstm_head`.
    """

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__(config)
        self.token_dim = self.input_size = self.output_size = config.token_dim
        self.hidden_size = config.encoder_hidden_size
        self.total_virtual_tokens = total_virtual_tokens(config)
        self.encoder_type = config.encoder_reparameterization_type
        self.is_plain = config.inference_mode
        self.embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)
        if self.is_plain:
            return
        size = self.hidden_size
        if self.encoder_type == "LSTM":
            self.lstm_head = nn.LSTM(
                self.token_dim,
                size,
                num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            layers: list[nn.Module] = [nn.Linear(2 * size, 2 * size), nn.ReLU(), nn.Linear(2 * size, self.token_dim)]
        else:
            _warn_of_what_an_mlp_has_not(config)
            layers = [nn.Linear(self.token_dim, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU()]
            layers.append(nn.Linear(size, self.token_dim))
        self.mlp_head = nn.Sequential(*layers)

    def forward(self, indices: Tensor) -> Tensor:
        embedded = self.embedding(indices)
        if self.is_plain:
            return embedded
        if self.encoder_type == "LSTM":
            embedded = self.lstm_head(embedded)[0]
        return self.mlp_head(embedded)


def _warn_of_what_an_mlp_has_not(config: Any) -> None:
    for name in ("encoder_num_layers", "encoder_dropout"):
        default = getattr(PromptEncoderConfig, name)
        if getattr(config, name) != default:
            warnings.warn(
                f"{name}={getattr(config, name)!r} has no effect on the MLP of P-tuning, which has three linear layers "
                "and no dropout: it is for encoder_reparameterization_type='LSTM'",
                stacklevel=2,
            )
