"""PromptEncoderConfig."""

from dataclasses import dataclass
from enum import Enum

from peft_fast.config import PromptLearningConfig
from peft_fast.option_help import with_help
from peft_fast.peft_types import PeftType
from peft_fast.tuners.prompt_tuning.config import named


class PromptEncoderReparameterizationType(str, Enum):
    MLP = "MLP"
    LSTM = "LSTM"


@with_help
@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning: trained embeddings before those of the input, which come out of a small network (arXiv 2103.10385).

    encoder_reparameterization_type: "MLP" or "LSTM". encoder_hidden_size: its units, by default token_dim.
    encoder_num_layers, encoder_dropout: the LSTM's; an MLP has three linear layers and no dropout.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING

    def check(self) -> None:
        super().check()
        named(
            PromptEncoderReparameterizationType,
            "encoder_reparameterization_type",
            self.encoder_reparameterization_type,
        )
        for name in ("encoder_hidden_size", "encoder_num_layers"):
            value = getattr(self, name)
            if value is None and name == "encoder_hidden_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        p = self.encoder_dropout
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise ValueError(f"encoder_dropout must be a probability from 0 to 1, got {p!r}")
