"""The benchmarks' harness and picture: a red gate gives no number, the last run of a case is drawn."""

import pytest
import torch

from bench.harness import AGAIN, Case, append, measure, table
from bench.plot import newest, plot, ratios

CPU = torch.device("cpu")


def case(gate=lambda: None, shape: str = "8", slow: int = 20) -> Case:
    x = torch.randn(300, 300)

    def ours() -> object:
        return x @ x

    def theirs() -> object:
        for _ in range(slow):
            ours()
        return None

    return Case("product", shape, torch.float32, "forward", {"peft": theirs, "peft_fast": ours}, gate)


def test_providers_run_in_turn_and_the_baseline_twice():
    rows = {row.provider: row for row in measure(case(), CPU, rounds=5)}
    assert list(rows) == ["peft", "peft_fast", "peft" + AGAIN]
    assert rows["peft"].speedup == 1.0
    assert rows["peft_fast"].speedup > 3
    assert rows["peft_fast"].p20_ms <= rows["peft_fast"].median_ms <= rows["peft_fast"].p80_ms
    assert "peft_fast" in table(list(rows.values()))


def test_a_red_gate_gives_no_number():
    def gate() -> None:
        raise AssertionError("ours is wrong")

    with pytest.raises(AssertionError, match="ours is wrong"):
        next(measure(case(gate), CPU))


def test_rows_are_appended_and_the_last_run_of_a_case_is_drawn(tmp_path):
    path = tmp_path / "machine.csv"
    first, other = (list(measure(case(shape=shape), CPU, rounds=3)) for shape in ("8", "9"))
    append([*first, *other], path)
    again = list(measure(case(slow=1), CPU, rounds=3))
    append(again, path)
    assert len(path.read_text().splitlines()) == 1 + 9
    cases = newest(path)
    assert [shape for _, shape, *_ in cases] == ["9", "8"]
    assert float(cases["product", "8", "float32", "forward"]["peft_fast"]["median_ms"]) == again[1].median_ms
    drawn = {title: ratio for title, _, ratio, *_ in ratios(path)}
    assert drawn["product 9 float32 forward"] < 0.3
    assert plot(path).read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_said(tmp_path):
    path = tmp_path / "machine.csv"
    append(list(measure(case(), CPU, rounds=2))[:1], path)
    with pytest.raises(ValueError, match="no case with peft_fast and a baseline"):
        plot(path)
