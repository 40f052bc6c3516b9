"""The memory of a step as peft_fast/memory.py calculates it, beside what torch's profiler measures; bench/memory.py,
which asks it about models of published shapes."""

import copy

import peft
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, Qwen3Config

import peft_fast
from bench import memory as bench_memory
from bench.compare.models import config_of
from bench.fake import meta_model, without_data
from bench.memory import WAYS, Calculated, Recipe
from bench.memory_peak import peak
from bench.memory_saved import VOCABULARY, llama
from peft_fast import estimate_memory
from peft_fast.memory import nbytes, step_memory, weights_of

# library, bits, dtype, autocast, hidden, layers, rows, tokens, dropout, what is computed again
MEASURED = [
    (peft_fast, "4-bit", torch.bfloat16, True, 128, 3, 2, 64, 0.0, ()),
    (peft_fast, "4-bit", torch.bfloat16, False, 256, 2, 1, 192, 0.1, ()),
    (peft_fast, "4-bit", torch.bfloat16, True, 128, 4, 3, 50, 0.0, ("norms",)),
    (peft_fast, "4-bit", torch.bfloat16, False, 192, 3, 2, 64, 0.0, ("norms", "mlps")),
    (peft_fast, "4-bit", torch.bfloat16, True, 128, 4, 2, 64, 0.0, ("layers",)),
    (peft_fast, "dense", torch.float32, False, 128, 3, 2, 64, 0.0, ()),
    (peft_fast, "dense", torch.float32, False, 128, 4, 2, 96, 0.05, ("layers", "norms", "mlps")),
    (peft, "4-bit", torch.bfloat16, True, 128, 3, 2, 64, 0.0, ()),
    (peft, "dense", torch.float32, False, 128, 4, 2, 64, 0.1, ("layers",)),
]


def adapted(library, base, dtype, hidden, layers, p, again):
    model = llama(hidden, layers, base).to(dtype) if base == "dense" else llama(hidden, layers, base)
    model.config.use_cache = False
    if "layers" in again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    config = library.LoraConfig(r=8, lora_dropout=p, target_modules="all-linear", task_type="CAUSAL_LM")
    model = library.get_peft_model(model, config).train()
    if {"norms", "mlps"} & set(again):
        peft_fast.set_recompute(model, norms="norms" in again, mlps="mlps" in again)
    return model


def measured(model, ids, autocast) -> int:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    step()  # what is made once, by whatever
    model.zero_grad()
    return peak(step)


QUICK = (2, 3, 4, 7)
CASES = [pytest.param(case, marks=[] if i in QUICK else [pytest.mark.slow]) for i, case in enumerate(MEASURED)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].__name__} {c[1]} {c[2]} {c[3:9]} {'+'.join(c[9])}")
def test_calculated_is_measured(case):
    library, base, dtype, autocast, hidden, layers, rows, tokens, p, again = case
    model = adapted(library, base, dtype, hidden, layers, p, again)
    calculated = step_memory(model, rows, tokens, autocast=torch.bfloat16 if autocast else None)
    with torch.compiler.set_stance("force_eager"):
        by_torch = measured(model, torch.randint(1, VOCABULARY, (rows, tokens)), autocast)
    assert calculated.peak == pytest.approx(by_torch, rel=0.1)


def test_an_estimate_adds_up_and_leaves_the_model_alone():
    model = adapted(peft_fast, "4-bit", torch.bfloat16, 128, 2, 0.1, ())
    marked = next(weight for weight in model.parameters() if weight.requires_grad)
    marked.grad = torch.ones_like(marked)
    before = torch.random.get_rng_state()
    estimate = estimate_memory(model, 2, 32, autocast=torch.bfloat16)
    found = step_memory(model, 2, 32, autocast=torch.bfloat16)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert (estimate.adapter, estimate.gradients, estimate.optimizer_states) == (4 * trained, 4 * trained, 8 * trained)
    assert estimate.base_weights + estimate.adapter == nbytes(weights_of(model))
    assert estimate.needed == estimate.base_weights + estimate.adapter + estimate.optimizer_states + found.peak
    assert f"{estimate.needed / 2**20:,.0f} MiB" in str(estimate).splitlines()[-1]
    assert estimate_memory(model, 2, 32, optimizer="adamw_8bit").optimizer_states == 2 * trained
    assert torch.equal(marked.grad, torch.ones_like(marked))
    assert sum(weight.grad is not None for weight in model.parameters()) == 1
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()  # nothing without data is left in it


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    return MixtralForCausalLM(config).to(torch.bfloat16)


def test_experts_one_by_one_depend_on_values():
    def adapted(rank):
        adapters = peft_fast.LoraConfig(r=rank, target_parameters=["mlp.experts.down_proj"], task_type="CAUSAL_LM")
        return peft_fast.get_peft_model(mixtral(), adapters, autocast_adapter_dtype=False).train()

    assert estimate_memory(adapted(8), 2, 64).activations > 0
    with pytest.raises(ValueError, match="calculated on shapes, and aten.* needs values: of experts, take a rank"):
        estimate_memory(adapted(4), 2, 64)


def test_an_estimate_before_the_first_step_of_a_mixture_of_experts():
    """Tables that layers keep for the next step have no data while shapes alone are run."""
    model = mixtral()
    adapters = peft_fast.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft_fast.get_peft_model(model, adapters).train()
    estimate = estimate_memory(model, 2, 64, autocast=torch.bfloat16)
    ids = torch.randint(0, VOCABULARY, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    assert type(loss) is torch.Tensor
    assert 0 < loss.item() < 20
    calculated = estimate.activations + estimate.logits + estimate.gradients + estimate.working_space
    assert measured(model, ids, True) == pytest.approx(calculated, rel=0.1)


def test_wrong_arguments():
    model = adapted(peft_fast, "dense", torch.float32, 64, 2, 0.0, ())
    with pytest.raises(ValueError, match="optimizer must be one of adamw, .*, got 'adam'"):
        estimate_memory(model, 1, 8, optimizer="adam")
    with pytest.raises(ValueError, match="sequence_length must be at least 1, got 0"):
        estimate_memory(model, 1, 0)


@pytest.mark.slow
def test_attention_that_keeps_its_scores_is_seen():
    model = adapted(peft_fast, "dense", torch.float32, 64, 2, 0.0, ())
    short, long = (step_memory(model, 1, tokens).total / tokens for tokens in (64, 256))
    assert long == pytest.approx(short, rel=0.01)
    model.config._attn_implementation = "eager"
    short, long = (step_memory(model, 1, tokens).total / tokens for tokens in (64, 256))
    assert long > 1.5 * short


def test_bytes_of_a_llama_3_8b_layer():
    """Issue 10: at most 95 KB a token exact, 40 KB with MLPs recomputed."""
    recipe = Recipe(config_of("llama-3-8b"))
    limits = {
        "peft_fast": 128_000,
        "peft_fast, norms recomputed": 95_000,
        "peft_fast, norms and MLPs recomputed": 40_000,
    }
    for way in WAYS:
        if way.name in limits:
            assert bench_memory.bytes_per_token(Calculated(way, recipe), 32) <= limits[way.name], way.name
    theirs = bench_memory.bytes_per_token(Calculated(WAYS[0], recipe), 2048)
    assert theirs == pytest.approx(2.3 * 95_000, rel=0.02)


@pytest.mark.slow
def test_further_layers_take_what_the_third_takes():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=224, num_hidden_layers=6, num_attention_heads=4, vocab_size=512
    )  # fmt: skip
    for way in (WAYS[0], WAYS[3], WAYS[5]):
        calculated = Calculated(way, Recipe(config, batch_size=2, rank=4))
        whole = meta_model(config, 4)
        if "layers" in way.recompute:
            whole.gradient_checkpointing_enable({"use_reentrant": False})
        whole.enable_input_require_grads()
        adapters = way.library.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        whole = way.library.get_peft_model(whole, adapters).train()
        if "norms" in way.recompute:
            peft_fast.set_recompute(whole, norms=True)
        without_data(whole, FakeTensorMode(allow_non_fake_inputs=True))
        direct = estimate_memory(whole, 2, 64, autocast=torch.bfloat16)
        assert calculated.estimate(64).needed == pytest.approx(direct.needed, rel=0.01), way.name


@pytest.mark.slow
def test_the_longest_row_just_fits():
    config = Qwen3Config(
        hidden_size=64, intermediate_size=224, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=512,
    )  # fmt: skip
    calculated = Calculated(WAYS[2], Recipe(config, rank=4))
    limit = 40 * 2**20
    longest = calculated.longest(limit, at=(512, 1024))
    assert calculated.estimate(longest).needed <= limit * 1.01
    assert calculated.estimate(longest + longest // 50).needed > limit
    without_logits = Calculated(WAYS[2], Recipe(config, rank=4, chunked_loss=True))
    assert without_logits.longest(limit, at=(512, 1024)) > 1.2 * longest


@pytest.mark.slow
def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["memory", "--model", "small", "--seq-len", "64", "--only", "peft_fast, norms"])
    assert bench_memory.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [way.name for way in WAYS[3:5]]
    monkeypatch.setattr("sys.argv", ["memory", "--model", "small", "--tensors", "--seq-len", "64", "--only", "s and M"])
    assert bench_memory.main() == 0
    assert "2 x [1, 64, 512] bfloat16" in capsys.readouterr().out
    for wrong, message in (
        (["--model", "nowhere"], "--model must be"),
        (["--only", "nobody"], "--only 'nobody' is in"),
    ):
        with pytest.raises(SystemExit):
            bench_memory.parse(wrong)
        assert message in capsys.readouterr().err


def test_a_four_bit_model_without_data_has_the_bytes_of_one_with():
    real = peft_fast.quantize_linear_layers(llama(128, 2, "dense"))
    fake = without_data(meta_model(copy.deepcopy(real.config), 4), FakeTensorMode())
    codebooks = 14 * 4 * (16 + 256)  # which real ones share
    assert nbytes(weights_of(fake)) == pytest.approx(nbytes(weights_of(real)), abs=codebooks + 2048)
