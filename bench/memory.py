"""The memory of a training step, calculated for a model that need not be here: nothing is downloaded or allocated.

    python -m bench.memory --model llama-3-8b --seq-len 2048 --batch-size 1 --rank 16
    python -m bench.memory --model llama-3-8b --tensors           what a layer keeps, tensor by tensor
    python -m bench.memory --longest --limit 24                   the longest sequence, of the published shapes

HF PEFT's code and ours are run on shapes alone, forward and backward (peft_fast/memory.py), at a depth of two and of
three layers; every further layer takes what the third takes. Adapters on all linear layers but the head, in fp32 under
bf16 autocast. Sizes are a CPU's: a GPU's kernels need less working space here and there, its allocator some more.
"""

import argparse
import copy
import csv
import dataclasses
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PretrainedConfig

import peft_fast
from bench.compare.models import config_of
from bench.compare.options import SHAPES
from bench.fake import meta_model, without_data
from bench.harness import RESULTS
from bench.memory_saved import GpuDropout
from peft_fast.memory import MIB, STATE_BYTES, Kept, MemoryEstimate, estimate_memory, step_memory

GIB = 2**30
RESERVED = GIB  # of a card: the CUDA context, and what an allocator cannot use
PUBLISHED = ("llama-3.2-1b", "qwen3-4b", "llama-3-8b")


@dataclass(frozen=True)
class Way:
    """A library, and what of the model it computes again."""

    name: str
    library: ModuleType
    recompute: tuple[str, ...] = ()  # of "norms", "mlps", "layers"


WAYS = (
    Way("HF PEFT", peft),
    Way("HF PEFT, layers recomputed", peft, ("layers",)),
    Way("peft_fast", peft_fast),
    Way("peft_fast, norms recomputed", peft_fast, ("norms",)),
    Way("peft_fast, norms and MLPs recomputed", peft_fast, ("norms", "mlps")),
    Way("peft_fast, layers recomputed", peft_fast, ("layers",)),
    Way("peft_fast, layers, norms and MLPs", peft_fast, ("layers", "norms", "mlps")),
)


@dataclass(frozen=True)
class Recipe:
    """What is trained how."""

    config: PretrainedConfig
    batch_size: int = 1
    rank: int = 16
    bits: int = 4
    dropout: float = 0.0
    optimizer: str = "adamw"
    chunked_loss: bool = False  # a loss that never has all logits at a time, as Liger's: head and loss do not count


class Calculated:
    """A way on a recipe: models of two and of three layers, run at any length."""

    def __init__(self, way: Way, recipe: Recipe) -> None:
        self.way, self.recipe = way, recipe
        self.models = {depth: self._model(depth) for depth in (2, 3)}

    def _model(self, depth: int) -> Any:
        library, config = self.way.library, copy.deepcopy(self.recipe.config)
        config.num_hidden_layers = depth
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:depth]
        model = meta_model(config, self.recipe.bits)
        layers = "layers" in self.way.recompute
        if layers:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()  # as in a deeper model: its first layers too have something to pass on
        adapters = library.LoraConfig(
            r=self.recipe.rank, lora_dropout=self.recipe.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = library.get_peft_model(model, adapters).train()
        if chosen := set(self.way.recompute) - {"layers"}:
            peft_fast.set_recompute(model, norms="norms" in chosen, mlps="mlps" in chosen)
        return without_data(model, FakeTensorMode(allow_non_fake_inputs=True))

    def _as_on_a_gpu(self) -> Any:
        return GpuDropout() if self.way.library is peft and self.recipe.dropout else nullcontext()

    def estimate(self, tokens: int) -> MemoryEstimate:
        """Of the whole model, for rows of so many tokens."""
        recipe, count = self.recipe, self.recipe.config.num_hidden_layers
        step = _without_head if recipe.chunked_loss else None
        with self._as_on_a_gpu():
            two, three = (
                estimate_memory(
                    self.models[depth], recipe.batch_size, tokens, optimizer=recipe.optimizer,
                    autocast=torch.bfloat16, step=step,
                )
                for depth in (2, 3)
            )  # fmt: skip
        return MemoryEstimate(
            **{name: max(0, n + (count - 3) * (n - vars(two)[name])) for name, n in vars(three).items()}
        )

    def of_a_layer(self, tokens: int) -> tuple[Kept, ...]:
        """What the second of three layers keeps."""
        with self._as_on_a_gpu():
            found = step_memory(self.models[3], self.recipe.batch_size, tokens, autocast=torch.bfloat16)
        return tuple(each for each in found.kept if each.part == "layer 1")

    def longest(self, limit: int, at: tuple[int, int] = (2048, 4096)) -> int:
        """The most tokens of a row with which a step needs at most `limit` bytes: a straight line through what two
        lengths need, both long enough for the tokens to decide, and not the weights."""
        (a, at_a), (b, at_b) = ((tokens, self.estimate(tokens).needed) for tokens in at)
        return max(0, int(a + (limit - at_a) * (b - a) / (at_b - at_a)))


def _without_head(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.get_base_model().model(input_ids=ids).last_hidden_state.sum()


def bytes_per_token(calculated: Calculated, tokens: int) -> float:
    """That a layer keeps for the backward."""
    return sum(each.nbytes for each in calculated.of_a_layer(tokens)) / (calculated.recipe.batch_size * tokens)


def print_estimates(recipe: Recipe, tokens: int, ways: tuple[Way, ...]) -> None:
    print(f"{'MiB':38}{'layer, B/token':>15}", *(f"{name:>17}" for name, _ in _columns(None)))
    for way in ways:
        calculated = Calculated(way, recipe)
        estimate, of_a_layer = calculated.estimate(tokens), bytes_per_token(calculated, tokens)
        cells = (f"{size / MIB:17,.0f}" for _, size in _columns(estimate))
        print(f"{way.name:38}{of_a_layer:15,.0f}", *cells, flush=True)


def _columns(estimate: MemoryEstimate | None) -> list[tuple[str, int]]:
    return (estimate or MemoryEstimate(*[0] * len(dataclasses.fields(MemoryEstimate)))).rows()


def print_tensors(recipe: Recipe, tokens: int, ways: tuple[Way, ...]) -> None:
    for way in ways:
        found = Counter(Calculated(way, recipe).of_a_layer(tokens))
        everything = tokens * recipe.batch_size
        total = sum(each.nbytes * count for each, count in found.items()) / everything
        print(f"{way.name}: {total:,.0f} bytes a token and layer")
        for each, count in sorted(found.items(), key=lambda item: -item[0].nbytes * item[1]):
            dtype = str(each.dtype).removeprefix("torch.")
            print(f"  {count * each.nbytes / everything:10,.0f}  {count} x {list(each.shape)} {dtype}")


def longest_rows(
    shapes: tuple[str, ...], limit: int, recipe: Recipe, ways: tuple[Way, ...], at: tuple[int, int] = (1024, 2048)
) -> Iterator[dict[str, Any]]:
    """One row a shape and way: bytes a token and layer, and the longest row of tokens with all logits and without."""
    for shape in shapes:
        for way in ways:
            calculated = Calculated(way, dataclasses.replace(recipe, config=_config(shape)))
            row = {"model": shape, "way": way.name, "limit_gib": limit / GIB, "rank": recipe.rank, "bits": recipe.bits}
            row["bytes_per_token_and_layer"] = round(bytes_per_token(calculated, at[0]))
            for name, chunked in (("longest", False), ("longest_chunked_loss", True)):
                calculated.recipe = dataclasses.replace(calculated.recipe, chunked_loss=chunked)
                row[name] = calculated.longest(limit - RESERVED, at)
            yield row


def print_longest(limit: int, recipe: Recipe, ways: tuple[Way, ...], path: Path) -> None:
    """And write them down: this file is made anew."""
    print(f"{'':52}{'layer, B/token':>15}{'longest row':>13}{'chunked loss':>13}")
    rows = []
    for row in longest_rows(PUBLISHED, limit, recipe, ways):
        rows.append(row)
        numbers = (f"{row[name]:13,}" for name in ("longest", "longest_chunked_loss"))
        print(f"{row['model']:14}{row['way']:38}{row['bytes_per_token_and_layer']:15,}", *numbers, sep="", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _config(model: str) -> PretrainedConfig:
    return config_of(model) if model in SHAPES else AutoConfig.from_pretrained(model, local_files_only=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama-3-8b", help=f"a directory with a config.json, or one of {', '.join(SHAPES)}")
    add("--seq-len", type=int, default=2048)
    add("--batch-size", type=int, default=1)
    add("--rank", type=int, default=16)
    add("--bits", type=int, default=4, choices=(4, 16))
    add("--dropout", type=float, default=0.0, help="HF PEFT's masks count as on a GPU, a byte an element")
    add("--optimizer", default="adamw", choices=sorted(STATE_BYTES))
    add("--chunked-loss", action="store_true", help="without logits and loss, as where Liger's fused loss runs")
    add("--only", default="", help="only ways whose name contains this")
    add("--tensors", action="store_true", help="what a layer keeps, tensor by tensor")
    add("--longest", action="store_true", help=f"the longest sequence within --limit, of {', '.join(PUBLISHED)}")
    add("--limit", type=float, default=24, help="GiB of the card, of which one is not for tensors (default: 24)")
    add("--results", type=Path, default=RESULTS, help="folder of longest.csv (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.model not in SHAPES and not Path(given.model, "config.json").is_file():
        parser.error(f"--model must be a directory or one of {', '.join(SHAPES)}, got {given.model!r}")
    for name in ("seq_len", "batch_size", "rank"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    if not any(given.only in way.name for way in WAYS):
        parser.error(f"--only {given.only!r} is in none of: {'; '.join(way.name for way in WAYS)}")
    return given


def main() -> int:
    given = parse()
    warnings.filterwarnings("ignore")
    ways = tuple(way for way in WAYS if given.only in way.name)
    recipe = Recipe(
        _config(given.model), given.batch_size, given.rank, given.bits, given.dropout, given.optimizer,
        given.chunked_loss,
    )  # fmt: skip
    if given.longest:
        print_longest(int(given.limit * GIB), recipe, ways, given.results / "longest.csv")
    elif given.tensors:
        print_tensors(recipe, given.seq_len, ways)
    else:
        print(f"{Path(given.model).name}, {given.bits} bits, r={given.rank}, {given.batch_size} x {given.seq_len}")
        print_estimates(recipe, given.seq_len, ways)
    return 0


if __name__ == "__main__":
    sys.exit(main())
