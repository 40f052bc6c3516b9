"""TrainableTokensConfig: every option of peft 0.21.2's, with the same defaults."""

from dataclasses import dataclass, field

from peft_fast.peft_types import PeftType
from peft_fast.tuners.options import TunerConfig, is_integer


@dataclass
class TrainableTokensConfig(TunerConfig):
    """The rows of some tokens are trained, in place of those in the embedding.

    token_indices: the tokens' ids, needed. target_modules: the embeddings, names or an expression; None: the model's
      input embedding. Layers that share its weight follow it.
    init_weights: False draws the rows, which begin as the embedding's else.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "token_indices")
    sets = ()  # a list stays one, as in peft
    switches = ("init_weights",)

    token_indices: list[int] = field(default_factory=list)
    target_modules: set[str] | list[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS

    def check(self) -> None:
        super().check()
        tokens = self.token_indices
        if not isinstance(tokens, (list, tuple)) or not all(is_integer(token) and token >= 0 for token in tokens):
            raise ValueError(f"token_indices must be a list of token ids from 0 on, got {tokens!r}")
