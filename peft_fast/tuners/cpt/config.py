"""CPTConfig."""

from dataclasses import dataclass

from peft_fast.config import PromptLearningConfig
from peft_fast.option_help import with_help
from peft_fast.peft_types import PeftType, TaskType


@with_help
@dataclass
class CPTConfig(PromptLearningConfig):
    """Context-aware prompt tuning (arXiv 2410.17222): the prompt is labelled examples, whose embeddings are trained
    within a distance of their own, under a loss on the examples' labels too.

    cpt_token_ids: the examples' tokens. cpt_tokens_type_mask: of each the kind, k of example i as 4 i + k: 1 template
      of the input, 2 input, 3 template of the output, 4 label; by default all are templates.
    cpt_mask: 1 for each token; others are refused, as they would have no effect.
    opt_weighted_loss_type: "decay" multiplies the labels' losses by opt_loss_decay_factor for each example nearer to
      the end; "none" weighs them all alike.
    opt_projection_epsilon, opt_projection_format_epsilon: how far inputs and templates may move, times
      sqrt(token_dim / 2048).
    tokenizer_name_or_path: noted in the file, for whoever reads it.
    The sizes are the base model's, whatever is given. Raises ValueError for another task than CAUSAL_LM.
    """

    tied_to_weights = ("peft_type", "num_virtual_tokens")

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CPT
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"CPTConfig only supports task_type 'CAUSAL_LM', got {self.task_type!r}")
        self.num_layers = self.token_dim = self.num_attention_heads = None
        self.num_transformer_submodules = 1
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        self.num_virtual_tokens = len(self.cpt_token_ids)
        ones = [1] * self.num_virtual_tokens
        self.cpt_mask = ones[:] if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = ones[:] if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        lengths = [len(values) for values in (self.cpt_token_ids, self.cpt_mask, self.cpt_tokens_type_mask)]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length, got {lengths}"
            )

    def check(self) -> None:
        super().check()
        if any(value != 1 for value in self.cpt_mask or ()):
            raise ValueError(
                f"cpt_mask must be ones, got {self.cpt_mask}: leave tokens that are not to be attended to out of "
                "cpt_token_ids"
            )
        if self.opt_weighted_loss_type not in ("none", "decay"):
            raise ValueError(f"opt_weighted_loss_type must be 'none' or 'decay', got {self.opt_weighted_loss_type!r}")
        for name in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
