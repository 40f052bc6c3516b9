"""Text files -> rows of tokens: reading, tokenising with a loss mask, splitting, packing, batching.

A row is a dict of equally long lists: `input_ids`, `labels` (-100 where nothing is learnt) and, when packed,
`position_ids`. Labels are not shifted: the model predicts labels[i + 1] at position i.
"""

import json
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_fast.finetune.options import Options, UserError

IGNORED = -100  # the label that torch's cross entropy skips
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Span:
    """A stretch of a record's text and whether it is what the model should learn to write."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Record:
    """One training document: its spans in order. `is_prose` documents may be cut anywhere; dialogues may not.

    `has_markup`: the text already holds the tokenizer's special tokens (a rendered chat template).
    """

    spans: tuple[Span, ...]
    is_prose: bool
    has_markup: bool = False


@dataclass(frozen=True)
class Corpus:
    """Rows of training and held-out data, and what happened on the way there."""

    train: list[Row]
    heldout: list[Row]
    notes: tuple[str, ...]
    opening: list[int]  # how the first held-out row begins: a prompt for the samples


def read_records(path: str | Path, tokenizer: Any) -> list[Record]:
    """All records of a .txt or .jsonl file. Raises UserError naming the line that is wrong."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    if path.suffix == ".txt":
        records = [Record((Span(text, True),), is_prose=True)] if text.strip() else []
    else:
        lines = enumerate(text.split("\n"), start=1)
        records = [_parse_line(line, f"{path}:{number}", tokenizer) for number, line in lines if line.strip()]
    if not records:
        raise UserError(f"{path} holds no text")
    return records


def _parse_line(line: str, where: str, tokenizer: Any) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object per line ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where}: a line must be a JSON object, got {type(fields).__name__}")
    if "messages" in fields:
        return Record(tuple(_render_chat(fields["messages"], where, tokenizer)), is_prose=False, has_markup=True)
    names = ("prompt", "completion") if "prompt" in fields or "completion" in fields else ("text",)
    for name in names:
        if not isinstance(fields.get(name), str):
            raise UserError(
                f"{where}: `{name}` must be a string, got {type(fields.get(name)).__name__} among the keys "
                f"{sorted(fields)}; a line holds `text`, or `prompt` and `completion`, or `messages`"
            )
    spans = tuple(Span(fields[name], learnt=name != "prompt") for name in names)
    return Record(spans, is_prose=names == ("text",))


def _render_chat(messages: Any, where: str, tokenizer: Any) -> list[Span]:
    """Spans of a conversation: the assistant's turns are learnt, everything that the template adds before them not."""
    if not (isinstance(messages, list) and all(isinstance(turn, dict) and "role" in turn for turn in messages)):
        raise UserError(f"{where}: `messages` must be a list of objects with `role` and `content`")
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: `messages` need a chat template and this tokenizer has none; use an instruction-tuned model, "
            "put a chat_template.jinja into the model's folder, or give `prompt` and `completion`"
        )
    spans, done = [], ""
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UserError(
                f"{where}: the chat template rewrites earlier turns once later ones follow (some drop old reasoning), "
                "so the assistant's turns cannot be told apart; split the conversation at its assistant turns"
            )
        spans += [Span(before[len(done) :], learnt=False), Span(after[len(before) :], learnt=True)]
        done = after
    if not spans:
        raise UserError(f"{where}: `messages` hold no turn of the assistant, so there is nothing to learn")
    return spans


def encode(record: Record, tokenizer: Any, mask_prompt: bool) -> Row:
    """Tokens of a whole record, end-of-text token included, and labels.

    The spans are tokenised as one text, so that tokens are those the model meets in use; a token belongs to the span
    in which it starts.
    """
    text = "".join(span.text for span in record.spans)
    tokens = tokenizer(text, add_special_tokens=not record.has_markup, return_offsets_mapping=True)
    ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
    ends, learnt, end = [], [], 0
    for span in record.spans:
        end += len(span.text)
        ends.append(end)
        learnt.append(span.learnt or not mask_prompt)
    # A special token put in front covers no text, (0, 0): it belongs to the first span, and is never predicted anyway.
    labels = [
        token if learnt[min(bisect_left(ends, start + 1), len(ends) - 1)] else IGNORED
        for token, (start, _) in zip(ids, offsets)
    ]
    eos = tokenizer.eos_token_id
    if not record.has_markup and eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
        labels.append(eos)
    return {"input_ids": ids, "labels": labels}


def cut(row: Row, length: int, is_prose: bool) -> list[Row]:
    """Pieces of at most `length` tokens: all of a text, the beginning of a dialogue. Without a label: no piece."""
    size = len(row["input_ids"])
    starts = range(0, size, length) if is_prose else range(1)
    pieces = [{key: values[start : start + length] for key, values in row.items()} for start in starts]
    return [piece for piece in pieces if any(label != IGNORED for label in piece["labels"][1:])]


def split(documents: Sequence[list[Row]], fraction: float, seed: int) -> tuple[list[list[Row]], list[list[Row]]]:
    """(train, held out). Whole documents are held out, so that no part of one is learnt; where there are fewer than
    two per 1/fraction (one .txt file, say), the pieces of the documents are shared out instead."""
    if len(documents) < 2 / fraction:
        documents = [[piece] for pieces in documents for piece in pieces]
    if len(documents) < 2:
        raise UserError("one piece of text cannot be split into training and held-out data; give --eval-data")
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    heldout = set(order[:count])
    return (
        [pieces for index, pieces in enumerate(documents) if index not in heldout],
        [pieces for index, pieces in enumerate(documents) if index in heldout],
    )


def pack(rows: Iterable[Row], length: int) -> list[Row]:
    """Rows of at most `length` tokens, several documents in each (best fit, longest first); position ids restart."""
    packed: list[Row] = []
    free: list[tuple[int, int]] = []  # (tokens still free, index in packed), sorted
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        size = len(row["input_ids"])
        slot = bisect_left(free, (size, 0))
        if slot == len(free):
            packed.append({"input_ids": [], "labels": [], "position_ids": []})
            space, index = length, len(packed) - 1
        else:
            space, index = free.pop(slot)
        packed[index]["input_ids"] += row["input_ids"]
        packed[index]["labels"] += [IGNORED, *row["labels"][1:]]  # else the document before would predict it
        packed[index]["position_ids"] += range(size)
        insort(free, (space - size, index))
    return packed


def collator(pad_token_id: int, flatten: bool = False) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
    """A function from rows to a batch of int64 tensors [B, L], L the longest row, padded on the right.

    Packed rows get no attention mask: transformers reads the documents' borders from position ids only without one.
    Their padding counts as one more document. `flatten` makes it [1, B*L], as flash attention's variable-length path
    wants it.
    """

    def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        missing = [length - len(row["input_ids"]) for row in rows]
        columns = {
            "input_ids": [row["input_ids"] + [pad_token_id] * n for row, n in zip(rows, missing)],
            "labels": [row["labels"] + [IGNORED] * n for row, n in zip(rows, missing)],
        }
        if "position_ids" in rows[0]:
            columns["position_ids"] = [row["position_ids"] + list(range(n)) for row, n in zip(rows, missing)]
        else:
            columns["attention_mask"] = [[1] * (length - n) + [0] * n for n in missing]
        batch = {key: torch.tensor(values) for key, values in columns.items()}
        return {key: values.reshape(1, -1) for key, values in batch.items()} if flatten else batch

    return collate


def load(options: Options, tokenizer: Any) -> Corpus:
    """Training and held-out rows of at most `options.sequence_length` tokens.

    Raises:
        UserError: a file that is no text, a line of another form, nothing left to learn or to hold out, or prompts to
            be masked in data without any.
    """
    notes: list[str] = []
    documents = _documents(options.data, options, tokenizer, notes)
    if options.eval_data:
        heldout = _documents(options.eval_data, options, tokenizer, notes)
    else:
        documents, heldout = split(documents, options.eval_fraction, options.seed)
    train_rows, heldout_rows = ([row for pieces in part for row in pieces] for part in (documents, heldout))
    for name, rows in (("training", train_rows), ("held-out", heldout_rows)):
        tokens = sum(len(row["input_ids"]) for row in rows)
        learnt = sum(label != IGNORED for row in rows for label in row["labels"][1:])
        notes.append(f"{name}: {len(rows):,} rows, {tokens:,} tokens, {learnt:,} of them predicted")
    opening = _opening(heldout_rows[0])
    if options.packing:
        train_rows, heldout_rows = (pack(rows, options.sequence_length) for rows in (train_rows, heldout_rows))
        notes.append(f"packed into {len(train_rows):,} training and {len(heldout_rows):,} held-out rows")
    return Corpus(train_rows, heldout_rows, tuple(notes), opening)


def _documents(files: Sequence[str], options: Options, tokenizer: Any, notes: list[str]) -> list[list[Row]]:
    """The pieces of each record of these files; what was cut off or left out goes into `notes`."""
    documents, total, unmasked, shortened, empty = [], 0, 0, 0, 0
    for record in (record for path in files for record in read_records(path, tokenizer)):
        row = encode(record, tokenizer, options.mask_prompt)
        total += 1
        unmasked += all(span.learnt or not span.text for span in record.spans)
        pieces = cut(row, options.sequence_length, record.is_prose)
        shortened += not record.is_prose and len(row["input_ids"]) > options.sequence_length
        empty += not pieces
        if pieces:
            documents.append(pieces)
    if options.mask_prompt and unmasked == total:
        raise UserError(
            f"--mask-prompt found no prompt in {', '.join(files)}: only records with `prompt` and `completion` or with "
            "`messages` have a part to mask; leave it out"
        )
    if options.mask_prompt and unmasked:
        notes.append(f"{unmasked} of {total} records have no prompt to mask: their whole text is learnt")
    limit = f"--sequence-length {options.sequence_length}"
    if shortened:
        notes.append(f"{shortened} records lost their end: they are longer than {limit}")
    if empty:
        notes.append(f"{empty} records were left out: nothing to learn in them within {limit}")
    if not documents:
        raise UserError(f"nothing to learn in {', '.join(files)} within {limit}; raise it or leave out --mask-prompt")
    return documents


def _opening(row: Row) -> list[int]:
    """The prompt of a row whose prompt is masked, else its first tokens."""
    prompt = next(index for index, label in enumerate(row["labels"]) if label != IGNORED)
    return row["input_ids"][: prompt or min(32, len(row["input_ids"]) // 2)]
