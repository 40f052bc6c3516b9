"""peft_fast.finetune.data: records, loss masks, cutting, splitting, packing, batches."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fast.finetune import data, embedded
from peft_fast.finetune.data import IGNORED
from peft_fast.finetune.options import UserError, parse

EOS = 256
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Drops every assistant turn but the last, as templates of reasoning models do with old reasoning.
FORGETFUL_CHAT = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return embedded.byte_tokenizer(1024)


@pytest.fixture
def write(tmp_path):
    def write(name: str, *lines) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        return path

    return write


def learnt(row: data.Row) -> str:
    return bytes(label for label in row["labels"] if label not in (IGNORED, EOS)).decode()


def text(row: data.Row) -> str:
    return bytes(token for token in row["input_ids"] if token != EOS).decode()


@pytest.mark.parametrize(
    ("line", "whole", "completion"),
    [
        pytest.param({"text": "Some text."}, "Some text.", "Some text.", id="text"),
        pytest.param({"prompt": "2 + 2 = ", "completion": "4 ü"}, "2 + 2 = 4 ü", "4 ü", id="prompt-completion"),
        pytest.param(
            {"prompt": "", "completion": "out of nothing"}, "out of nothing", "out of nothing", id="no-prompt"
        ),
        pytest.param(
            {"messages": [{"role": r, "content": c} for r, c in zip(("system", "user", "assistant") * 2, "abcdef")]},
            "<system>a</><user>b</><assistant>c</><system>d</><user>e</><assistant>f</>",
            "c</>f</>",
            id="messages",
        ),
    ],
)
def test_formats_and_masks(write, tokenizer, line, whole, completion):
    tokenizer.chat_template = CHAT
    (record,) = data.read_records(write("d.jsonl", line), tokenizer)
    row = data.encode(record, tokenizer, mask_prompt=False)
    assert text(row) == whole
    assert row["labels"] == row["input_ids"]
    masked = data.encode(record, tokenizer, mask_prompt=True)
    assert masked["input_ids"] == row["input_ids"]
    assert learnt(masked) == completion
    # A chat template ends turns in its own way; everything else learns to stop.
    assert (masked["labels"][-1] == EOS) is ("messages" not in line)


def test_a_beginning_of_text_token_is_masked_with_the_prompt(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOS)]
    )
    record = data.Record((data.Span("ask ", False), data.Span("say", True)), is_prose=False)
    row = data.encode(record, tokenizer, mask_prompt=True)
    assert row["input_ids"] == [EOS, *b"ask say", EOS]
    assert row["labels"] == [IGNORED] * 5 + [*b"say", EOS]


def test_a_text_file_is_one_document(write, tokenizer):
    (record,) = data.read_records(write("d.txt", "One.", "", "Two."), tokenizer)
    assert record.is_prose
    assert text(data.encode(record, tokenizer, mask_prompt=True)) == "One.\n\nTwo.\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object per line"),
        ("[1]", "must be a JSON object, got list"),
        ({"txt": "a"}, "`text` must be a string, got NoneType among the keys ['txt']"),
        ({"prompt": "a"}, "`completion` must be a string"),
        ({"prompt": "a", "completion": 1}, "`completion` must be a string, got int"),
        ({"messages": "hi"}, "must be a list of objects"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no turn of the assistant"),
    ],
)
def test_wrong_lines_are_named(write, tokenizer, line, message):
    tokenizer.chat_template = CHAT
    path = write("d.jsonl", {"text": "fine"}, "", line)
    with pytest.raises(UserError) as raised:
        data.read_records(path, tokenizer)
    assert f"{path}:3: " in str(raised.value)
    assert message in str(raised.value)


def test_chat_templates_that_cannot_serve_are_refused(write, tokenizer):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    path = write("d.jsonl", {"messages": turns})
    with pytest.raises(UserError, match="this tokenizer has none"):
        data.read_records(path, tokenizer)
    tokenizer.chat_template = FORGETFUL_CHAT
    with pytest.raises(UserError, match="rewrites earlier turns"):
        data.read_records(path, tokenizer)


def test_files_without_text_are_refused(write, tmp_path, tokenizer):
    with pytest.raises(UserError, match="holds no text"):
        data.read_records(write("d.txt", "  "), tokenizer)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        data.read_records(tmp_path / "latin.txt", tokenizer)


def test_cutting():
    row = {"input_ids": list(range(10)), "labels": [IGNORED] * 4 + list(range(4, 10))}
    pieces = data.cut(row, 4, is_prose=True)
    assert [piece["input_ids"] for piece in pieces] == [[4, 5, 6, 7], [8, 9]]  # nothing to learn in 0 to 3
    assert data.cut(row, 6, is_prose=False) == [{"input_ids": list(range(6)), "labels": [IGNORED] * 4 + [4, 5]}]
    assert data.cut(row, 4, is_prose=False) == []
    assert data.cut({"input_ids": [7], "labels": [7]}, 4, is_prose=True) == []  # the first token is never predicted


def test_splitting():
    pieces = [[{"input_ids": [i, j], "labels": [i, j]} for j in range(3)] for i in range(40)]
    train, heldout = data.split(pieces, 0.1, seed=0)
    assert (len(train), len(heldout)) == (36, 4)
    assert sorted(document[0]["input_ids"][0] for document in train + heldout) == list(range(40))
    assert all(len(document) == 3 for document in heldout)
    assert data.split(pieces, 0.1, seed=0) == (train, heldout)
    assert data.split(pieces, 0.1, seed=1)[1] != heldout
    # One long document: its pieces are shared out.
    train, heldout = data.split([[{"input_ids": [i], "labels": [i]} for i in range(20)]], 0.1, seed=0)
    assert (len(train), len(heldout)) == (18, 2)
    with pytest.raises(UserError, match="--eval-data"):
        data.split([[{"input_ids": [1], "labels": [1]}]], 0.1, seed=0)


def test_packing_keeps_every_token_and_masks_the_borders():
    lengths = [3, 9, 5, 1, 8, 2, 7, 10]
    rows = [{"input_ids": [100 * n + i for i in range(n)], "labels": list(range(n))} for n in lengths]
    packed = data.pack(rows, 10)
    assert len(packed) == 5  # 45 tokens: 10, 9+1, 8+2, 7+3, 5
    documents = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 10
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])]):
            documents.append(row["input_ids"][start:end])
            assert row["labels"][start] == IGNORED
            assert row["labels"][start + 1 : end] == list(range(1, end - start))
    assert sorted(documents) == sorted(row["input_ids"] for row in rows)


def test_batches():
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = data.collator(0)(rows)
    assert {key: values.tolist() for key, values in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 0, 0]],
        "labels": [[IGNORED, 2, 3], [4, IGNORED, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    packed = data.collator(0, flatten=True)([{**rows[0], "position_ids": [0, 1, 0]}, {**rows[1], "position_ids": [0]}])
    assert packed["position_ids"].tolist() == [[0, 1, 0, 0, 0, 1]]
    assert "attention_mask" not in packed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flatten", [False, True])
def test_packed_documents_have_the_loss_that_they_have_alone(attention, flatten):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = [torch.randint(64, (length,)).tolist() for length in (9, 6, 4, 7, 5, 3)]
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in ids]
    packed = data.collator(0, flatten)(data.pack(rows, 14))
    assert packed["input_ids"].shape[0] == (1 if flatten else 3)
    with torch.no_grad():
        alone = [model(**data.collator(0)([row])).loss.item() * (len(row["input_ids"]) - 1) for row in rows]
        together = model(**packed).loss.item()
    assert together == pytest.approx(sum(alone) / sum(len(tokens) - 1 for tokens in ids), rel=1e-5)


def test_masking_prompts_where_there_are_none(write, tokenizer):
    """Nothing to mask at all is refused; records without a prompt among others are counted."""
    texts = [{"text": "some text"}, {"prompt": "", "completion": "out of nothing"}, {"text": "more text"}]
    path = write("texts.jsonl", *texts)
    given = ["--model", str(path.parent), "--mask-prompt", "--eval-fraction", "0.3", "--data", str(path)]
    with pytest.raises(UserError, match=r"--mask-prompt found no prompt in .*texts\.jsonl"):
        data.load(parse(given), tokenizer)
    mixed = write("mixed.jsonl", *texts, {"prompt": "p", "completion": "c"})
    corpus = data.load(parse([*given, str(mixed)]), tokenizer)
    assert corpus.notes[0] == "6 of 7 records have no prompt to mask: their whole text is learnt"
    assert "no prompt" not in corpus.notes[1]
    unmasked = data.load(replace(parse(given), mask_prompt=False), tokenizer)
    assert not any("no prompt" in note for note in unmasked.notes)


def test_loading_says_what_was_cut(write, tokenizer):
    path = write("d.jsonl", *({"prompt": "p" * n, "completion": "c" * n} for n in (3, 10, 30, 3, 3, 6)))
    options = parse(["--model", str(path.parent), "--data", str(path), "--sequence-length", "16", "--mask-prompt"])
    corpus = data.load(replace(options, eval_fraction=0.2), tokenizer)
    assert len(corpus.train) + len(corpus.heldout) == 5
    assert corpus.notes[0] == "2 records lost their end: they are longer than --sequence-length 16"
    assert corpus.notes[1].startswith("1 records were left out: nothing to learn")
    assert set(bytes(corpus.opening)) == {ord("p")}
    packed = data.load(replace(options, eval_fraction=0.2, packing=True), tokenizer)
    assert len(packed.train) < len(corpus.train)
    assert packed.notes[-1].startswith("packed into")
    explicit = data.load(replace(options, eval_data=(str(path),)), tokenizer)
    assert len(explicit.train) == len(explicit.heldout) == 5
