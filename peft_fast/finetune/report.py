"""What a run leaves behind for its reader: samples, loss.png and metrics.json."""

import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import torch

from peft_fast.finetune.options import Options

matplotlib.use("Agg")
from matplotlib import pyplot, ticker


def sample(model: Any, tokenizer: Any, prompt: list[int], tokens: int, seed: int) -> str:
    """A continuation of `prompt` by at most `tokens` tokens, as text: drawn at temperature 0.8, the same for a seed."""
    ids = torch.tensor([prompt], device=model.device)
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, temperature=0.8,
            use_cache=True, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)


def quote(title: str, text: str) -> str:
    """A titled, indented block; control characters that would move the terminal's cursor are shown as escapes."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text.replace("\t", "    "))
    return f"{title}\n" + "\n".join(f"    | {line}" for line in shown.split("\n"))


def summary(results: dict[str, Any], folder: Path) -> str:
    """The end of the run in words: samples, losses, speed and where the files are."""
    losses, samples = results["heldout_loss"], results["samples"]
    parts = []
    if samples["after"]:
        parts += [
            quote("prompt", results["prompt"]),
            quote("before", samples["before"]),
            quote("after", samples["after"]),
        ]
    names = {
        "before": "before",
        "after": "after",
        "adapter_disabled": "adapter disabled (must equal before)",
        "reloaded": "reloaded in a fresh process (must equal after)",
    }
    rows = [
        f"  {text:<48}{losses[name]:>10.6f} nats/token{math.exp(losses[name]):>12.3f} perplexity"
        for name, text in names.items()
        if name in losses
    ]
    parts.append("held-out loss\n" + "\n".join(rows))
    parts.append(
        f"{results['tokens_per_second']:,.0f} tokens/s, {results['peak_memory_mib']:,.0f} MiB peak; seconds: "
        + ", ".join(f"{stage.replace('_', ' ')} {seconds:.0f}" for stage, seconds in results["seconds"].items())
    )
    files = ("adapter_model.safetensors", "loss.png", "metrics.json")
    parts.append("written\n" + "\n".join(f"  {folder / name}" for name in files))
    return "\n\n".join(["", *parts])


def loss_figure(path: Path, train: list[tuple[int, float]], heldout: list[tuple[int, float]]) -> None:
    """Draw training loss per step, its running mean, and the held-out loss; all in nats per token."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    steps, losses = zip(*train)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    window = max(1, len(losses) // 20)
    if window > 1:
        means = [sum(losses[i - window : i]) / window for i in range(window, len(losses) + 1)]
        axes.plot(steps[window - 1 :], means, color="tab:blue", label=f"training, mean of {window} steps")
    # Two points alone are not joined: between them the loss did not fall in a straight line.
    axes.plot(*zip(*heldout), "o--" if len(heldout) > 2 else "o", color="tab:red", label="held out")
    for step, loss in (heldout[0], heldout[-1]):
        axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.margins(x=0.05, y=0.12)
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)", title="fine-tuning the adapter")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def write_metrics(path: Path, options: Options, results: dict[str, Any]) -> None:
    """metrics.json: options, versions and results. Infinities and NaN become null, which JSON can say."""
    names = ("peft-fast", "torch", "triton", "transformers", "accelerate", "bitsandbytes", "liger-kernel")
    document = {
        "options": options.to_dict(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        **results,
    }
    path.write_text(json.dumps(_finite(document), indent=1) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
