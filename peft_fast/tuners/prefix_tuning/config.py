"""PrefixTuningConfig."""

from dataclasses import dataclass

from peft_fast.config import PromptLearningConfig
from peft_fast.option_help import with_help
from peft_fast.peft_types import PeftType


@with_help
@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Trained keys and values before those of every attention layer (arXiv 2101.00190).

    prefix_projection: in training they come out of an MLP with encoder_hidden_size units, by default token_dim.
    init_weights: "zero" for a prefix whose values add nothing at first; None for a random one.
    Models with an encoder and a decoder get the prefix in the decoder.
    """

    tied_to_weights = ("peft_type", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING

    def check(self) -> None:
        super().check()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights must be 'zero' or None, got {self.init_weights!r}")
        size = self.encoder_hidden_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size <= 0):
            raise ValueError(f"encoder_hidden_size must be a positive integer, got {size!r}")
        if self.token_dim and self.num_attention_heads and self.token_dim % self.num_attention_heads:
            raise ValueError(
                f"token_dim must be a multiple of num_attention_heads, got {self.token_dim} and "
                f"{self.num_attention_heads}: it is the heads of keys and values times their size"
            )
