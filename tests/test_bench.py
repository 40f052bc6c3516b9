"""The benchmarks' harness and picture: a red gate gives no number, the last run of a case is drawn."""

import time
from types import SimpleNamespace

import pytest
import torch

from bench import bench_mixed_batch, harness, run
from bench.harness import AGAIN, Case, append, measure, table
from bench.plot import newest, plot, ratios
from peft_fast.testing import relative_error

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


def test_an_error_costs_no_more_than_its_case(tmp_path, monkeypatch):
    """What is measured is in the file at once; the next run has what is missing, and a red gate is missing."""

    def red() -> None:
        raise AssertionError("ours is wrong")

    def cases(device):
        yield from (case(shape="1"), case(red, shape="2"), case(shape="3"))
        raise RuntimeError("no memory for the next")

    path, module = tmp_path / "ops.csv", SimpleNamespace(cases=cases, __name__="bench_x")
    monkeypatch.setattr(run, "LOADED", "abc1234")
    monkeypatch.setattr(harness, "LOADED", "abc1234")
    first = run.Run(CPU, 2, "", path, run.measured(path))
    first.module(module, float("inf"))
    assert first.errors == [
        "product 2: AssertionError: ours is wrong",
        "bench_x: RuntimeError: no memory for the next",
    ]
    assert run.measured(path) == {("product", shape, "float32", "forward") for shape in "13"}
    again = run.Run(CPU, 2, "", path, run.measured(path))
    again.module(module, float("inf"))
    assert again.rows == []
    assert again.errors == first.errors
    late = run.Run(CPU, 2, "", path, set())
    late.module(module, time.perf_counter() - 1)
    assert late.left == ["bench_x from product 1 on"]
    monkeypatch.setattr(run, "LOADED", "def5678")
    assert run.measured(path) == set()


def test_a_machine_without_git(monkeypatch):
    def absent(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.delenv("PEFT_FAST_SHA", raising=False)
    monkeypatch.setattr(harness.subprocess, "run", absent)
    assert harness._loaded() == ""


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_card_without_bf16_is_measured_in_fp16(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert harness.half_of(torch.device("cuda")) == dtype
    assert harness.half_of(torch.device("cpu")) == torch.bfloat16


def test_adapters_on_a_four_bit_base(monkeypatch):
    """The goal for many adapters is in units of an NF4 base's time."""
    assert {("nf4", 8), ("nf4", 64)} <= {(kind, count) for _, count, kind in bench_mixed_batch.SHAPES["cuda"]}
    monkeypatch.setitem(bench_mixed_batch.SHAPES, "cpu", ((256, 3, "nf4"),))
    cases = list(bench_mixed_batch.cases(torch.device("cpu")))
    assert all("nf4" in case.shape for case in cases)
    runs = {name: cases[0].providers[name]() for name in ("peft", "peft_fast", "peft_fast store", "base")}
    for name in ("peft_fast", "peft_fast store"):  # bitsandbytes repacks peft's weights on some CPUs, in bf16
        assert relative_error(runs[name], runs["peft"]) < 0.05, name
    assert relative_error(runs["base"], runs["peft"]) > 0.1
