"""Options of single initialisations, as objects: fields of LoraConfig that are dicts in a file."""

from dataclasses import dataclass


@dataclass
class LoftQConfig:
    """loftq_bits: 4 (NF4 in blocks of 64) or 8 (a scale a row). loftq_iter: how often quantising and decomposing
    alternate."""

    loftq_bits: int = 4
    loftq_iter: int = 1
