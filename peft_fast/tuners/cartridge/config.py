"""CartridgeConfig."""

from dataclasses import dataclass

from peft_fast.config import PromptLearningConfig
from peft_fast.peft_types import PeftType


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Keys and values before those of every attention layer, trained as they are (Cartridges, arXiv 2506.06266).

    They start at random, or as what the base model computes for a text: see initialize_kv_prefix_from_text and
    initialize_kv_prefix_from_past_key_values in `utils` here.
    num_frozen_tokens: how many of the first tokens stay as they start; the paper keeps one, on which attention rests
      that goes nowhere else.
    Raises ValueError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CARTRIDGE
        self._check_frozen()

    def check(self) -> None:
        super().check()
        self._check_frozen()

    def _check_frozen(self) -> None:
        frozen, tokens = self.num_frozen_tokens, self.num_virtual_tokens
        if isinstance(frozen, bool) or not isinstance(frozen, int) or frozen < 0:
            raise ValueError(f"num_frozen_tokens must be an integer from 0 on, got {frozen!r}")
        if isinstance(tokens, int) and frozen > tokens:
            raise ValueError(f"num_frozen_tokens must be at most num_virtual_tokens, {tokens}, got {frozen}")
