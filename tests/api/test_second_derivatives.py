"""Adapted models under second derivatives, torch.func and forward mode: what peft's give."""

import peft
import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import peft_fast

BOTH = (peft, peft_fast)
IDS = torch.arange(1, 9).view(2, 4)
OPTIONS = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "k_proj", "v_proj", "embed_tokens"], "use_rslora": True},
    {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
]


def adapted(library, llama, trained, **options):
    base = llama(num_hidden_layers=1, attn_implementation="eager").double()
    torch.manual_seed(0)
    model = library.get_peft_model(base, library.LoraConfig(r=2, **options))
    return trained(model).double()


def derivatives(model):
    """Of a penalty on gradients (as in MAML or gradient penalties), through create_graph and through torch.func."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = {name: p for name, p in model.named_parameters() if name in names}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (), {"input_ids": IDS, "labels": IDS}).loss

    model.zero_grad()
    first = torch.autograd.grad(loss(parameters), list(parameters.values()), create_graph=True)
    first_values = [g.detach() for g in first]
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(parameters.values()))
    by_func = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    tangent = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, slope = torch.func.jvp(loss, ({name: p.detach() for name, p in parameters.items()},), (tangent,))
    return names, first_values, second, [by_func[name] for name in names], slope


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_as_in_peft(llama, trained, options):
    (names, *theirs), (our_names, *ours) = (derivatives(adapted(l, llama, trained, **options)) for l in BOTH)
    assert names == our_names
    for expected, found in zip(theirs, ours):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[0], ours[2])
    assert any(bool(g.any()) for g in ours[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("IA3", {"feedforward_modules": ["2"], "init_ia3_weights": False}),
        ("LoHa", {"r": 2, "init_weights": False}),
        ("LoKr", {"r": 2, "init_weights": False}),
        ("Shira", {"r": 1, "init_weights": False, "random_seed": 1}),
        ("Vera", {"r": 2, "init_weights": False}),
        ("OFT", {"oft_block_size": 2, "init_weights": False}),
        ("HRA", {"r": 2, "init_weights": False}),
        ("RandLora", {"r": 2, "init_weights": False}),
        ("FourierFT", {"n_frequency": 4}),
    ],
)
def test_other_methods(method, options, dtype):
    """Hessians through create_graph and, from first derivatives of torch.func, by difference quotients of them."""
    torch.manual_seed(0)
    config = getattr(peft_fast, f"{method}Config")(target_modules=["0", "2"], **options)
    base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))
    model = peft_fast.get_peft_model(base, config).to(dtype)
    x, step = torch.randn(3, 6, dtype=dtype), 1e-3
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach() for name, p in parameters.items()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    def moved(by):
        return torch.func.grad(loss)({name: p + by for name, p in start.items()})

    first = torch.autograd.grad(loss(parameters), list(parameters.values()), create_graph=True)
    torch.testing.assert_close(dict(zip(parameters, first)), torch.func.grad(loss)(start))
    _, slope = torch.func.jvp(loss, (start,), ({name: torch.ones_like(p) for name, p in start.items()},))
    torch.testing.assert_close(slope, sum(g.sum() for g in first).detach())
    second = torch.autograd.grad(sum(g.sum() for g in first), list(parameters.values()))
    if dtype == torch.float64:
        up, down = moved(step), moved(-step)
        expected = [(up[name] - down[name]) / (2 * step) for name in parameters]
        torch.testing.assert_close(list(second), expected, rtol=1e-3, atol=1e-3)
    assert any(bool(g.any()) for g in second)


@pytest.mark.parametrize("change", ["forward", "vmap", "jacrev"])
def test_a_layer_alone(change):
    found = []
    for library in BOTH:
        torch.manual_seed(0)
        config = library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = library.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
        x = torch.ones(3, 6)
        if change == "forward":
            with torch.autograd.forward_ad.dual_level():
                dual = model(torch.autograd.forward_ad.make_dual(x, 2 * x))
                found.append(torch.autograd.forward_ad.unpack_dual(dual).tangent)
        elif change == "vmap":
            found.append(torch.func.vmap(model)(x))
        else:
            found.append(torch.func.jacrev(model)(x))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("implementation", ["grouped_mm", pytest.param("batched_mm", marks=pytest.mark.slow), "eager"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_experts(implementation):
    """Second derivatives are peft's. torch.func, which peft's parametrisation fails under, gives the first
    ones; forward mode too, where torch has it for the experts' own product."""

    def made(library):
        torch.manual_seed(7)
        base = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, head_dim=16, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16,
                attn_implementation="eager",
            )
        )  # fmt: skip
        base.set_experts_implementation(implementation)
        experts = ["experts.gate_up_proj", "experts.down_proj"]
        config = library.LoraConfig(
            r=2, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False
        )  # fmt: skip
        return library.get_peft_model(base, config)

    def loss(model, parameters):
        return torch.func.functional_call(model, parameters, (), {"input_ids": IDS, "labels": IDS}).loss

    found = []
    for library in BOTH:
        model = made(library)
        parameters = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
        found.append([*(g.detach() for g in first), *second])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    given = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    by_func = torch.func.grad(lambda parameters: loss(model, parameters))(given)
    torch.testing.assert_close(list(by_func.values()), found[1][: len(given)], rtol=1e-4, atol=1e-6)
    if implementation != "grouped_mm":
        tangents = {name: torch.ones_like(p) for name, p in given.items()}
        _, slope = torch.func.jvp(lambda parameters: loss(model, parameters), (given,), (tangents,))
        torch.testing.assert_close(slope, sum(g.sum() for g in found[1][: len(given)]), rtol=1e-3, atol=1e-5)
