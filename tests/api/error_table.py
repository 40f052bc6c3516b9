"""Every error and warning that peft 0.21.2 gives in the area of LoRA's configs, files and life cycle, and ours.

Each row is triggered in both libraries by test_error_table.py, which also writes errors.md from this table.
Methods, layers and options that are not built here yet are refused by name: NOT_BUILT in tuners/lora/config.py.
"""

from error_rows_activated import ACTIVATED
from error_rows_attention import PROMPTS_IN_ATTENTION
from error_rows_batches import BATCHES
from error_rows_calibrated import CALIBRATED, REPLICATIONS
from error_rows_converted import CONVERTED
from error_rows_eva import EVA
from error_rows_files import AUTO, LOADING, SAVING
from error_rows_hotswap import HOTSWAP
from error_rows_layers import LAYERS, NAMES
from error_rows_life import LIFE
from error_rows_lora import COMBINATIONS, CONVERSIONS, STARTS
from error_rows_making import CONFIGS, MAKING
from error_rows_methods import METHODS
from error_rows_parameters import PARAMETERS
from error_rows_prompts import PROMPTS
from error_rows_tokens import TOKENS
from error_rows_tuners import TUNERS
from error_rows_tuners_more import MORE
from error_rows_types_b import TYPES_B
from error_tools import Row, Tools

TABLE: dict[str, list[Row]] = {
    "Configs": CONFIGS,
    "Making adapters": MAKING,
    "Initialisations": STARTS,
    "Starts from sample data": [*CALIBRATED, *EVA],
    "Replicated layers": REPLICATIONS,
    "Conversion": [*CONVERSIONS, *CONVERTED],
    "Combination": COMBINATIONS,
    "Hot-swapping": HOTSWAP,
    "Tokens and ties": TOKENS,
    "Parameters and offloading": PARAMETERS,
    "Learned prompts": PROMPTS,
    "Other methods": METHODS,
    "Layers": LAYERS,
    "Names": NAMES,
    "Rotations and research methods": TYPES_B,
    "Prompts in the attention": PROMPTS_IN_ATTENTION,
    "(IA)^3, VeRA, AdaLoRA, LoKr, LayerNorm tuning, tokens, SHiRA": [*TUNERS, *MORE],
    "Their life": LIFE,
    "Batches of several adapters": BATCHES,
    "Activated LoRA": ACTIVATED,
    "Saving": SAVING,
    "Loading": LOADING,
    "AutoPeftModel": AUTO,
}

__all__ = ["TABLE", "Row", "Tools"]
