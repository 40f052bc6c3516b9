"""explain(model): which path every adapted layer takes, and why."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .dispatch import Choice, TritonUnsupported
from .integrations.peft_layers import Accelerated, is_peft_layer, why_peft
from .quant.weight import QuantizedWeight
from .sharded import as_in_forward
from .tuners.layer import BaseTunerLayer
from .tuners.lora import groups, mlp, norms


@dataclass(frozen=True)
class Row:
    """One adapted layer, or one MLP of such layers."""

    name: str
    base: str  # the format of the base weight
    route: str
    because: str


@dataclass(frozen=True)
class Explanation:
    """The rows of `explain`; as text, an aligned table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no adapted layer: get_peft_model has not been called on this model, or prompts are learned"
        lines = [("layer", "base weight", "route", "because")]
        lines += [(row.name, row.base, row.route, row.because) for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[3]]) for line in lines)


def explain(model: nn.Module, *, tokens: int = 512, show: bool = True) -> Explanation:
    """Print one row per adapted layer of `model`, and per gated MLP of such layers, and return them.

    With `show` False nothing is printed.

    layer        its name in the model
    base weight  dtype of a dense weight; type, block size and kind of scales of a k-bit one
    route        what a forward runs now: "split", "fused" or "merge" in Triton, "reference" in plain torch, "base"
                 where no adapter is in effect (ops/table.py explains the routes), "refused" where it would raise;
                 "added" where the base layer is called, "copy" where a trained copy of it is, "sum" where torch
                 multiplies by the sum of weight and adapter.
                 Of an MLP: "mlp" where its layers run as one op, each by its own route, "layers" where they are called;
                 of layers that share their input: "group" or "layers"; of norms, after set_recompute(norms=True):
                 "recompute" where their input alone is kept, else "layers"
    because      the reason for that route

    What is printed is what the next forward does with a batch of `tokens` (batch size times sequence length) in the
    dtype that the layer computes in (autocast's where `explain` is called under it; a k-bit layer of ours that states
    none takes that of its input, and is shown for the dtype its weight had), in the mode the model is in (dropout),
    with what is trainable now, under the backend that is set now (dispatch.py). Routes depend on all of these: try
    tokens=1, which is what generating does.
    """
    asked = any(isinstance(module, norms.RecomputingNorm) for module in model.modules())
    with as_in_forward(model):
        rows = [_row(name, module, tokens, asked) for name, module in model.named_modules()]
    explanation = Explanation(tuple(row for row in rows if row is not None))
    if show:
        print(explanation)
    return explanation


def _row(name: str, module: nn.Module, tokens: int, norms_asked: bool) -> Row | None:
    if isinstance(module, (BaseTunerLayer, Accelerated)):
        layer: Any = module
        try:
            choice = layer.route(tokens)
            route, because = choice.route, choice.because
        except (TritonUnsupported, ValueError) as refusal:
            route, because = "refused", str(refusal)
        return Row(name, describe(layer.base_weight()), route, because)
    if is_peft_layer(module):
        return Row(name, "", "peft", why_peft(module))
    of_several = _of_several(module, norms_asked)
    return Row(name, "", of_several[-1].route, "; ".join(one.because for one in of_several)) if of_several else None


def _of_several(module: nn.Module, norms_asked: bool) -> list[Choice]:
    """What modules do that are no adapted layers but run some, or stand before them."""
    found = (mlp.choice(module), groups.choice(module), norms.choice(module, norms_asked))
    return [choice for choice in found if choice is not None]


def describe(weight: Tensor | QuantizedWeight) -> str:
    """A weight's format in a few words: "bfloat16", "nf4, blocks of 64, nested scales"."""
    if isinstance(weight, QuantizedWeight):
        if weight.bits == 8:
            return f"{weight.quant_type}, a scale a row"
        scales = "nested" if weight.nested else "plain"
        return f"{weight.quant_type}, blocks of {weight.blocksize}, {scales} scales"
    return str(weight.dtype).removeprefix("torch.")
