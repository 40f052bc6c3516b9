"""Adapters whose modules are called, because calling them does more than an op can see: hooks, wrappers, FSDP."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune, weight_norm

import peft_fast
from peft_fast import explain

ROOT = Path(__file__).parents[2]
BOTH = (peft, peft_fast)
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(library, **options):
    torch.manual_seed(0)
    config = library.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False, **options)
    model = library.get_peft_model(Model(), config).train()
    return model, model.base_model.model.first


def close(ours, theirs):
    """Magnitudes were computed in fp32, before models were made fp64."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return 2 * self.inner(x)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def with_forward_hook(layer):
    layer.lora_A["default"].register_forward_hook(lambda module, args, out: 2 * out)


def with_pre_hook(layer):
    layer.lora_B["default"].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def with_gradient_hook(layer):
    layer.lora_A["default"].register_full_backward_hook(lambda module, grads, outs: (3 * grads[0],))


def with_wrapper(layer):
    layer.lora_A["default"] = Doubled(layer.lora_A["default"])


def with_dropout_of_its_own(layer):
    layer.lora_dropout["default"] = nn.Tanh()


def with_parametrisation(layer):
    parametrize.register_parametrization(layer.lora_B["default"], "weight", Twice())


def with_pruning(layer):
    prune.l1_unstructured(layer.lora_A["default"], "weight", 0.5)


def with_forward_of_its_own(layer):
    factor = layer.lora_A["default"]
    factor.forward = lambda x: -nn.functional.linear(x, factor.weight)


CHANGES = [
    with_forward_hook, with_pre_hook, with_gradient_hook, with_wrapper, with_dropout_of_its_own, with_parametrisation,
    with_pruning, with_forward_of_its_own,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_bias": True}, {"use_dora": True}], ids=str)
def test_what_is_done_to_an_adapters_modules_is_done_as_in_peft(change, options):
    found = []
    for library in BOTH:
        model, layer = adapted(library, **options)
        model.double()
        x = X.double().requires_grad_()
        before = model(x).detach()
        change(layer)
        y = model(x)
        y.square().sum().backward()
        assert change is with_gradient_hook or not torch.allclose(y, before)
        found.append((y, x.grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, dx, grads), (theirs, their_dx, their_grads) = found[1], found[0]
    close(ours, theirs)
    close(dx, their_dx)
    assert grads.keys() == their_grads.keys()
    for name in grads:
        close(grads[name], their_grads[name])


@pytest.mark.parametrize("change", [with_forward_hook, with_wrapper, with_pruning, with_gradient_hook])
def test_dora_with_dropout_calls_them_too(change):
    """p close to 1 as to be no dropout that is random: every element is dropped."""
    found = []
    for library in BOTH:
        model, layer = adapted(library, use_dora=True, lora_dropout=0.5)
        model.double()
        layer.lora_dropout["default"].p = 1.0
        model.base_model.model.second.lora_dropout["default"].p = 1.0
        x = X.double().requires_grad_()
        change(layer)
        for training in (True, False):
            y = model.train(training)(x)
            y.square().sum().backward()
            found.append((y, x.grad.clone(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    for ours, theirs in zip(found[2:], found[:2]):
        close(ours, theirs)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_beside_one_with_dora_is_called_too(use_dora):
    found = []
    for library in BOTH:
        model, layer = adapted(library, use_dora=True)
        options = {"target_modules": ["first"], "use_dora": use_dora, "init_lora_weights": False}
        model.add_adapter("other", library.LoraConfig(r=2, **options))
        model.double()
        before = None
        for _ in range(2):
            model.base_model.set_adapter(["default", "other"])
            y = model(X.double())
            assert before is None or not torch.allclose(y, before)
            before = y
            layer.lora_A["other"].register_forward_hook(lambda module, args, out: 2 * out)
        found.append(y)
    close(found[1], found[0])


def test_hooks_on_magnitudes_run():
    model, layer = adapted(peft_fast, use_dora=True)
    before = model(X)
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.allclose(model(X), before)


def test_explain_says_so_and_others_stay_on_their_route(capsys):
    model, layer = adapted(peft_fast)
    with_forward_hook(layer)
    rows = {row.name: row for row in explain(model).rows}
    assert rows["base_model.model.first"].route == "added"
    assert (
        "a factor of 'default' has hooks or a forward of its own: its modules are called"
        in rows["base_model.model.first"].because
    )
    assert rows["base_model.model.second"].route == "reference"


@pytest.mark.parametrize("library", BOTH)
def test_weight_norm_of_a_factor_trains(library):
    model, layer = adapted(library)
    with pytest.warns(FutureWarning, match="weight_norm"):
        weight_norm(layer.lora_A["default"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("use_dora", [False, True])
def test_hooks_that_only_watch_change_nothing(use_dora):
    model, layer = adapted(peft_fast, use_dora=use_dora)
    before = model(X)
    for module in (layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"]):
        module.register_forward_hook(lambda module, args, out: None)
    torch.testing.assert_close(model(X), before)


def test_a_hook_that_is_gone_leaves_no_trace():
    model, layer = adapted(peft_fast)
    before = model(X)
    handle = layer.lora_A["default"].register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.allclose(model(X), before)
    handle.remove()
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("kind", ["linear_4bit", "linear_8bit"])
def test_k_bit_bases(kind):
    model = peft_fast.quantize_linear_layers(Model(), bits=4 if kind == "linear_4bit" else 8)
    torch.manual_seed(0)
    config = peft_fast.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    model = peft_fast.get_peft_model(model, config)
    called = copy.deepcopy(model)
    called.base_model.model.first.lora_A["default"].register_forward_hook(lambda module, args, out: out)
    torch.testing.assert_close(called(X), model(X))


WORKER = """
import sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from peft_fast import LoraConfig, get_peft_model
from peft_fast.utils.other import fsdp_auto_wrap_policy
rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
tokens = torch.randint(1, 64, (2, 10), generator=torch.Generator().manual_seed(3))

def made(targets="all-linear", **options):
    torch.manual_seed(7)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    model.zero_grad()
    return model, loss.detach(), norm

def sharded(model, loss, norm):
    out = model(input_ids=tokens, labels=tokens).loss
    out.backward()
    torch.testing.assert_close(out.detach(), loss)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    squares = sum((g.to_local() if hasattr(g, "to_local") else g).square().sum() for g in grads)
    dist.all_reduce(squares)
    torch.testing.assert_close(squares.sqrt(), norm)

for original, dora in ((False, False), (True, False), (False, True), (True, True)):
    model, loss, norm = made(["q_proj", "v_proj"] if not original else "all-linear", use_dora=dora)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=original, device_id=torch.device("cpu")
    )
    sharded(wrapped, loss, norm)
for leaves, dora in ((True, False), (False, False), (True, True), (False, True)):
    model, loss, norm = made(use_dora=dora)
    for name, module in model.named_modules():
        if leaves and name.endswith(("lora_A.default", "lora_B.default", "lora_magnitude_vector.default")):
            fully_shard(module)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    sharded(model, loss, norm)
dist.barrier()
print("equal")
"""


@pytest.mark.slow  # two processes for each of eight models: 12 s
@pytest.mark.filterwarnings("ignore")
def test_fsdp_of_both_generations_trains_as_one_process_does(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(rank), "2", str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=180) for worker in workers]
    assert [out.strip().splitlines()[-1:] for out, _ in outputs] == [["equal"]] * 2, outputs
