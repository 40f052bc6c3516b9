"""Where the time of a training step goes: base products, dequantising, LoRA, norms, attention, loss, optimiser, host.

    python -m bench.profile [--model small] [--seq-len 128] [--batch-size 2]         options: those of bench.compare

torch.profiler's trace of some steps of HF PEFT and of ours, each piece of time given to one of CATEGORIES: on a GPU by
its kernels, and "host" is where none runs; on a CPU by the ops that torch ran, and "host" is Python between them. A
piece of a backward belongs where the forward op that it is the backward of does. What no rule knows is "other".
"""

import argparse
import csv
import dataclasses
import datetime
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from bench.compare.options import Options, parse
from bench.compare.worker import Training
from bench.harness import LOADED, device_name, folder_of

CATEGORIES = (
    "base GEMM", "dequantise", "LoRA", "norms", "attention", "activation", "loss", "optimizer", "host", "other",
)  # fmt: skip
STEP, SCOPE = "bench::step", "bench::in "
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul"}
GEMM_KERNELS = re.compile(r"gemm|quant_matmul|quant_gemv|cutlass|cublas|nvjet|xmma|sm\d+_", re.IGNORECASE)
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty", "resize_"}


@dataclass(frozen=True)
class Piece:
    """Some time of one op or kernel."""

    name: str  # "aten::mm", or a kernel's
    us: float
    chain: tuple[str, ...] = ()  # the ops and scopes around it, from the inside out; of a backward its forward's too
    shapes: tuple[tuple[int, ...], ...] = ()  # of the op's inputs
    is_kernel: bool = False


@dataclass(frozen=True)
class Sizes:
    """By which products are told apart."""

    rank: int
    vocabulary: int


def category(piece: Piece, sizes: Sizes) -> str:
    """One of CATEGORIES but "host"."""
    everything = (piece.name, *piece.chain)
    text = " ".join(everything).lower()
    name = piece.name.split("::")[-1].lower()
    if "optimizer." in text:
        return "optimizer"
    if "dequant" in text:
        return "dequantise"
    if _is_product(piece, name):
        return _of_product(piece, sizes)
    if re.search(r"scaled_dot_product|flash|fmha|efficient_attention", text):
        return "attention"
    if re.search(r"softmax|nll_loss|cross_entropy", text) or f"{SCOPE}loss" in everything:
        return "loss"
    if re.search(r"rms_?norm|layer_?norm", text) or f"{SCOPE}norms" in everything:
        return "norms"
    if piece.is_kernel and re.search(r"lora_|sum_partials|sum_both|scale_columns", name):
        return "LoRA"
    in_mlp = "peft_fast::lora_mlp" in text
    if re.search(r"glu|silu|sigmoid|gelu|tanh", name) or (
        in_mlp and re.match(r"mul|copy_|_to_copy|to$|sub|rsub", name)
    ):
        return "activation"
    if "peft_fast::" in text or f"{SCOPE}LoRA" in everything:
        return "LoRA"
    for scope in ("attention", "activation"):
        if f"{SCOPE}{scope}" in everything:
            return scope
    return "other"


def _is_product(piece: Piece, name: str) -> bool:
    ops = {op.split("::")[-1] for op in piece.chain if op.startswith("aten::")}
    if piece.is_kernel and not piece.name.startswith("triton_"):
        return bool(GEMM_KERNELS.search(piece.name)) or "gemm_4bit" in " ".join(piece.chain) or bool(ops & PRODUCTS)
    return name in PRODUCTS or name.startswith(("gemm_4bit", "quant_matmul"))


def _of_product(piece: Piece, sizes: Sizes) -> str:
    dims = {size for shape in piece.shapes for size in shape if len(shape) > 1}
    if sizes.vocabulary in dims or f"{SCOPE}loss" in piece.chain:
        return "loss"
    return "LoRA" if any(size and size <= 3 * sizes.rank and size % sizes.rank == 0 for size in dims) else "base GEMM"


def attribute(pieces: Iterable[Piece], sizes: Sizes, total_us: float) -> dict[str, float]:
    """{category: us}; what is left of `total_us` is the host's."""
    found = dict.fromkeys(CATEGORIES, 0.0)
    for piece in pieces:
        found[category(piece, sizes)] += piece.us
    found["host"] = max(0.0, total_us - sum(found.values()))
    return found


def pieces_of(events: Any) -> tuple[list[Piece], float]:
    """(the pieces within STEP, its us) of torch.profiler's events. On a GPU us of kernels, on a CPU of ops."""
    # An op that makes no node has the number of the next node: the last op with a number is the one that made it.
    forwards = {event.sequence_nr: event for event in events if event.sequence_nr >= 0 and not _is_backward(event)}
    found, total, on_gpu = [], 0.0, any(event.kernels for event in events)
    for event in events:
        if event.name == STEP and event.device_type == torch.autograd.DeviceType.CPU:
            total += event.cpu_time_total
        if event.device_type != torch.autograd.DeviceType.CPU or STEP not in (chain := _chain(event, forwards)):
            continue
        shapes = tuple(tuple(shape) for shape in event.input_shapes or () if shape)
        if on_gpu:
            around = (event.name, *chain)
            found += [Piece(kernel.name, kernel.duration, around, shapes, is_kernel=True) for kernel in event.kernels]
        elif event.name.startswith(("aten::", "bitsandbytes::")) and event.self_cpu_time_total > 0:
            found.append(Piece(event.name, event.self_cpu_time_total, chain, shapes))
    return found, total


def _is_backward(event: Any) -> bool:
    """A node, or what the engine does around one, as summing gradients: both have the number of its forward."""
    return event.scope == 1 or event.name.startswith("autograd::engine")  # RecordScope::BACKWARD_FUNCTION


def _chain(event: Any, forwards: dict[int, Any]) -> tuple[str, ...]:
    names, parent = [], event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        if _is_backward(parent) and parent.sequence_nr in forwards:
            forward = forwards[parent.sequence_nr]
            names += [forward.name, *_chain(forward, {})]
        parent = parent.cpu_parent
    return tuple(names)


@contextmanager
def scopes(model: nn.Module) -> Iterator[None]:
    """Within, what norms, attentions, MLPs and the head do is marked in the trace. LoRA layers of ours are left alone:
    with hooks on them they would not run as one op."""
    hooks: list[Any] = []
    for name, module in model.named_modules():
        scope = _scope_of(name, module, model)
        if scope is not None:
            opened: list[Any] = []

            def before(*_: Any, scope: str = scope, opened: list = opened) -> None:
                opened.append(record_function(SCOPE + scope))
                opened[-1].__enter__()

            def after(*_: Any, opened: list = opened) -> None:
                opened.pop().__exit__(None, None, None)

            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _scope_of(name: str, module: nn.Module, model: Any) -> str | None:
    kind, last = type(module).__name__, name.rpartition(".")[2]
    if module is model.get_output_embeddings():
        return "loss"
    if "Norm" in kind:
        return "norms"
    if last == "self_attn":
        return "attention"
    if last == "mlp":
        return "activation"
    return "LoRA" if type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "lora_A") else None


class Profiled:
    """A library that trains, a step of its traced at a time."""

    def __init__(self, provider: str, options: Options) -> None:
        self.training = Training(provider, options)
        vocabulary = self.training.model.get_base_model().config.get_text_config().vocab_size
        self.sizes = Sizes(options.rank, vocabulary)
        self.steps: list[dict[str, float]] = []
        for _ in range(2):
            self.training.step()

    def step(self) -> None:
        on_gpu = self.training.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        traced = profile(activities=activities, record_shapes=True)
        with scopes(self.training.model), traced as record, record_function(STEP):
            self.training.step()
        pieces, total = pieces_of(record.events())
        self.steps.append(attribute(pieces, self.sizes, total))

    def times(self) -> dict[str, float]:
        """{category: ms}, the median over the steps."""
        return {name: statistics.median(step[name] for step in self.steps) / 1e3 for name in CATEGORIES}


def profiled(wanted: dict[str, tuple[str, Options]], steps: int) -> dict[str, dict[str, float]]:
    """{name: {category: ms a step}} for {name: (library, options)}; they take their steps in turn, so that a machine
    that slows down slows all of them."""
    made = {name: Profiled(*each) for name, each in wanted.items()}
    for _ in range(steps):
        for each in made.values():
            each.step()
    return {name: each.times() for name, each in made.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [f"{'ms a step':14}" + "".join(f"{name:>24}" for name in found)]
    for name in (*CATEGORIES, "all"):
        cells = []
        for times in found.values():
            total = sum(times.values())
            ms = total if name == "all" else times[name]
            cells.append(f"{ms:15,.2f} ({100 * ms / total:4.1f} %)")
        lines.append(f"{name:14}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def append(found: dict[str, dict[str, float]], options: Options, device: torch.device, path: Path) -> None:
    """One row a library and category; a CSV that is never rewritten."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["date", "sha", "device", "torch", "setting", "provider", "category", "ms"])
        common = [datetime.date.today().isoformat(), LOADED, device_name(device), torch.__version__, str(options)]
        for provider, times in found.items():
            writer.writerows([*common, provider, name, round(ms, 4)] for name, ms in times.items())


def plot(found: dict[str, dict[str, float]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # writes files, needs no screen
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(10, 1.8 + 0.6 * len(found)), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    left = [0.0] * len(found)
    names = list(found)[::-1]
    for name, colour in zip(CATEGORIES, colours):
        values = [found[provider][name] for provider in names]
        ax.barh(names, values, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, values)]
    ax.set_xlabel("ms a step")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=9)
    fig.legend(loc="outside lower center", ncols=5, fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiled-steps", type=int, default=7, help="of each (default: %(default)s)")
    own, rest = parser.parse_known_args()
    options, providers, results = parse(rest)
    if options.tokens <= 3 * options.rank:
        parser.error(
            f"LoRA's products are known by the rank: more than {3 * options.rank} tokens, got {options.tokens}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = {provider: (provider, options) for provider in providers}
    if not options.recompute and "peft_fast" in providers:
        wanted["ours, norms recomputed"] = ("peft_fast", dataclasses.replace(options, recompute=("norms",)))
    found = profiled(wanted, own.profiled_steps)
    print(f"{options}\non {device_name(device)}\n{table(found)}")
    folder = folder_of(device, results)
    append(found, options, device, folder / "profile.csv")
    plot(found, f"{options}\n{device_name(device)}", folder / "profile.png")
    print(f"rows appended to {folder / 'profile.csv'}, drawn in {folder / 'profile.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
