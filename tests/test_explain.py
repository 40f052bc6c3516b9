"""explain(model): a row per adapted layer, true to what the next forward does."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from peft_fast import LoraConfig, explain, get_peft_model, quantize_linear_layers, use_backend
from peft_fast.dispatch import TritonUnsupported


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.q = nn.Linear(64, 64)
        self.k = bnb.nn.Linear4bit(64, 64, quant_type="fp4", compress_statistics=False) if kind == "bnb" else self.q
        self.rest = nn.Linear(64, 64)

    def forward(self, x):
        return self.rest(self.k(self.q(x)))


def adapted(kind: str):
    model = Net(kind).to("cpu")
    if kind == "ours":
        model = quantize_linear_layers(Net(kind))
    return get_peft_model(model, LoraConfig(target_modules=["q", "k"]))


def test_one_row_per_layer_with_name_format_route_and_reason(capsys):
    explanation = explain(adapted("bnb"))
    assert capsys.readouterr().out == f"{explanation}\n"
    rows = {row.name: row for row in explanation.rows}
    assert list(rows) == ["base_model.model.q", "base_model.model.k"]
    assert rows["base_model.model.q"].base == "float32"
    assert rows["base_model.model.k"].base == "fp4, blocks of 64, plain scales"
    assert {row.route for row in rows.values()} == {"reference"}
    assert rows["base_model.model.q"].because == "the tensors are on the CPU"
    by_bitsandbytes = "the tensors are on the CPU; base product: dequantize by bitsandbytes"
    assert rows["base_model.model.k"].because == by_bitsandbytes
    first = str(explanation).splitlines()[0]
    assert first.split() == ["layer", "base", "weight", "route", "because"]


def test_our_own_quantised_layers():
    (row, *_) = explain(adapted("ours"), show=False).rows
    assert row.base == "nf4, blocks of 64, nested scales"


def test_8_bit_layers():
    model = get_peft_model(quantize_linear_layers(Net("ours"), bits=8), LoraConfig(target_modules=["q", "k"]))
    (row, *_) = explain(model, show=False).rows
    assert (row.base, row.because) == ("int8, a scale a row", "the tensors are on the CPU")


def test_it_follows_the_tokens(monkeypatch):
    """As on a GPU: generating, a short batch, a long one."""
    from bench.counts import as_on_a_gpu

    model = adapted("ours").eval()
    with as_on_a_gpu(), torch.no_grad():
        routes = [explain(model, tokens=tokens, show=False).rows[0].route for tokens in (1, 64, 4096)]
    assert routes == ["fused", "split", "split"]  # fp32; in 16 bits the last is merge (test_table.py)


def test_it_follows_the_backend_that_is_asked_for():
    model = adapted("dense")
    with use_backend("torch"):
        assert {row.because for row in explain(model, show=False).rows} == {"backend torch was asked for"}
    model.base_model.model.q.backend = "torch"
    assert explain(model, show=False).rows[0].because == "backend torch was asked for"
    model.base_model.model.q.backend = "triton"
    row = explain(model, show=False).rows[0]
    assert row.route == "refused"
    assert "the tensors are on the CPU" in row.because
    with pytest.raises(TritonUnsupported):
        model(torch.randn(2, 64))


def test_a_base_layer_that_would_refuse_is_shown_to():
    model = adapted("ours")
    model.base_model.model.k.backend = "triton"
    with model.disable_adapter():
        assert explain(model, show=False).rows[-1].route == "refused"
        with pytest.raises(TritonUnsupported):
            model(torch.randn(2, 64))


def test_merging_follows_what_is_trained_not_the_mode():
    """A small layer: merged where nothing of it is trained, in forwards with and without gradients alike."""
    from bench.counts import as_on_a_gpu

    model = get_peft_model(quantize_linear_layers(Net("ours").bfloat16()), LoraConfig(target_modules=["q", "k"]))

    def route():
        return explain(model, tokens=512, show=False).rows[0].route

    with as_on_a_gpu():
        for train, grad in [(True, True), (True, False), (False, True), (False, False)]:
            with torch.set_grad_enabled(grad):
                model.train(train).requires_grad_(False)
                assert route() == "merge"
                model.set_adapter("default")
                assert route() == "split"
        with torch.autocast("cpu", torch.float16):
            assert route() == "split"


def test_layers_without_an_adapter_in_effect():
    model = adapted("dense")
    with model.disable_adapter():
        assert {row.route for row in explain(model, show=False).rows} == {"base"}
    model.merge_adapter()
    assert {row.route for row in explain(model, show=False).rows} == {"base"}


def test_a_model_without_adapters():
    assert str(explain(nn.Linear(2, 2), show=False)).startswith("no adapted layer")
