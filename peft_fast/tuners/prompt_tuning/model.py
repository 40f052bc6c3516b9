"""PromptEmbedding."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners.prompt_learning.encoder import BasePromptEncoder, total_virtual_tokens


class PromptEmbedding(BasePromptEncoder):
    """Indices [batch, tokens] -> embeddings [batch, tokens, token_dim].

    `word_embeddings`: the base model's; rows of it are copied, in fp32, where the config says so and training begins.
    """

    def __init__(self, config: Any, word_embeddings: Any) -> None:
        super().__init__(config)
        tokens = total_virtual_tokens(config)
        self.embedding = nn.Embedding(tokens, config.token_dim)
        if config.inference_mode:
            return
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            self.start_from(word_embeddings, torch.randint(0, word_embeddings.num_embeddings, (tokens,)))
        elif config.prompt_tuning_init == "TEXT":
            ids = _ids_of_text(config)
            self.start_from(word_embeddings, torch.tensor(ids * -(-tokens // len(ids)))[:tokens])

    def start_from(self, word_embeddings: Any, ids: Tensor) -> None:
        self.embedding.weight = nn.Parameter(embeddings_of(word_embeddings, ids))


def embeddings_of(word_embeddings: Any, ids: Tensor) -> Tensor:
    """[tokens, size] in fp32. Raises ValueError for a token that there is no embedding for."""
    rows = word_embeddings.weight.shape[0]
    if not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise ValueError(
            f"a prompt cannot start from the tokens {ids.tolist()}: the model's vocabulary has {rows}. Is the "
            "tokenizer another model's?"
        )
    with torch.no_grad():
        return word_embeddings(ids.to(word_embeddings.weight.device)).clone().float()


def _ids_of_text(config: Any) -> list[int]:
    tokenizers = importlib.import_module("transformers").AutoTokenizer
    # No code comes with an adapter: its config is not to say that code of a tokenizer's repository is run.
    options = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
    tokenizer = tokenizers.from_pretrained(config.tokenizer_name_or_path, **options)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(f"prompt_tuning_init_text has no tokens: {config.prompt_tuning_init_text!r}")
    return ids
