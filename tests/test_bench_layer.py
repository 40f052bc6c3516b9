"""bench/bench_layer.py on a layer small enough for a test: the libraries agree, and the host's clock is the host's."""

import pytest
import torch

from bench import bench_layer
from bench.harness import measure

CPU = torch.device("cpu")


def test_the_libraries_compute_the_same_layer():
    config = bench_layer.config_for(CPU, 64)
    runs = bench_layer._steps(config, 24, 4, CPU)
    assert list(runs) == [
        "peft", "peft_fast", "peft_fast, norms recomputed", "peft_fast, norms and MLPs recomputed",
    ]  # fmt: skip
    bench_layer._gate(runs)
    broken = {**runs, "peft_fast": lambda: [2 * value for value in runs["peft_fast"]()]}
    with pytest.raises(AssertionError, match="peft_fast"):
        bench_layer._gate(broken)


def test_a_case_of_the_host():
    case = bench_layer.host_case(CPU)
    assert case.host
    rows = list(measure(case, CPU, rounds=2))
    assert [row.op for row in rows] == ["layer_host"] * 5
    assert all(row.median_ms > 0 for row in rows)


def test_a_library_without_a_graph(monkeypatch, capsys):
    def graphed(run):
        return run() or run

    def not_capturable():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(bench_layer, "graphed", graphed)
    assert list(bench_layer.graphs({"peft": not_capturable, "ours": lambda: None})) == ["ours, CUDA graph"]
    assert "no CUDA graph of peft: operation not permitted" in capsys.readouterr().err


def test_widths():
    assert bench_layer.config_for(torch.device("cuda")).hidden_size == 4096
    config = bench_layer.config_for(CPU)
    assert (config.hidden_size, config.num_attention_heads * config.head_dim) == (512, 512)
