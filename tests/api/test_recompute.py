"""set_recompute: norms and MLPs whose outputs are computed again, in models."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, OlmoeConfig, Qwen3Config

import peft_fast
from bench.memory_saved import kept, total
from peft_fast import LoraConfig, get_peft_model, quantize_linear_layers, set_recompute
from peft_fast.tuners.lora.norms import RecomputingNorm, kind_of

SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, pad_token_id=0,
)  # fmt: skip
IDS = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def adapted(config=LlamaConfig, dtype=torch.float32, **options):
    torch.manual_seed(0)
    head_dim = {} if config is OlmoeConfig else {"head_dim": 16}
    base = AutoModelForCausalLM.from_config(config(**SIZES, **head_dim)).to(dtype)
    if options.pop("four_bits", False):
        quantize_linear_layers(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options))
    return model.train()


def step(model, autocast=False):
    """(loss, gradients); the same dropout each time."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def rows(model):
    return {row.name: (row.route, row.because) for row in peft_fast.explain(model, show=False).rows}


@pytest.mark.parametrize(("norms", "mlps"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma2Config])
@pytest.mark.parametrize(("four_bits", "p", "autocast"), [(False, 0.1, False), (True, 0.0, True)])
def test_the_same_model(config, norms, mlps, four_bits, p, autocast):
    dtype = torch.bfloat16 if autocast else torch.float32
    model = adapted(config, dtype, four_bits=four_bits, lora_dropout=p)
    before = step(model, autocast)
    set_recompute(model, norms=norms, mlps=mlps)
    after = step(model, autocast)
    assert torch.equal(after[0], before[0])
    error = sum((a - b).float().norm() for a, b in zip(after[1], before[1])) / sum(b.float().norm() for b in before[1])
    assert error < (2e-2 if autocast else 1e-6)
    set_recompute(model)
    assert torch.equal(step(model, autocast)[0], before[0])
    assert not any(isinstance(module, RecomputingNorm) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_saves(dtype):
    """Of every layer in bf16 x in fp32, twice, and the norms' outputs; in fp32 those alone. And gate's and up's."""
    model = adapted(dtype=dtype)
    model.enable_input_require_grads()
    decoder, tokens, size = model.get_base_model().model, IDS.numel(), dtype.itemsize
    wide = 2 if dtype == torch.bfloat16 else 0
    sizes = []
    for norms, mlps in ((False, False), (True, False), (True, True)):
        set_recompute(model, norms=norms, mlps=mlps)
        sizes.append(total(kept(lambda: decoder(input_ids=IDS).last_hidden_state, model)))
    of_norms = tokens * 64 * (2 * 2 * (wide + size) + wide)  # the last norm's output is the model's
    assert sizes[0] - sizes[1] == pytest.approx(of_norms, rel=0.02)
    assert sizes[1] - sizes[2] == 2 * tokens * (2 * 96 + 3 * 4) * size  # and the s of three adapters


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_within_checkpoints(use_reentrant):
    model = adapted(lora_dropout=0.1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    before = step(model)
    set_recompute(model, norms=True, mlps=True)
    after = step(model)
    assert torch.equal(after[0], before[0])
    for a, b in zip(after[1], before[1]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_explain_tells():
    model = adapted()
    assert not [name for name in rows(model) if name.endswith("norm")]
    set_recompute(model, norms=True, mlps=True)
    found = rows(model)
    assert found["base_model.model.model.norm"][0] == "recompute"
    assert found["base_model.model.model.layers.1.input_layernorm"][1].startswith("its input is kept")
    assert found["base_model.model.model.layers.0.mlp"][1].endswith("; x is kept")


class MyRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64), requires_grad=False), 1e-6

    def forward(self, x):
        return nn.functional.rms_norm(x, (64,), self.weight, self.eps)


def test_norms_that_stand_down():
    model = adapted()
    layers = model.get_base_model().model.layers
    layers[0].input_layernorm = MyRMSNorm()
    set_recompute(model, norms=True)
    layers[0].post_attention_layernorm.forward = layers[0].post_attention_layernorm.forward
    layers[1].input_layernorm.weight.requires_grad_()
    name = "base_model.model.model.layers.{}"
    found = rows(model)
    assert found[f"{name.format(0)}.input_layernorm"][0] == "layers"
    assert "MyRMSNorm is of" in found[f"{name.format(0)}.input_layernorm"][1]
    assert "forward was replaced" in found[f"{name.format(0)}.post_attention_layernorm"][1]
    assert found[f"{name.format(1)}.input_layernorm"] == ("layers", "its weight is trained")
    assert found[f"{name.format(1)}.post_attention_layernorm"][0] == "recompute"
    step(model)
    assert layers[1].input_layernorm.weight.grad.abs().sum() > 0


def test_a_norm_that_computes_something_else(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Doubled(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    Doubled.__name__, Doubled.__module__ = "DoubledRMSNorm", "transformers.models.doubled"
    model = adapted()
    doubled = Doubled(64)
    doubled.requires_grad_(False)
    model.get_base_model().model.norm = doubled
    set_recompute(model, norms=True)
    assert "computes something else" in rows(model)["base_model.model.model.norm"][1]
    assert type(doubled) is Doubled


def test_nothing_to_recompute():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = get_peft_model(mlp, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="norms can be computed again: it has no RMSNorm"):
        set_recompute(model, norms=True)
    with pytest.raises(ValueError, match="no gated MLP with LoRA can run as one op"):
        set_recompute(model, mlps=True)
    only_attention = adapted(OlmoeConfig)
    with pytest.raises(ValueError, match="no gated MLP"):
        set_recompute(only_attention, norms=True, mlps=True)
    assert not any(isinstance(module, RecomputingNorm) for module in only_attention.modules())


def test_copies_files_and_unloading():
    model = adapted()
    set_recompute(model, norms=True)
    before = step(model)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(step(other)[0], before[0])
        assert isinstance(other.get_base_model().model.norm, RecomputingNorm)
    classes = {type(module) for module in model.unload().modules()}
    assert not any(issubclass(cls, RecomputingNorm) for cls in classes)


def test_compiled():
    """torch.compile decides itself what it keeps: the norm runs as it is."""
    model = adapted()
    before = step(model)
    set_recompute(model, norms=True)
    compiled = torch.compile(model.get_base_model().model.layers[0].input_layernorm, backend="aot_eager")
    x = torch.randn(3, 64)
    plain = copy.deepcopy(model.get_base_model().model.layers[0].input_layernorm)
    assert torch.equal(compiled(x), plain(x))
    assert torch.equal(step(model)[0], before[0])


def test_norms_are_tried_with_their_own_settings():
    """One class may compute several things: in groups, or with a gate, without which it does not run."""
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextRMSNorm
    from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

    assert kind_of(Qwen4ExpTextRMSNorm(64)) == "gemma"
    for norm in (Qwen4ExpTextRMSNorm(64, group_size=16), KimiLinearRMSNormGated(64), Zamba2RMSNormGated(64, 16)):
        assert "computes something else" in kind_of(norm)
    with torch.device("meta"):  # as set_default_device("cuda"): the trial has data, and its generator a device
        assert kind_of(nn.RMSNorm(64)) == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torchs_own_default_eps(dtype):
    model = get_peft_model(nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 8)).to(dtype), LoraConfig(target_modules=["1"]))
    norm, x = model.get_base_model()[0], 0.01 * torch.randn(100, 64, dtype=dtype)
    before = norm(x)
    set_recompute(model, norms=True)
    assert isinstance(norm, RecomputingNorm)
    assert torch.equal(norm(x), before)
