"""What a reader sees of the jobs: a bar for each, a table at the end, a picture of the losses, and result.json."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peft_fast.files import write_together

from .job import Curve, JobResult
from .running import Running

RESULT = "result.json"


class Bars:
    """A progress bar for each job that is under way: steps, loss, learning rate, the newest evaluation."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._bars: dict[str, tqdm] = {}

    def update(self, running: Running) -> None:
        if not self.shown:
            return
        if running.name not in self._bars:
            self._bars[running.name] = tqdm(
                total=running.total_steps, desc=running.name, unit="step", leave=False, dynamic_ncols=True,
                initial=running.steps,
            )  # fmt: skip
        bar, parts = self._bars[running.name], []
        if running.losses:
            parts = [f"loss {running.losses[-1][1]:.3f} nats/token", f"lr {running.learning_rate:.2e}"]
        if running.evaluations:
            parts.append(f"held out {running.evaluations[-1][1]:.3f}")
        bar.set_postfix_str(", ".join(parts), refresh=False)
        bar.update(running.steps - bar.n)

    def end(self, result: JobResult) -> None:
        """A line in place of the bar."""
        if result.name in self._bars:
            bar = self._bars.pop(result.name)
            bar.refresh()  # the last state, which logs keep: tqdm leaves out updates that follow each other fast
            bar.close()
        if self.shown:
            where = f", written to {result.folder}" if result.folder else ""
            tqdm.write(f"{result.name}: {result.state} after {result.steps:,} steps, {result.reason}{where}")

    def close(self) -> None:
        for name in list(self._bars):
            self._bars.pop(name).close()


HEADINGS = (
    "job", "state", "steps", "tokens", "seconds", "first loss", "last loss", "held out", "learning rate", "adapter",
)  # fmt: skip
UNITS = ("", "", "", "with labels", "s", "nats/token", "nats/token", "nats/token", "at the end", "")


def table(results: Iterable[JobResult]) -> str:
    """A line a job, with units; "held out" is the best evaluation, or, where the last weights are kept, the last."""
    rows = [HEADINGS, UNITS, *map(_cells, results)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    numbers = range(2, 9)
    return "\n".join(
        "  ".join(cell.rjust(w) if i in numbers else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        .rstrip()
        for row in rows
    )  # fmt: skip


def _cells(result: JobResult) -> tuple[str, ...]:
    return (
        result.name,
        result.state,
        f"{result.steps:,}",
        f"{result.tokens:,}",
        f"{result.seconds:.1f}",
        _loss(result.losses[:1]),
        _loss(result.losses[-1:]),
        _loss([p for p in result.evaluations if p[0] == result.weights_of] or result.evaluations[-1:]),
        f"{result.learning_rate:.2e}",
        str(result.folder or "none written"),
    )


def _loss(curve: Curve) -> str:
    return f"{curve[0][1]:.4f}" if curve else "-"


def picture(path: Path, results: Sequence[JobResult]) -> bool:
    """Draw each job's losses. False where there is no matplotlib, or nothing to draw."""
    drawn = [result for result in results if result.losses]
    if not drawn or find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # optional, and takes a second to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, result in enumerate(drawn):
        _curve(axes, result, f"C{number % 10}")
    axes.set(xlabel="optimiser step of the job", ylabel="loss (nats per token)", title="jobs over one base model")
    axes.margins(x=0.03, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _curve(axes: Any, result: JobResult, colour: str) -> None:
    """A running mean over the single steps, which are pale, and points for evaluations."""
    steps, losses = zip(*result.losses)
    window = max(1, len(losses) // 20)
    means = [math.fsum(losses[i - window : i]) / window for i in range(window, len(losses) + 1)]
    if window > 1:
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
    name = result.name if result.state == "finished" else f"{result.name} ({result.state})"
    axes.plot(steps[window - 1 :], means, "o-" if len(means) == 1 else "-", color=colour, label=name)
    if result.evaluations:
        axes.plot(*zip(*result.evaluations), "o--", color=colour, markersize=4, label=f"{result.name}, held out")


def write_result(folder: Path, result: JobResult) -> None:
    """result.json beside the adapter."""
    values = {**asdict(replace(result, error=None)), "folder": str(folder)}  # not all errors can be copied
    del values["error"]
    text = json.dumps(_finite(values), indent=1) + "\n"
    write_together({folder / RESULT: lambda path: path.write_text(text, encoding="utf-8")})


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
