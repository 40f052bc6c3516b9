"""bench/profile.py: which time is whose, on traces whose answer is known, and on a real one."""

from types import SimpleNamespace

import pytest
import torch

from bench import profile
from bench.compare.options import Options
from bench.profile import CATEGORIES, SCOPE, STEP, Piece, Sizes, attribute, category, pieces_of

SIZES = Sizes(rank=16, vocabulary=1000)
LORA, BASE, HEAD = ((64, 16), (16, 256)), ((64, 256), (256, 512)), ((64, 256), (256, 1000))

KNOWN = {
    "base GEMM": [
        Piece("aten::mm", 1, ("aten::linear", STEP), BASE),
        Piece("bitsandbytes::gemm_4bit", 1, (STEP,), ((64, 256),)),
        Piece("nvjet_hsh_128x256_64x4", 1, ("aten::mm", STEP), BASE, True),
        Piece("aten::mm", 1, ("peft_fast::lora_mlp", SCOPE + "activation", STEP), BASE),
        Piece("quant_matmul_kernel", 1, ("peft_fast::lora_group", STEP), (), True),
    ],
    "dequantise": [
        Piece("bitsandbytes::dequantize_4bit", 1, ("MatMul4Bit", STEP)),
        Piece("kDequantizeBlockwise<bfloat16>", 1, ("bitsandbytes::dequantize_4bit", STEP), (), True),
        Piece("dequantize_kernel", 1, ("peft_fast::lora_mlp", STEP), (), True),
        Piece("aten::add_", 1, ("bitsandbytes::dequantize_blockwise", STEP)),
    ],
    "LoRA": [
        Piece("aten::mm", 1, ("aten::linear", SCOPE + "LoRA", STEP), LORA),
        Piece("aten::mul", 1, (SCOPE + "LoRA", SCOPE + "attention", STEP), ((64, 256),)),
        Piece("lora_down_kernel", 1, ("peft_fast::lora_group", SCOPE + "attention", STEP), (), True),
        Piece("aten::addmm", 1, ("peft_fast::lora_linear", STEP), ((64, 48), (48, 256))),
        Piece("aten::add_", 1, ("peft_fast::lora_linear_backward", STEP), ((64, 256),)),
    ],
    "norms": [
        Piece("aten::pow", 1, (SCOPE + "norms", STEP)),
        Piece("aten::mul", 1, ("aten::rms_norm", "_RMSNorm", STEP)),
        Piece("vectorized_layer_norm_kernel", 1, ("aten::_fused_rms_norm", STEP), (), True),
    ],
    "attention": [
        Piece("aten::_scaled_dot_product_flash_attention_for_cpu", 1, (SCOPE + "attention", STEP)),
        Piece("flash_bwd_kernel", 1, (STEP,), (), True),
        Piece("aten::neg", 1, (SCOPE + "attention", STEP)),  # RoPE
    ],
    "activation": [
        Piece("aten::silu", 1, (SCOPE + "activation", STEP)),
        Piece("aten::mul", 1, ("peft_fast::lora_mlp_backward", STEP), ((1000, 7),)),
        Piece("glu_kernel", 1, ("peft_fast::lora_mlp", STEP), (), True),
    ],
    "loss": [
        Piece("aten::_log_softmax", 1, (STEP,)),
        Piece("aten::mm", 1, ("aten::linear", STEP), HEAD),
    ],
    "optimizer": [Piece("aten::_foreach_add_", 1, ("Optimizer.step#AdamW.step", STEP))],
    "other": [Piece("aten::add", 1, (STEP,)), Piece("a_kernel_of_somebody", 1, ("aten::strange", STEP), (), True)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_pieces(name):
    for piece in KNOWN[name]:
        assert category(piece, SIZES) == name, piece


def test_a_known_trace_adds_up():
    """Every category's time is its pieces', and what no piece accounts for is the host's."""
    found = attribute([piece for pieces in KNOWN.values() for piece in pieces], SIZES, 100.0)
    expected = {name: float(len(KNOWN.get(name, ()))) for name in CATEGORIES}
    assert found == expected | {"host": 100 - sum(expected.values())}
    assert attribute([], SIZES, 5.0)["host"] == 5.0


def event(name, self_us=0.0, parent=None, number=-1, scope=0, kernels=(), shapes=()):
    return SimpleNamespace(
        name=name, self_cpu_time_total=self_us, cpu_time_total=100.0, cpu_parent=parent, sequence_nr=number,
        scope=scope,
        kernels=[SimpleNamespace(name=n, duration=us) for n, us in kernels], input_shapes=shapes,
        device_type=torch.autograd.DeviceType.CPU,
    )  # fmt: skip


def trace(**of_mul):
    """A norm's forward and its backward, which says nothing of norms itself."""
    step = event(STEP)
    scope = event(f"{SCOPE}norms", parent=step)
    forward = event("aten::pow", 3.0, scope, number=7)
    engine = event("autograd::engine::evaluate_function: PowBackward0", 1.0, step, number=7)
    node = event("PowBackward0", 1.0, engine, number=7, scope=1)
    backward, summed = event("aten::mul", 4.0, node, **of_mul), event("aten::add_", 1.0, engine)
    before = event("aten::ones", 0.0, event(f"{SCOPE}attention", parent=step), number=7)  # makes no node itself
    return [
        step,
        before,
        scope,
        forward,
        engine,
        node,
        backward,
        summed,
        event("aten::mul", 50.0),
    ]  # the last is outside of the step


def test_a_backward_is_where_its_forward_is():
    pieces, total = pieces_of(trace())
    assert total == 100.0
    assert sum(piece.us for piece in pieces) == 8.0
    assert attribute(pieces, SIZES, total) == dict.fromkeys(CATEGORIES, 0.0) | {"norms": 8.0, "host": 92.0}


def test_on_a_gpu_kernels_count():
    pieces, total = pieces_of(trace(kernels=[("vectorized_elementwise_kernel", 20.0)]))
    assert [piece.name for piece in pieces] == ["vectorized_elementwise_kernel"]
    assert attribute(pieces, SIZES, total)["norms"] == 20.0


@pytest.mark.slow
def test_a_real_step(tmp_path):
    options = Options("small", 64, 2, 1, 8, 0.0, 4, True, False, False)
    found = profile.profiled({name: (name, options) for name in ("peft", "peft_fast")}, 1)
    for times in found.values():
        assert all(times[name] > 0 for name in CATEGORIES if name != "other")
        assert times["other"] < 0.1 * sum(times.values())
    assert found["peft"]["LoRA"] > 0.5 * found["peft_fast"]["LoRA"]
    assert "base GEMM" in profile.table(found)
    profile.append(found, options, torch.device("cpu"), tmp_path / "profile.csv")
    assert len((tmp_path / "profile.csv").read_text().splitlines()) == 1 + 2 * len(CATEGORIES)
    profile.plot(found, "test", tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_few_tokens_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["profile", "--seq-len", "8", "--batch-size", "1", "--rank", "4"])
    with pytest.raises(SystemExit):
        profile.main()
    assert "more than 12 tokens, got 8" in capsys.readouterr().err
