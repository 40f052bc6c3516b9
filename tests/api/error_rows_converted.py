"""Rows of error_table.py: adapters of other methods as LoRA."""

from error_tools import Row
from torch import nn


def loha(library, tools, **options):
    config = library.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False, **options)
    return library.get_peft_model(tools.llama(), config)


def converted(library, model, rank=2, **options):
    return library.tuners.lora.convert_to_lora(model, rank, **options)


CONVERTED = [
    Row(
        "converting to LoRA without a rank",
        lambda l, t: converted(l, loha(l, t), 0),
        ValueError,
        "rank of 0",
        ("rank must be a positive integer or a float", "got 0"),
    ),
    Row(
        "converting to LoRA with more than all of the energy",
        lambda l, t: converted(l, loha(l, t), 1.5),
        ValueError,
        "between 0 and 1",
        ("a share of the energy", "got 1.5"),
    ),
    Row(
        "converting to LoRA of more ranks than the weight has",
        lambda l, t: converted(l, loha(l, t), 100),
        ValueError,
        "larger than the weight shape",
        ("rank must be at most 64", "got 100"),
    ),
    Row(
        "converting a model without adapters to LoRA",
        lambda l, t: converted(l, nn.Linear(2, 2)),
        TypeError,
        "Could not detect any layer",
        ("needs a model with adapters",),
    ),
    Row(
        "converting what is not added to LoRA",
        lambda l, t: converted(
            l, l.get_peft_model(t.llama(), l.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
        ),
        TypeError,
        "do not support LoRA conversion",
        ("cannot be converted to LoRA", "only what is added"),
    ),
    Row(
        "converting LoRA to LoRA",
        lambda l, t: converted(l, t.model(l)),
        UserWarning,
        "already a LoRA adapter",
        ("the adapter is LoRA already",),
    ),
    Row(
        "converting trained biases to LoRA",
        lambda l, t: converted(l, t.model(l, bias="all")),
        ValueError,
        "sets bias=all",
        ("biases cannot be converted", "bias='all'"),
    ),
    Row(
        "converting an adapter that is not there",
        lambda l, t: converted(l, loha(l, t), adapter_name="other"),
        Exception,
        "",
        ("adapter 'other' does not exist", "default"),
        ValueError,
        why="peft fails in the layer, with a KeyError or an AttributeError",
    ),
]
