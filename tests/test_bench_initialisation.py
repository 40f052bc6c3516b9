"""bench/initialisation.py: rows of both libraries, none for a wrong start, and the table that is made of them."""

import peft
import pytest
import torch

import peft_fast
from bench import initialisation, readme


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return initialisation.measure(64, 4, "pissa", rounds=2)[0]


def test_rows_and_their_table(rows, tmp_path):
    assert [row.provider for row in rows] == ["peft", "peft_fast"]
    for row in rows:
        assert 0 < row.fastest_s <= row.median_s <= row.slowest_s
        assert (row.size, row.rank, row.start, row.rounds) == (64, 4, "pissa", 2)
        assert row.torch_mib > 0
    assert rows[0].ratio == 1
    path = tmp_path / "machine" / initialisation.FILE
    initialisation.append(rows, path)
    initialisation.append(rows, path)
    assert len(path.read_text().splitlines()) == 1 + 4
    table = readme.starts(tmp_path)
    assert len(table.splitlines()) == 3
    assert f"| pissa | {rows[1].ratio:.2f} | {rows[0].median_s:.2f} / {rows[1].median_s:.2f} |" in table
    assert "Nothing measured yet" in readme.starts(tmp_path / "machine")


def test_the_peak_of_memory_is_seen():
    initialisation.forget_peak()
    before = initialisation.resident()
    torch.zeros(1 << 24)  # 64 MiB, given back at once
    assert initialisation.resident() - before > 60
    initialisation.forget_peak()
    assert initialisation.resident() - before < 32


def test_a_wrong_start_has_no_row(monkeypatch):
    started = initialisation.adapted

    def wrong(library, *arguments):
        layer = started(library, *arguments)
        if library is peft_fast:
            layer.lora_A["default"].weight.data[0] *= 0.5
        return layer

    monkeypatch.setattr(initialisation, "adapted", wrong)
    with pytest.raises(AssertionError, match="base weight and adapter differ from the weight by"):
        initialisation.measure(64, 4, "pissa", rounds=1)


def test_a_start_that_holds_less_is_wrong():
    theirs, less = (
        initialisation.adapted(library, initialisation.layer(64), rank, "pissa")
        for library, rank in ((peft, 8), (peft_fast, 4))
    )
    with pytest.raises(AssertionError, match="of what peft's does"):
        initialisation.check(theirs, less, 64)
