"""The default model and data, made on this machine from Python's standard library: no download, no licence to read.

The base model is a byte-level Llama of 4.9 million parameters, trained here for about a minute on English prose (the
paragraphs of the library's docstrings) and cached. The domain to adapt it to is the library's source code, split by
file into training and held-out files; no paragraph of a held-out file's docstrings is in the prose.

The cache is $XDG_CACHE_HOME/peft_fast (~/.cache/peft_fast), one folder per recipe and build of Python.
"""

import ast
import hashlib
import json
import os
import random
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Folders of the standard library without prose or ordinary code, or which some distributions leave out.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "encodings",
                   "ensurepip", "pydoc_data", "lib-dynload", "__pycache__"}  # fmt: skip
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """What the base model is and how it is trained. A changed value is another folder in the cache.

    All layer widths are multiples of 64, the NF4 block: no block then crosses a row of a weight. `revision` is raised
    when this file makes something else of the same values.
    """

    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 6
    heads: int = 4
    max_length: int = 1024  # tokens that the position embedding covers
    context: int = 128  # tokens per training row
    rows: int = 8  # per step
    steps: int = 90
    # Muon for the matrices: at this length AdamW alone ends 0.5 nats per byte higher (2.10 against 1.55, 300 steps).
    matrix_learning_rate: float = 5e-3
    other_learning_rate: float = 5e-3  # AdamW, for embedding and norms
    seed: int = 0
    heldout_every: int = 12  # of the library's files, one in so many is held out
    code_bytes: int = 400_000  # training files are taken up to this size in total
    heldout_bytes: int = 40_000
    revision: int = 2  # 1: a few paragraphs of held-out files were in the prose


@dataclass(frozen=True)
class Embedded:
    """Paths of the default model directory and of its data, .jsonl files with `text`."""

    model: str
    data: str
    eval_data: str


def standard_library() -> list[Path]:
    """The .py files of the standard library, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def prose(source: str) -> Iterator[str]:
    """The paragraphs of a module's docstrings that read as English: no examples, tables or signatures."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                line = " ".join(paragraph.split())
                wordlike = sum(character.isalpha() or character == " " for character in line)
                if len(line) >= 80 and line[0].isupper() and line.isascii() and wordlike >= 0.92 * len(line):
                    yield line


def collect(recipe: Recipe) -> tuple[list[str], list[str], list[str]]:
    """(prose paragraphs, training files' code, held-out files' code), in an order that the seed fixes.

    Files share docstrings: a paragraph that is in a held-out file too is not in the prose.
    """
    paragraphs: dict[str, None] = {}  # a set that keeps its order: inherited docstrings occur many times
    code: list[str] = []
    heldout: list[str] = []
    kept_back: set[str] = set()
    for index, path in enumerate(standard_library()):
        source = path.read_text(encoding="utf-8", errors="replace")
        if index % recipe.heldout_every == 0:
            heldout.append(source)
            kept_back.update(prose(source))
        else:
            code.append(source)
            paragraphs.update(dict.fromkeys(prose(source)))
    shuffled = [paragraph for paragraph in paragraphs if paragraph not in kept_back]
    random.Random(recipe.seed).shuffle(shuffled)
    return shuffled, _up_to(code, recipe.code_bytes, recipe.seed), _up_to(heldout, recipe.heldout_bytes, recipe.seed)


def _up_to(sources: list[str], limit: int, seed: int) -> list[str]:
    """Sources in random order until `limit` bytes are reached; none longer than a tenth of that, for variety."""
    fitting = [source for source in sources if 0 < len(source.encode()) <= limit // 10]
    random.Random(seed).shuffle(fitting)
    chosen, size = [], 0
    for source in fitting:
        size += len(source.encode())
        if size > limit:
            break
        chosen.append(source)
    return chosen


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte (ids 0 to 255 in byte order) and an end-of-text token.

    A real one, of the `tokenizers` library, so that it saves and loads like any other model's.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these bytes stand for themselves in ByteLevel
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(BPE(vocab={symbols[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=max_length
    )


def train_base(recipe: Recipe, text: str, *, show_progress: bool) -> LlamaForCausalLM:
    """A Llama trained on `text` for `recipe.steps` steps, in bf16 where the CPU has it, on the CPU."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=257, hidden_size=recipe.hidden_size, intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.max_length, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim < 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=recipe.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _trapezoid(step, recipe.steps))
        for optimizer in (muon, adamw)
    ]
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(recipe.seed)
    bar = tqdm(range(recipe.steps), desc="base model", unit="step", disable=not show_progress, dynamic_ncols=True)
    for _ in bar:
        starts = torch.randint(len(data) - recipe.context, (recipe.rows,), generator=generator)
        batch = torch.stack([data[start : start + recipe.context] for start in starts]).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.2f} nats/byte", refresh=False)
    return model.eval()


def _trapezoid(step: int, steps: int) -> float:
    """Factor on the learning rate: up over 10 steps, flat, and down to 0 over the second half."""
    return min(1.0, (step + 1) / 10, (steps - step) / (steps / 2))


def cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_fast"


def prepare(recipe: Recipe | None = None, *, show_progress: bool = True) -> Embedded:
    """The default model and data, from the cache or made now (about a minute on two cores).

    Written beside its place and then renamed: an interrupted call leaves no half-made folder that a later one takes.
    """
    recipe = recipe or Recipe()
    key = hashlib.sha256(f"{sys.version} {recipe}".encode()).hexdigest()[:16]
    folder = cache_root() / f"default-{key}"
    if not folder.is_dir():
        paragraphs, code, heldout = collect(recipe)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as scratch:
            new = Path(scratch) / "new"
            train_base(recipe, "\n\n".join(paragraphs), show_progress=show_progress).save_pretrained(new / "model")
            byte_tokenizer(recipe.max_length).save_pretrained(new / "model")
            for name, sources in (("train", code), ("heldout", heldout)):
                lines = (json.dumps({"text": source}) + "\n" for source in sources)
                (new / f"code-{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            if not folder.is_dir():  # another process may have been faster
                new.rename(folder)
    return Embedded(str(folder / "model"), str(folder / "code-train.jsonl"), str(folder / "code-heldout.jsonl"))
