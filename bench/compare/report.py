"""The table, the rows and the picture of a comparison."""

import datetime
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness import LOADED, _version, device_name

from .options import Options


@dataclass(frozen=True)
class Row:
    date: str
    sha: str
    device: str
    torch: str
    triton: str
    bitsandbytes: str
    provider: str
    version: str
    setting: str
    tokens_per_s: float  # median over the steps
    p20: float
    p80: float
    speedup: float  # median over the steps of the first provider's time by this one's
    peak_mib: float  # the most that a step takes, beside what is there between steps
    saved_mib: float  # of that, kept from the forward for the backward
    resident_mib: float  # weights, adapters, optimiser
    first_loss: float
    last_loss: float
    loss_distance: float  # the largest difference of a step's loss to the first provider's


def rows(options: Options, found: dict[str, dict]) -> list[Row]:
    """`found`: of each provider seconds, losses and memory; the first is what the others are compared to."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = next(iter(found.values()))
    common = dict(
        date=datetime.date.today().isoformat(), sha=LOADED, device=device_name(device), torch=torch.__version__,
        triton=_version("triton"), bitsandbytes=_version("bitsandbytes"), setting=str(options),
    )  # fmt: skip
    made = []
    for provider, result in found.items():
        speeds = sorted(options.tokens / seconds for seconds in result["seconds"])
        p20, median, p80 = (speeds[round(q * (len(speeds) - 1))] for q in (0.2, 0.5, 0.8))
        ratio = statistics.median(b / own for b, own in zip(base["seconds"], result["seconds"]))
        distance = max(abs(b - own) for b, own in zip(base["losses"], result["losses"]))
        memory = {key: round(result[key], 1) for key in ("peak_mib", "saved_mib", "resident_mib")}
        speed = dict(tokens_per_s=round(median, 1), p20=round(p20, 1), p80=round(p80, 1), speedup=round(ratio, 3))
        losses = dict(first_loss=round(result["losses"][0], 4), last_loss=round(result["losses"][-1], 4))
        version = LOADED if provider == "peft_fast" else _version(provider)
        distance = float(f"{distance:.2e}")
        made.append(
            Row(**common, provider=provider, version=version, **speed, **memory, **losses, loss_distance=distance)
        )
    return made


def table(found: list[Row]) -> str:
    head = ("", "tokens/s", "speed", "peak MiB", "kept MiB", "model MiB", "loss, first to last", "largest difference")
    first = found[0]
    lines = [head]
    for row in found:
        peak = f"{row.peak_mib:,.0f} ({row.peak_mib / first.peak_mib:.2f}x)"
        kept = f"{row.saved_mib:,.0f} ({row.saved_mib / first.saved_mib:.2f}x)"
        losses = f"{row.first_loss:.4f} -> {row.last_loss:.4f}"
        distance = "" if row is first else f"{row.loss_distance:.1e}"
        cells = (f"{row.tokens_per_s:,.0f}", f"{row.speedup:.2f}x", peak, kept, f"{row.resident_mib:,.0f}")
        lines.append((row.provider, *cells, losses, distance))
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
    return (
        f"{text}\n\n"
        f"{in_words(found)}\n"
        "tokens/s: median over the steps, which the libraries take in turn. speed: that of the first line is 1, above\n"
        "1 is faster. peak: the most memory that a step takes beside the model and the optimiser (model MiB); kept:\n"
        "what of it a forward keeps for its backward. Last column: by how much a step's loss differs, nats per token."
    )


def in_words(found: list[Row]) -> str:
    """A sentence for each library but the first: what the numbers say."""
    first, sentences = found[0], []
    for row in found[1:]:
        percent = 100 * (row.speedup - 1)
        spread = 100 * (row.p80 - row.p20) / row.tokens_per_s
        speed = f"{abs(percent):.0f} % {'faster' if percent > 0 else 'slower'}"
        if abs(percent) < spread / 2:
            speed = f"as fast, as far as steps that differ by {spread:.0f} % among themselves can tell"
        peak, kept = (100 * (1 - getattr(row, name) / getattr(first, name)) for name in ("peak_mib", "saved_mib"))
        sentences.append(
            f"{row.provider} beside {first.provider}: {speed}; {_less(peak)} memory at the peak of a step, "
            f"{_less(kept)} kept for the\nbackward; losses differ by at most {row.loss_distance:.1e}."
        )
    return "\n".join(sentences) + "\n" if sentences else ""


def _less(percent: float) -> str:
    return f"{abs(percent):.0f} % {'less' if percent >= 0 else 'more'}"


def plot(found: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # writes files, needs no screen
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(11, 1.6 + 0.5 * len(found)), layout="constrained")
    names = [row.provider for row in found][::-1]
    for ax, attribute, label in zip(
        axes,
        ("tokens_per_s", "peak_mib", "saved_mib"),
        ("tokens per second", "peak memory of a step, MiB", "kept for backward, MiB"),
    ):
        values = [getattr(row, attribute) for row in found][::-1]
        bars = ax.barh(names, values, color=["tab:blue" if name == "peft_fast" else "0.6" for name in names])
        ax.bar_label(bars, fmt="{:,.0f}", padding=3)
        ax.set_xlabel(label)
        ax.margins(x=0.2)
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(f"{found[0].setting}\n{found[0].device}", fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)
