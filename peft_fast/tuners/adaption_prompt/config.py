"""AdaptionPromptConfig: every option of peft 0.21.2's."""

from dataclasses import dataclass

from peft_fast.config import PeftConfig
from peft_fast.peft_types import PeftType


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Learned tokens that the attention of the last layers looks at, through a gate that is shut at first
    (LLaMA-Adapter, arXiv 2303.16199).

    adapter_len: how many tokens. adapter_layers: of how many layers, counted from the last.
    target_modules: what the attention modules are called; by default what the model's type calls them.
    Raises ValueError or TypeError for options that cannot be.
    """

    tied_to_weights = ("peft_type", "adapter_len", "adapter_layers")

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAPTION_PROMPT
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            raise TypeError(f"target_modules must be one name of modules, got {self.target_modules!r}")

    def check(self) -> None:
        """Called where an adapter is made: as in peft the sizes need not be there before."""
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")

    @property
    def is_adaption_prompt(self) -> bool:
        return True
