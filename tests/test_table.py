"""Who runs what (ops/table.py): a pure function of the call, so it is tested for cards that are not here."""

import sys

import bitsandbytes  # noqa: F401 - its kernels are candidates only where it is loaded
import pytest
import torch

from peft_fast import dispatch
from peft_fast.dispatch import REFERENCE
from peft_fast.ops import Call, choose, table
from peft_fast.quant import bitsandbytes_kernels
from peft_fast.quant.weight import Format

CUDA = torch.device("cuda", 0)
MEMOS = (table._dequantization, table._product, table._product_dx, table._linear, dispatch._choose)


@pytest.fixture
def card(monkeypatch):
    """card(89): from now on there is a GPU of that generation."""

    def put_in(capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: f"card {capability}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: divmod(capability, 10))
        for memo in MEMOS:
            memo.cache_clear()

    yield put_in
    for memo in MEMOS:
        memo.cache_clear()


def call(tokens: int, quant_type="nf4", K=4096, G=64, dtype=torch.bfloat16, p=0.0, trained=True, nested=256) -> Call:
    fmt = str(Format(quant_type, 4096, K, K if quant_type == "int8" else G, dtype, nested)) if quant_type else ""
    return Call(CUDA, dtype, tokens, 4096, K, 16, fmt, p, trained)


def picks(c: Call) -> tuple[str, str, str]:
    """(the product's, lora_linear's forward, its backward)"""
    return table.product(c, "auto").route, table.linear(c, "auto").route, table.linear_backward(c, "auto").route


@pytest.mark.parametrize(
    ("capability", "tokens", "expected"),
    [
        (86, 1, ("fused", "fused", "fused")),
        (86, 8, ("fused", "fused", "fused")),
        (86, 9, ("bitsandbytes", "split", "fused")),
        (86, 64, ("bitsandbytes", "split", "fused")),
        (86, 65, ("dequantize", "split", "fused")),
        (86, 129, ("dequantize", "split", "split")),
        (87, 64, ("fused", "fused", "fused")),  # as the generation before it, but not for bitsandbytes
        (110, 8, ("fused", "fused", "fused")),
        (110, 9, ("dequantize", "split", "split")),
        (89, 128, ("bitsandbytes", "split", "fused")),
        (89, 257, ("dequantize", "split", "split")),
        (90, 16, ("bitsandbytes", "split", "fused")),
        (90, 64, ("dequantize", "split", "split")),
        (100, 9, ("dequantize", "split", "split")),
        (120, 256, ("dequantize", "split", "fused")),
        (89, 4096, ("dequantize", "split", "split")),
    ],
)
def test_the_table_of_4_bits(card, capability, tokens, expected):
    """With dropout, which rules out merging, and without where it would be too early."""
    card(capability)
    assert picks(call(tokens, p=0.1)) == expected
    if tokens < table.MERGE_M:
        assert picks(call(tokens)) == expected


def test_what_bitsandbytes_cannot_take_is_ours(card):
    card(89)
    for other in (call(64, "int8", nested=0), call(64, K=4000), call(64, G=4096, K=4096 * 3 // 2)):
        assert picks(other) == ("fused", "fused", "fused")


def test_what_neither_can_take_is_dequantised(card):
    card(89)
    assert picks(call(64, K=4092, G=64)) == ("dequantize", "split", "split")  # rows begin within a word
    assert picks(call(64, "int8", K=4108, nested=0)) == ("dequantize", "split", "split")


def test_merging(card):
    """16 bits, no dropout, enough tokens, no training; by name also in training, and then in both directions."""
    card(90)
    assert picks(call(table.MERGE_M, trained=False)) == ("dequantize", "merge", "merge")
    assert picks(call(table.MERGE_M))[1:] == ("split", "split")
    assert picks(call(table.MERGE_M - 1, trained=False))[1:] == ("split", "split")
    assert picks(call(4096, p=0.1, trained=False))[1:] == ("split", "split")
    assert picks(call(4096, dtype=torch.float32, trained=False))[1:] == ("split", "split")
    asked = [pick(call(4096), "auto", "merge").route for pick in (table.linear, table.linear_backward)]
    assert asked == ["merge", "merge"]


def test_what_the_merge_kernel_cannot_address_is_not_merged(card):
    card(90)
    wide = call(4096, K=1 << 25)
    assert picks(wide)[1] == "split"
    with pytest.raises(ValueError, match=r"route merge was asked for, but K is 33554432"):
        choose(wide, route="merge")


def test_fp32_has_no_tensor_cores_to_hide_the_decoding_behind(card):
    card(89)
    assert picks(call(8, dtype=torch.float32))[0] == "fused"
    assert picks(call(9, dtype=torch.float32)) == ("dequantize", "split", "split")


def test_small_short_weights_are_multiplied_longer(card):
    card(86)
    short = call(300, K=512, p=0.1)
    assert picks(short._replace(N=4096)) == ("bitsandbytes", "split", "fused")
    assert picks(short._replace(N=1000)) == ("dequantize", "split", "split")
    assert picks(short._replace(N=4096, tokens=321)) == ("dequantize", "split", "split")


def test_bitsandbytes_may_be_loaded_later(monkeypatch):
    fmt, cpu = str(Format("nf4", 64, 128, 64, torch.bfloat16, 256)), torch.device("cpu")
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    assert table.dequantization("auto", cpu, torch.bfloat16, fmt).backend == "torch"
    monkeypatch.undo()
    assert table.dequantization("auto", cpu, torch.bfloat16, fmt).backend == "bitsandbytes"


def test_what_a_forward_and_its_backward_agree_on_does_not_depend_on_bitsandbytes(card, monkeypatch):
    """It may be imported in between. A card and a size where it changes who multiplies, from fused to split."""
    card(86)
    c = call(300, K=512, p=0.1)
    for loaded in (True, False):
        monkeypatch.setattr(bitsandbytes_kernels, "is_loaded", lambda loaded=loaded: loaded)
        assert picks(c) == ("bitsandbytes" if loaded else "fused", "split" if loaded else "fused", "fused")
        for memo in MEMOS:
            memo.cache_clear()
        assert not table.is_split(c, "auto", "auto")
        assert table.is_split(call(4096, K=512, p=0.1), "auto", "auto", backward=True)


def test_an_amd_card_is_no_generation_of_nvidias(card, monkeypatch):
    card(94)
    assert table.generation(CUDA) == 94
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert table.generation(CUDA) == 0
    assert picks(call(16)) == ("dequantize", "reference", "reference")


def test_a_dense_layer_is_split(card):
    card(89)
    for tokens in (1, 64, 4096):
        assert table.linear(call(tokens, quant_type=""), "auto").route == "split"


def test_before_tensor_cores_in_triton(card, monkeypatch):
    """A T4: LoRA in torch, the weight by whatever needs no tl.dot."""
    monkeypatch.setattr(dispatch, "_warned_of_fallback", False)
    card(75)
    half = dict(dtype=torch.float16)
    with pytest.warns(UserWarning, match="older than sm_80"):
        choice = table.linear(call(1, **half), "auto")
    assert choice.route == REFERENCE
    assert choice.because.endswith("no tensor cores; base product: fused by triton")
    assert table.product(call(1, **half), "auto").route == "fused"  # the GEMV
    assert table.product(call(64, **half), "auto").route == "bitsandbytes"
    assert table.product(call(64), "auto").route == "dequantize"  # bf16
    choice = table.product(call(512, **half), "auto")
    assert (choice.route, choice.backend) == ("dequantize", "triton")
    assert table.product_dx(call(1, **half), "auto").route == "dequantize"


def test_every_pick_says_why(card):
    card(89)
    assert choose(call(64)).because == "bitsandbytes: 64 tokens, at most 128 on sm_89 (prior: bitsandbytes' table)"
    assert choose(call(4)).because == "4 tokens, at most 8"
    assert choose(call(1024, p=0.1)).because == "dequantize: card 89 (sm_89)"
    assert choose(call(1024, trained=False)).because == (
        "1024 tokens, at least 256, no dropout, no gradients for the adapter"
    )
    assert choose(call(64), route="merge").because == "asked for"
    assert choose(call(64), "torch").route == REFERENCE


def test_a_route_asked_for_by_name_is_taken_or_refused(card):
    card(89)
    assert choose(call(4096), route="fused").backend == "triton"
    with pytest.raises(ValueError, match="route fused was asked for, but K is 4092, no multiple of 8"):
        choose(call(4096, K=4092), route="fused")
    with pytest.raises(ValueError, match="route merge was asked for, but dropout"):
        choose(call(64, p=0.1), route="merge")
    card(75)
    assert choose(call(64, dtype=torch.float16), route="fused").backend == "torch"


def test_on_a_cpu_bitsandbytes_dequantises_where_it_is_right():
    cpu = torch.device("cpu")

    def backend(fmt: Format, dtype=torch.bfloat16, asked="auto") -> str:
        return table.dequantization(asked, cpu, dtype, str(fmt)).backend

    right = Format("nf4", 64, 128, 64, torch.bfloat16, 256)
    assert backend(right) == "bitsandbytes"
    assert backend(right, asked="torch") == "torch"
    assert backend(right, torch.float64) == "torch"
    for wrong in (dict(K=96), dict(blocksize=2048, K=4096), dict(quant_type="int8", blocksize=128, nested_blocksize=0)):
        assert backend(right._replace(**wrong)) == "torch"


def test_the_limits_are_the_kernels_own():
    from peft_fast.kernels import quant_gemv

    assert table.GEMV_M == quant_gemv.MAX_M
