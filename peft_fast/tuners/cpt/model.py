"""CPTEmbedding, and the loss that it is trained with."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast.tuners.prompt_learning.encoder import BasePromptEncoder
from peft_fast.tuners.prompt_tuning.model import embeddings_of

LABEL = 4  # the kinds of tokens go round: template of the input, input, template of the output, label


class CPTEmbedding(BasePromptEncoder):
    """Indices [batch, tokens] -> embeddings [batch, tokens, token_dim]: the examples' own, and what they have moved.

    `embedding` is kept; `delta_embedding` is trained where tokens are no labels, and put back into reach of its limits
    at every call.
    """

    moves: Tensor  # [tokens, 1], bool
    limits: Tensor  # [tokens]

    def __init__(self, config: Any, word_embeddings: Any) -> None:
        super().__init__(config)
        self.is_plain = config.inference_mode
        size = (config.num_virtual_tokens, config.token_dim)
        self.embedding = nn.Embedding(*size)
        if not self.is_plain:
            self.embedding.weight = nn.Parameter(embeddings_of(word_embeddings, torch.tensor(config.cpt_token_ids)))
        self.embedding.requires_grad_(False)
        self.delta_embedding = nn.Embedding(*size)
        nn.init.zeros_(self.delta_embedding.weight)
        kinds = torch.tensor(config.cpt_tokens_type_mask)
        self.register_buffer("moves", (kinds % LABEL != 0)[:, None], persistent=False)
        self.register_buffer("limits", _limits(kinds, config), persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        if self.is_plain:
            return self.embedding(indices)
        self._put_back()
        moved = self.delta_embedding(indices)
        moved = torch.where(self.moves[indices], moved, moved.detach())
        return self.embedding(indices) + moved

    @torch.no_grad()
    def _put_back(self) -> None:
        weight = self.delta_embedding.weight
        norms = weight.norm(dim=1)
        factors = torch.where(norms > 0, self.limits / norms.clamp(min=self.limits), 1.0)
        weight.data = weight * factors[:, None]  # a new tensor: a graph may hold the old one

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        return self.delta_embedding.parameters()

    def call(self, base_model: nn.Module, inputs: dict[str, Any], config: Any) -> Any:
        kinds = inputs.pop("input_type_mask", None)
        labels = inputs.get("labels")
        if labels is None:
            return base_model(**inputs)
        n = config.num_virtual_tokens
        if kinds is None:
            kinds = torch.full_like(labels[:, n:], LABEL)
        own = torch.tensor([config.cpt_tokens_type_mask, config.cpt_token_ids], device=labels.device)
        kinds = kinds.to(labels.device)
        kinds = torch.where(kinds > 0, kinds + own[0].max(), kinds)  # examples after those of the prompt
        kinds = torch.cat([own[0].expand(len(labels), -1), kinds], dim=1)
        labels = torch.cat([own[1].expand(len(labels), -1), labels[:, n:]], dim=1)
        labels = labels.masked_fill(~_are_labels(kinds), -100)
        output = base_model(**{**inputs, "labels": labels})
        if isinstance(output, tuple):
            return (cpt_loss(output[1], labels, kinds, config), *output[1:])
        output["loss"] = cpt_loss(output.logits, labels, kinds, config)
        return output


def cpt_loss(logits: Tensor, labels: Tensor, kinds: Tensor, config: Any) -> Tensor:
    """The mean over labels of their losses, those of earlier examples times the decay.

    logits [batch, tokens, vocabulary]; labels, kinds [batch, tokens].
    """
    labels, kinds = labels[:, 1:].to(logits.device), kinds[:, 1:].to(logits.device)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    if config.opt_weighted_loss_type == "decay":
        losses = losses * torch.stack([_decays(row, config.opt_loss_decay_factor) for row in kinds])
    return losses[labels != -100].mean()


def _decays(kinds: Tensor, factor: float) -> Tensor:
    """[tokens]: for the labels of the last example 1, of that before `factor`, then its square, ..."""
    examples = kinds[_are_labels(kinds)].unique()
    later = (examples[None] > kinds[:, None]).sum(dim=1)
    return torch.where(_are_labels(kinds), float(factor) ** later, 1.0)


def _are_labels(kinds: Tensor) -> Tensor:
    return (kinds > 0) & (kinds % LABEL == 0)


def _limits(kinds: Tensor, config: Any) -> Tensor:
    """How far each token's embedding may be from its start."""
    scale = (config.token_dim / 2048) ** 0.5
    limits = torch.full(kinds.shape, 1e-10)
    of_templates = (kinds > 0) & ((kinds % LABEL == 1) | (kinds % LABEL == 3))
    limits[of_templates] = config.opt_projection_format_epsilon * scale
    limits[(kinds > 0) & (kinds % LABEL == 2)] = config.opt_projection_epsilon * scale
    return limits
