"""Adapters on the experts of a mixture, all experts at once (tuners/lora/experts.py), beside peft 0.21.2, which adds
them to the weights."""

import copy
import warnings

import peft
import pytest
import torch
import transformers as tf
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn
from transformers.integrations.moe import use_experts_implementation

import peft_fast
from bench.counts import measure
from peft_fast import use_backend
from peft_fast.hotswap import hotswap_adapter

V, E = 96, 32
IDS = torch.randint(1, V, (2, 9), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": V, "hidden_size": E, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WHOLE_PATHS = [f"model.layers.{i}.{name}" for i in range(2) for name in BOTH]  # as peft wants those in 4 bits named
PATH = "base_model.model.model.layers.0.mlp.experts"


def qwen(experts=4, **more):
    config = tf.Qwen3MoeConfig(**SIZES, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=32, **more)
    return tf.Qwen3MoeForCausalLM(config)


MODELS = {
    "qwen3_moe": qwen,
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, num_local_experts=4, sliding_window=4)),
}


def base(kind="qwen3_moe", implementation="grouped_mm", **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = MODELS[kind](**sizes).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that the experts matter
    model.set_experts_implementation(implementation)
    return model


def adapted(library, model, parameters=BOTH, **options):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = library.LoraConfig(
            **{"r": 4, "target_modules": [], "target_parameters": parameters, "init_lora_weights": False, **options}
        )
        return library.get_peft_model(model, config).eval()


def pair(kind="qwen3_moe", implementation="grouped_mm", parameters=BOTH, **options):
    """(ours, peft's) around equal models"""
    return tuple(adapted(lib, base(kind, implementation), parameters, **options) for lib in (peft_fast, peft))


def rows(model):
    return {row.name: row for row in peft_fast.explain(model, show=False).rows}


def close(a, b, **tolerances):
    torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


def same(ours, theirs, **tolerances):
    """Outputs and gradients, in training"""
    outputs = []
    for model in (ours, theirs):
        model.zero_grad()
        outputs.append(model(input_ids=IDS).logits)
        outputs[-1].square().mean().backward()
    close(*outputs, **tolerances)
    trained = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            close(mine.grad, other.grad, msg=name, **tolerances)
            trained += 1
    assert trained >= 2


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients_are_pefts(kind, implementation):
    ours, theirs = pair(kind, implementation)
    same(ours, theirs)
    row = rows(ours)[PATH]
    if implementation == "eager":
        assert row.route == "added"
        assert "experts_implementation is 'eager'" in row.because
    else:
        assert row.route == "reference"


@pytest.mark.parametrize("parameter", BOTH)
def test_one_of_the_two_parameters(parameter):
    same(*pair(parameters=[parameter]))


def test_several_adapters_disabled_and_merged_ones():
    ours, theirs = pair()
    for model, library in ((ours, peft_fast), (theirs, peft)):
        torch.manual_seed(9)
        config = library.LoraConfig(r=3, target_modules=[], target_parameters=BOTH, init_lora_weights=False)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    same(ours, theirs)
    expected = ours(IDS).logits
    with ours.disable_adapter():
        close(ours(IDS).logits, base()(IDS).logits)
    ours.merge_adapter()
    assert rows(ours)[PATH].route == "base"
    close(ours(IDS).logits, expected)
    ours.unmerge_adapter()
    close(ours(IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits(dtype):
    ours, theirs = (model.to(dtype) for model in pair())
    truth = pair()[0](IDS).logits
    errors = [(model(IDS).logits.float() - truth).norm() / truth.norm() for model in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1]


def test_under_autocast():
    ours, theirs = pair()
    with torch.autocast("cpu", torch.bfloat16):
        same(ours, theirs, rtol=3e-2, atol=3e-2)


def test_checkpointing_and_generating():
    ours, theirs = pair()
    for model in (ours, theirs):
        model.train().gradient_checkpointing_enable()
        model.enable_input_require_grads()
    same(ours, theirs)
    for model in (ours, theirs):
        model.eval()
    prompt = {"input_ids": IDS[:, :4], "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
    ids = [model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (ours, theirs)]
    assert torch.equal(*ids)


def in_4_bits(model, **options):
    """Blocks of 32 divide every row: where they do not, bitsandbytes' own CPU kernel is wrong."""
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name, blocksize=32, **options)
    return model


def wrappers(model):
    """Of both layers, by the names of their parameters"""
    found = [m for m in model.modules() if type(m).__name__ == "ParamWrapper"]
    return sorted(found, key=lambda w: w.parameter_name)


@pytest.mark.parametrize("compress_statistics", [False, True])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_in_4_bits(kind, implementation, compress_statistics):
    """peft 0.21.2 has the same names, and fails in the second forward. So the values are compared with its adapters
    around the dequantised weights; there it has the two parameters the other way round."""
    model, dense = in_4_bits(base(kind, implementation), compress_statistics=compress_statistics), base(kind)
    for layer, other in zip(dense.model.layers, model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            getattr(layer.mlp.experts, name).data.copy_(getattr(other.mlp.experts, name))
    of_peft = adapted(peft, copy.deepcopy(model), WHOLE_PATHS)
    ours, theirs = adapted(peft_fast, copy.deepcopy(model), WHOLE_PATHS), adapted(peft, dense, WHOLE_PATHS)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in of_peft.named_parameters()]
    for wrapper, other in zip(wrappers(ours), wrappers(theirs), strict=True):
        assert wrapper.parameter_name == other.parameter_name
        for of_ours, of_theirs in ((wrapper.lora_A, other.lora_A), (wrapper.lora_B, other.lora_B)):
            of_theirs.default.weight = of_ours.default.weight = nn.Parameter(of_ours.default.weight.data)
    results = []
    for peft_model in (ours, theirs):
        y = peft_model(IDS).logits
        wanted = [f.default.weight for w in wrappers(peft_model) for f in (w.lora_A, w.lora_B)]
        results.append([y, *torch.autograd.grad(y.square().mean(), wanted)])
    for mine, other in zip(*results, strict=True):
        close(mine, other)
    assert rows(ours)[PATH].route == ("added" if implementation == "eager" else "reference")
    assert (ours(IDS).logits - model(IDS).logits).abs().max() > 1e-3


def test_saved_for_backward_is_nothing_of_the_weights_size():
    model = adapted(peft_fast, in_4_bits(base(experts=32), compress_statistics=False))
    saved = 0

    def count(t):
        nonlocal saved
        saved = max(saved, t.numel() * t.is_floating_point())
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        model(IDS)
    assert 0 < saved < 32 * 64 * E / 4


def test_as_many_launches_for_64_experts_as_for_4():
    def launches(experts):
        model = adapted(peft_fast, base(experts=experts))

        def step():
            model(input_ids=IDS).logits.sum().backward()

        step()
        return measure(step, triton=True)[1].launches

    with use_backend("auto"):
        assert launches(4) == launches(64)


def test_compiled_without_a_break():
    ours, _ = pair()
    expected = ours(input_ids=IDS).logits
    torch._dynamo.reset()
    compiled = torch.compile(ours.base_model.model.model.layers[0].mlp, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 9, E, requires_grad=True)
    gradients = []
    for run in (compiled, ours.base_model.model.model.layers[0].mlp):
        y = run(x)
        y = y[0] if isinstance(y, tuple) else y
        gradients.append(
            (y, *torch.autograd.grad(y.square().sum(), [x, *(p for p in ours.parameters() if p.requires_grad)][:5]))
        )
    for mine, other in zip(*gradients):
        close(mine, other)
    close(ours(input_ids=IDS).logits, expected)


class Plain(nn.Module):
    """Experts as transformers has them, with every option of its decorator."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, wide = 4, 24
        first = "gate_up_proj" if config.gate else "up_proj"
        shapes = {first: (4, wide * (2 if config.gate else 1), E), "down_proj": (4, E, wide)}
        for name, (count, out, into) in shapes.items():
            shape = (count, into, out) if config.transposed else (count, out, into)
            setattr(self, name, nn.Parameter(torch.randn(shape) / 4))
            if config.bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(count, out)))
        self.act_fn = nn.SiLU()
        if config.norm:
            self.post_expert_norm = nn.RMSNorm(E)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("eager")


class Config:
    _experts_implementation = "grouped_mm"

    def __init__(self, **options):
        self.gate = self.transposed = self.bias = self.norm = False
        vars(self).update(options)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        kind = use_experts_implementation(
            type("Experts", (Plain,), {}), is_transposed=config.transposed, has_bias=config.bias,
            has_gate=config.gate, has_post_expert_norm=config.norm,
        )  # fmt: skip
        self.experts = kind(config)

    def forward(self, x, index, weights):
        return self.experts(x, top_k_index=index, top_k_weights=weights)


@pytest.mark.parametrize(
    "options",
    [
        {"gate": True},
        {"gate": True, "transposed": True},
        {"gate": True, "bias": True},
        {"bias": True, "transposed": True},
        {"norm": True},
    ],
    ids=str,
)
def test_every_form_of_transformers_experts(options):
    torch.manual_seed(2)
    model = Model(Config(**options))
    parameters = ["gate_up_proj" if "gate" in options else "up_proj", "down_proj"]
    config = {"r": 4, "target_modules": [], "target_parameters": [f"experts.{p}" for p in parameters]}
    models = []
    for library in (peft_fast, peft):
        torch.manual_seed(5)
        config_ = library.LoraConfig(**config, init_lora_weights=False)
        models.append(library.get_peft_model(copy.deepcopy(model), config_))
    x, index = torch.randn(7, E, requires_grad=True), torch.randint(0, 4, (7, 3))
    weights = torch.rand(7, 3, requires_grad=True)
    results = []
    for peft_model in models:
        y = peft_model(x, index, weights)
        wanted = [x, weights, *(p for p in peft_model.parameters() if p.requires_grad)]
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    for mine, other in zip(*results, strict=True):
        close(mine, other)
    assert rows(models[0])["base_model.model.experts"].route == "reference"


def test_stands_down_where_calls_do_more():
    ours, theirs = pair()
    experts = ours.base_model.model.model.layers[0].mlp.experts
    called = []
    experts.get_base_layer().register_forward_hook(lambda *_: called.append(1))
    assert "has hooks" in rows(ours)[PATH].because
    same(ours, theirs)
    assert called


@pytest.mark.parametrize("rank", [2, 6])
def test_hotswap_of_another_rank(rank, tmp_path):
    ours, other = adapted(peft_fast, base()), adapted(peft_fast, base(), r=rank, lora_alpha=3)
    other.save_pretrained(tmp_path / "other")
    expected = other(IDS).logits
    hotswap_adapter(ours, tmp_path / "other", "default")
    close(ours(IDS).logits, expected)
    ours.save_pretrained(tmp_path / "saved")
    close(peft.PeftModel.from_pretrained(base(), tmp_path / "saved").eval()(IDS).logits, expected)
