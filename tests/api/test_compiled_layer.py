"""A whole decoder layer of transformers' Llama with adapters on its seven linear layers, the MLP as one op: compiled in
one piece, and run again under both kinds of checkpointing."""

from functools import partial

import bitsandbytes  # noqa: F401 - the layers' own dequantisation is a candidate where it is loaded
import pytest
import torch
import torch._dynamo.testing
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fast import LoraConfig, explain, get_peft_model, ops, set_lora_groups

from .test_siblings import K, adapted, assert_equal
from .test_siblings import results as results_of

HIDDEN = 64


def decoder(base: str, attention: str = "sdpa", p: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The adapted decoder of one layer, of whose MLP `explain` says that it is one op."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=1, vocab_size=32, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    if base == "4-bit":
        for name, linear in list(model.model.named_modules()):
            if isinstance(linear, nn.Linear):
                layer = Linear4bit(linear.in_features, linear.out_features, False, dtype, quant_type="nf4")
                layer.load_state_dict(linear.state_dict())
                model.model.set_submodule(name, layer.to("cpu"))
        model.is_loaded_in_4bit = model.is_quantized = True
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_dropout=p, target_modules="all-linear", init_lora_weights=False)
    )
    assert [row.route for row in explain(adapted, show=False).rows if row.name.endswith(".mlp")] == ["mlp"]
    return adapted.get_base_model().model


def caller(whole: nn.Module, layer):
    """A function of a hidden state that calls the layer as the decoder does."""

    def call(x: torch.Tensor) -> torch.Tensor:
        positions = whole.rotary_emb(x, torch.arange(x.shape[1])[None])
        out = layer(x, position_embeddings=positions, attention_mask=None)
        return out if isinstance(out, torch.Tensor) else out[0]

    return call


def results(call, layer: nn.Module, tokens: int, train: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output, and in training the gradients of x and of all adapters."""
    torch.manual_seed(tokens)
    x = torch.randn(1, tokens, HIDDEN, dtype=dtype, requires_grad=train)
    if not train:
        with torch.no_grad():
            return [call(x)]
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])]


@pytest.mark.parametrize(
    ("base", "attention"),
    [
        pytest.param("dense", "eager", marks=pytest.mark.slow),
        ("4-bit", "sdpa"),
        pytest.param("dense", "sdpa", marks=pytest.mark.slow),
        pytest.param("4-bit", "eager", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.usefixtures("keys_drawn_one_by_one")  # groups, which are not compiled, draw theirs together
def test_a_layer_compiles_whole_with_two_graphs_as_m_varies(base, attention, train):
    """Ten steps; with dropout in training."""
    whole = decoder(base, attention, 0.1 if train else 0.0).train(train)
    layer = whole.layers[0]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for M in (2, 5, 8, 16, 33, 3, 64, 2, 17, 40):
        found = [results(caller(whole, f), layer, M, train, torch.float32) for f in (layer, compiled)]
        for one, other in zip(*found):
            torch.testing.assert_close(one, other)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.slow
def test_a_layer_compiles_whole_by_inductor():
    """What torch.compile does if nothing else is asked for, in bf16."""
    whole = decoder("4-bit", dtype=torch.bfloat16).train()
    layer = whole.layers[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    one, other = (results(caller(whole, f), layer, 16, True, torch.bfloat16) for f in (layer, compiled))
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * a.abs().max().item())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", ["dense", "4-bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_give_the_same_bits_with_dropout(base, reentrant, dtype):
    layer = (whole := decoder(base, p=0.3, dtype=dtype).train()).layers[0]
    call, grads = caller(whole, layer), []
    for checkpointed in (False, True):
        layer.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(1, 24, HIDDEN, dtype=dtype, requires_grad=True)
        torch.manual_seed(2)
        y = checkpoint(call, x, use_reentrant=reentrant) if checkpointed else call(x)
        y.square().sum().backward()
        grads.append([y, x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    assert len(grads[0]) == 2 + 14
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_groups_are_not_compiled(use_checkpoint, monkeypatch):
    """The layers run one by one there."""
    model, x = adapted(), torch.randn(6, K)
    set_lora_groups(model, False)
    expected = results_of(model, x)
    set_lora_groups(model, True)
    monkeypatch.setattr(ops, "lora_group", None)
    run = partial(checkpoint, model, use_reentrant=False) if use_checkpoint else model
    torch._dynamo.reset()
    assert_equal(
        results_of(model, x, torch.compile(run, fullgraph=True, backend="aot_eager")), expected, rtol=1e-5, atol=1e-5
    )
