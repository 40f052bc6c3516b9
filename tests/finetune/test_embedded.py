"""The default model and data: made once, in one piece, without a held-out word in the prose."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from peft_fast.finetune import base_model, embedded


def test_the_base_is_prepared_once_and_in_one_piece(tmp_path, monkeypatch):
    """A tiny recipe of the default model: cached, loadable with transformers' Auto classes, and of the right data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = embedded.Recipe(hidden_size=64, intermediate_size=128, layers=1, heads=2, steps=2, rows=1, context=32)
    made = embedded.prepare(recipe, show_progress=False)
    assert {path.name for path in (tmp_path / "peft_fast").iterdir()} == {Path(made.model).parent.name}
    tokenizer = base_model.load_tokenizer(made.model)
    text = "déjà vu\t\0\r\n" + "".join(map(chr, range(256)))
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert AutoModelForCausalLM.from_pretrained(made.model, local_files_only=True).config.num_hidden_layers == 1

    sources = {path.read_text(errors="replace") for path in embedded.standard_library()}
    train, heldout = (
        {json.loads(line)["text"] for line in Path(path).read_text().splitlines()}
        for path in (made.data, made.eval_data)
    )
    assert train
    assert heldout
    assert not train & heldout
    assert train | heldout <= sources

    monkeypatch.setattr(embedded, "train_base", pytest.fail)
    assert embedded.prepare(recipe, show_progress=False) == made


@pytest.mark.slow
def test_no_paragraph_of_a_heldout_file_is_in_the_prose():
    """Files share docstrings: without care, 4 of the 402 paragraphs of held-out files are (Python 3.11)."""
    recipe = embedded.Recipe()
    paragraphs, _, _ = embedded.collect(recipe)
    files = embedded.standard_library()[:: recipe.heldout_every]
    heldout = {line for path in files for line in embedded.prose(path.read_text(encoding="utf-8", errors="replace"))}
    assert len(heldout) > 100
    assert len(paragraphs) > 1000
    assert heldout.isdisjoint(paragraphs)


def test_prose_is_prose():
    source = '''
def f():
    """Return the sum of all the numbers in the list, ignoring whatever is not a number at all.

    >>> f([1, 2])  # this example of the use of the function is long enough but it is code: 3 == 3
    """
'''
    assert list(embedded.prose(source)) == [
        "Return the sum of all the numbers in the list, ignoring whatever is not a number at all."
    ]
